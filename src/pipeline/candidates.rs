//! Candidates to item embeddings: the item cache, then content embeddings and the item tower for what is missing.

use super::{
    Pipeline, Resolved, Rows,
    admission::{Deadlines, shed},
    nothing_ready, vector_or_status,
};
use crate::{
    bundle::Model,
    cache::vectors::VectorCache,
    content::{Content, EmbedRequest},
    domain::{
        ItemKey, KnownItem, Matrix, Priority, RowStatus, TextDigest, Vector, all_finite,
        error::{Error, ShedReason},
    },
    inference::{GraphError, JobError},
    telemetry::events::{self, Lookups},
    towers::{TowerGraphs, item_tower},
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

/// The candidates' item embeddings.
pub(super) struct Candidates {
    /// One a candidate, in order.
    pub(super) statuses: Vec<RowStatus>,
    /// `[n, E]`; a row that is not OK is all zeros.
    pub(super) items: Matrix,
}

impl Candidates {
    fn put(&mut self, row: usize, item: &[f32]) {
        self.items.row_mut(row).copy_from_slice(item);
        self.statuses[row] = RowStatus::Ok;
    }
}

impl Pipeline {
    /// The item embedding of each candidate. An error where not one row is ready and one might have been, and where the
    /// scoring queue is full, as then nothing can be scored either.
    pub(super) async fn embed_candidates(
        &self,
        model: &Model,
        resolved: Resolved,
        deadlines: Deadlines,
    ) -> Result<Candidates, Error> {
        let start = Instant::now();
        let (mut candidates, missing) = self.look_up(model, &resolved);
        let mut n_shed = 0;
        if !missing.is_empty() {
            let (items, places) = unique(missing.iter().filter_map(|row| resolved[*row].as_ref().ok()));
            let request = EmbedRequest { items: &items, priority: Priority::Request, until: deadlines.encode_by };
            let contents = self.contents.embed(&model.encoder, request).await;
            events::stage_finished("content", start);
            n_shed = contents.iter().filter(|content| matches!(content, Content::Shed)).count();
            let request = EmbedRequest { until: deadlines.embed_by, ..request };
            let embedded = self.run_item_tower(model, request, &contents).await?;
            for (row, place) in missing.into_iter().zip(places) {
                match &embedded[place] {
                    Ok(item) => candidates.put(row, item),
                    Err(status) => candidates.statuses[row] = *status,
                }
            }
        }
        let is = |status: RowStatus| candidates.statuses.contains(&status);
        if !is(RowStatus::Ok) && (n_shed > 0 || is(RowStatus::NotInTime)) {
            return Err(nothing_ready(n_shed));
        }
        Ok(candidates)
    }

    /// What is cached, copied straight to where the CVR graph reads it, and the rows that are not.
    fn look_up(&self, model: &Model, resolved: &Resolved) -> (Candidates, Vec<usize>) {
        let mut keys = Vec::with_capacity(resolved.len());
        let mut rows = Vec::with_capacity(resolved.len());
        let mut statuses = vec![RowStatus::Failed; resolved.len()];
        for (row, known) in resolved.iter().enumerate() {
            match known {
                Ok(known) => {
                    keys.push(ItemKey { part: model.tower_digest, text: known.digest });
                    rows.push(row);
                }
                Err(status) => statuses[row] = *status,
            }
        }
        let mut candidates =
            Candidates { statuses, items: Matrix::zeros(resolved.len(), model.manifest.item_tower.dim) };
        let mut missing = Vec::new();
        self.caches.items.read_many(&keys, |i, item| match item {
            Some(item) => candidates.put(rows[i], item),
            None => missing.push(rows[i]),
        });
        let n_misses = missing.len() as u64;
        let lookups = Lookups { n_hits: keys.len() as u64 - n_misses, n_misses, n_coalesced: 0 };
        events::cache_looked_up(self.caches.items.name().as_str(), lookups);
        (candidates, missing)
    }

    /// The item embeddings of the items of `request` that have a content embedding (`contents`, one per item).
    ///
    /// The inference thread caches them, so that a result that comes too late for its caller is there for the next.
    pub(super) async fn run_item_tower(
        &self,
        model: &Model,
        request: EmbedRequest<'_>,
        contents: &[Content],
    ) -> Result<Rows, Error> {
        let EmbedRequest { items, priority, until } = request;
        let with_content = items.iter().zip(contents).filter_map(|(known, content)| {
            Some((ItemKey { part: model.tower_digest, text: known.digest }, content.vector()?.clone()))
        });
        let (keys, inputs): (Vec<ItemKey>, Vec<Vector>) = with_content.unzip();
        if inputs.is_empty() {
            return Ok(contents.iter().map(vector_or_status).collect());
        }
        let (dim, cache) = (model.manifest.item_tower.dim, self.caches.items.clone());
        let job = move |graphs: &mut TowerGraphs| {
            let start = Instant::now();
            let embedded = item_tower::embed(graphs, &inputs, dim)?;
            events::stage_finished("item_tower", start);
            for batch in inputs.chunks(item_tower::BATCH) {
                events::batch_ran("item_tower", batch.len());
            }
            Ok(keys.into_iter().zip(embedded).map(|(key, item)| keep(&cache, key, item, priority)).collect::<Rows>())
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

fn keep(cache: &VectorCache<ItemKey>, key: ItemKey, item: Vector, priority: Priority) -> Result<Vector, RowStatus> {
    if !all_finite(&item) {
        events::vector_not_finite("item_tower");
        return Err(RowStatus::Failed);
    }
    match priority {
        Priority::Request => cache.insert(key, item.clone()),
        Priority::WarmUp => cache.insert_ahead(key, item.clone()),
    }
    Ok(item)
}
