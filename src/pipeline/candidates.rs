//! Candidates to item embeddings: the item cache, then content embeddings and the item tower for what is missing.

use super::{Pipeline, Resolved, Rows, nothing_ready, vector_or_status};
use crate::{
    admission::{Deadlines, shed},
    bundle::Model,
    content::{Content, KnownItem, batcher::Priority},
    domain::{RowStatus, Vector},
    error::{Error, ShedReason},
    inference::JobError,
    item_text::TextDigest,
    telemetry::events::{self, Lookups},
    towers::{ItemKey, item_tower},
};
use std::{collections::HashMap, time::Instant};

/// Each different text once, and for each item its place among them.
pub(super) fn unique<'a>(items: impl Iterator<Item = &'a KnownItem>) -> (Vec<KnownItem>, Vec<usize>) {
    let mut places: HashMap<TextDigest, usize> = HashMap::new();
    let mut different: Vec<KnownItem> = Vec::new();
    let place = |item: &KnownItem| {
        *places.entry(item.digest).or_insert_with(|| {
            different.push(item.clone());
            different.len() - 1
        })
    };
    let places = items.map(place).collect();
    (different, places)
}

impl Pipeline {
    /// The item embedding of each candidate. An error only where not one row is ready and one might have been.
    pub(super) async fn embed_candidates(
        &self,
        model: &Model,
        candidates: Resolved,
        deadlines: Deadlines,
    ) -> Result<Rows, Error> {
        let start = Instant::now();
        let mut rows = self.look_up(model, &candidates);
        let is_missing = |row: &Result<Option<Vector>, RowStatus>| matches!(row, Ok(None));
        let missing = rows.iter().zip(&candidates).filter(|(row, _)| is_missing(row));
        let (wanted, places) = unique(missing.filter_map(|(_, known)| known.as_ref().ok()));
        let mut n_shed = 0;
        if !wanted.is_empty() {
            let contents = self.contents.embed(&model.encoder, &wanted, Priority::Request, deadlines.encode_by).await;
            events::stage_finished("content", start);
            n_shed = contents.iter().filter(|content| matches!(content, Content::Shed)).count();
            let embedded = self.run_item_tower(model, &wanted, &contents, deadlines.answer_by).await?;
            let mut places = places.into_iter();
            for row in rows.iter_mut().filter(|row| is_missing(row)) {
                *row = places.next().map_or(Err(RowStatus::Failed), |i| embedded[i].clone().map(Some));
            }
        }
        let rows: Rows = rows.into_iter().map(|row| row.and_then(|item| item.ok_or(RowStatus::Failed))).collect();
        let late = |row: &Result<Vector, RowStatus>| matches!(row, Err(RowStatus::NotInTime));
        if rows.iter().all(Result::is_err) && (n_shed > 0 || rows.iter().any(late)) {
            return Err(nothing_ready(n_shed));
        }
        Ok(rows)
    }

    fn look_up(&self, model: &Model, candidates: &Resolved) -> Vec<Result<Option<Vector>, RowStatus>> {
        let mut lookups = Lookups::default();
        let mut look_up = |known: &KnownItem| {
            let item = self.items.get(&ItemKey { tower: model.tower_digest, text: known.digest });
            *if item.is_some() { &mut lookups.n_hits } else { &mut lookups.n_misses } += 1;
            item
        };
        let rows = candidates.iter().map(|c| c.as_ref().map(&mut look_up).map_err(|status| *status)).collect();
        events::cache_looked_up(self.items.name(), lookups);
        rows
    }

    /// The item embeddings of those of `wanted` that have a content embedding; they are cached.
    pub(super) async fn run_item_tower(
        &self,
        model: &Model,
        wanted: &[KnownItem],
        contents: &[Content],
        until: Instant,
    ) -> Result<Rows, Error> {
        let start = Instant::now();
        let inputs: Vec<Vector> = contents.iter().filter_map(Content::vector).cloned().collect();
        if inputs.is_empty() {
            return Ok(contents.iter().map(vector_or_status).collect());
        }
        let dim = model.manifest.item_tower.dim;
        let ran = model.towers.run(until, move |graphs| item_tower::embed(graphs, &inputs, dim)).await;
        events::stage_finished("item_tower", start);
        let embedded = match ran {
            Ok(Ok(items)) => Ok(items),
            Ok(Err(error)) => {
                events::encode_failed(contents.len(), &error);
                Err(RowStatus::Failed)
            }
            Err(JobError::QueueFull) => {
                events::shed(ShedReason::TowerQueue, 1);
                return Err(shed(ShedReason::TowerQueue));
            }
            Err(JobError::Expired) => Err(RowStatus::NotInTime),
            Err(JobError::Panicked(_)) => Err(RowStatus::Failed),
        };
        let mut embedded = embedded.map(Vec::into_iter);
        let row = |(known, content): (&KnownItem, &Content)| match &mut embedded {
            _ if content.vector().is_none() => vector_or_status(content),
            Err(status) => Err(*status),
            Ok(items) => items.next().ok_or(RowStatus::Failed).and_then(|item| self.keep_item(model, known, item)),
        };
        Ok(wanted.iter().zip(contents).map(row).collect())
    }

    fn keep_item(&self, model: &Model, known: &KnownItem, item: Vector) -> Result<Vector, RowStatus> {
        if !item.iter().all(|x| x.is_finite()) {
            events::vector_not_finite("item_tower");
            return Err(RowStatus::Failed);
        }
        self.items.insert(ItemKey { tower: model.tower_digest, text: known.digest }, item.clone());
        Ok(item)
    }
}
