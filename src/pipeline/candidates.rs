//! Candidates to item embeddings: the item cache, then content embeddings and the item tower for what is missing.

use super::{Pipeline, Resolved, Rows, nothing_ready, vector_or_status};
use crate::{
    admission::{Deadlines, shed},
    bundle::Model,
    content::{Content, KnownItem, batcher::Priority},
    domain::{RowStatus, Vector},
    error::{Error, ShedReason},
    inference::{GraphError, JobError},
    item_text::TextDigest,
    telemetry::events::{self, Lookups},
    towers::{ItemKey, TowerGraphs, item_tower},
    vector_cache::VectorCache,
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
    /// The item embedding of each candidate. An error where not one row is ready and one might have been, and where the
    /// scoring queue is full, as then nothing can be scored either.
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
            let embedded = self.run_item_tower(model, &wanted, &contents, deadlines.embed_by).await?;
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

    /// The item embeddings of those of `wanted` that have a content embedding.
    ///
    /// They are cached where they are computed: a result that comes too late for its caller is there for the next.
    pub(super) async fn run_item_tower(
        &self,
        model: &Model,
        wanted: &[KnownItem],
        contents: &[Content],
        until: Instant,
    ) -> Result<Rows, Error> {
        let with_content = wanted.iter().zip(contents).filter_map(|(known, content)| {
            Some((ItemKey { tower: model.tower_digest, text: known.digest }, content.vector()?.clone()))
        });
        let (keys, inputs): (Vec<ItemKey>, Vec<Vector>) = with_content.unzip();
        if inputs.is_empty() {
            return Ok(contents.iter().map(vector_or_status).collect());
        }
        let (dim, items) = (model.manifest.item_tower.dim, self.items.clone());
        let job = move |graphs: &mut TowerGraphs| {
            let start = Instant::now();
            let embedded = item_tower::embed(graphs, &inputs, dim)?;
            events::stage_finished("item_tower", start);
            inputs.chunks(item_tower::BATCH).for_each(|batch| events::batch_ran("item_tower", batch.len()));
            Ok(keys.into_iter().zip(embedded).map(|(key, item)| keep(&items, key, item)).collect::<Rows>())
        };
        let embedded: Result<Rows, RowStatus> = match model.towers.run(until, job).await {
            Ok(Ok(rows)) => Ok(rows),
            Ok(Err(error)) => {
                let error: GraphError = error;
                events::item_tower_failed(contents.len(), &error);
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
        let row = |content: &Content| match &mut embedded {
            _ if content.vector().is_none() => vector_or_status(content),
            Err(status) => Err(*status),
            Ok(rows) => rows.next().unwrap_or(Err(RowStatus::Failed)),
        };
        Ok(contents.iter().map(row).collect())
    }
}

fn keep(items: &VectorCache<ItemKey>, key: ItemKey, item: Vector) -> Result<Vector, RowStatus> {
    if !item.iter().all(|x| x.is_finite()) {
        events::vector_not_finite("item_tower");
        return Err(RowStatus::Failed);
    }
    items.insert(key, item.clone());
    Ok(item)
}
