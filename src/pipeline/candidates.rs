//! From candidates to item embeddings: the item cache, then content embeddings and the item tower for those that are missing.

use super::{Pipeline, Resolved, Rows, Waits, admission::shed, no_row_ready, vector_or_status};
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

/// The distinct texts of a sequence of items.
pub(super) struct Distinct {
    /// The first item with each text, in order of appearance.
    pub(super) items: Vec<KnownItem>,
    /// For each item of the sequence, the index of its text in `items`.
    pub(super) positions: Vec<usize>,
}

impl Distinct {
    pub(super) fn of<'a>(all: impl Iterator<Item = &'a KnownItem>) -> Self {
        let mut position_of: HashMap<TextDigest, usize> = HashMap::new();
        let mut items: Vec<KnownItem> = Vec::new();
        let mut positions = Vec::new();
        for item in all {
            let position = *position_of.entry(item.digest).or_insert(items.len());
            if position == items.len() {
                items.push(item.clone());
            }
            positions.push(position);
        }
        Distinct { items, positions }
    }
}

/// The candidates' item embeddings.
pub(super) struct Candidates {
    /// One status per candidate, in order.
    pub(super) statuses: Vec<RowStatus>,
    /// `[n, E]`; a row that is not OK is all zeros.
    pub(super) items: Matrix,
}

impl Candidates {
    fn set(&mut self, row: usize, item: &[f32]) {
        self.items.row_mut(row).copy_from_slice(item);
        self.statuses[row] = RowStatus::Ok;
    }
}

impl Pipeline {
    /// Embeds each candidate. Fails if no row is ready and at least one was shed or late. Also fails if the scoring queue
    /// is full, because then nothing can be scored.
    pub(super) async fn embed_candidates(
        &self,
        model: &Model,
        resolved: Resolved,
        waits: Waits<'_>,
    ) -> Result<Candidates, Error> {
        let start = Instant::now();
        let (mut candidates, missing) = self.look_up(model, &resolved);
        let mut shed_for = None;
        if !missing.is_empty() {
            let Distinct { items, positions } =
                Distinct::of(missing.iter().filter_map(|row| resolved[*row].as_ref().ok()));
            let request = EmbedRequest {
                items: &items,
                priority: Priority::Request,
                until: waits.deadlines.encode_by,
                gate: waits.gate,
            };
            let contents = self.contents.embed(&model.encoder, request).await;
            events::stage_finished("content", start);
            shed_for = contents.iter().find_map(Content::shed_reason);
            let request = EmbedRequest { until: waits.deadlines.embed_by, ..request };
            let embedded = self.run_item_tower(model, request, &contents).await?;
            for (row, position) in missing.into_iter().zip(positions) {
                match &embedded[position] {
                    Ok(item) => candidates.set(row, item),
                    Err(status) => candidates.statuses[row] = *status,
                }
            }
        }
        no_row_ready(&candidates.statuses, shed_for).map_or(Ok(candidates), Err)
    }

    /// Copies cached item embeddings straight into the matrix that the CVR graph reads, and returns the rows that are not
    /// cached.
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
            Some(item) => candidates.set(rows[i], item),
            None => missing.push(rows[i]),
        });
        let n_misses = missing.len() as u64;
        let lookups = Lookups { n_hits: keys.len() as u64 - n_misses, n_misses, n_coalesced: 0 };
        events::cache_looked_up(self.caches.items.name().as_str(), lookups);
        (candidates, missing)
    }

    /// Runs the item tower for the items of `request` that have a content embedding (`contents` has one entry per item).
    /// Returns one row per item.
    ///
    /// The inference thread caches the results, so that a result that is too late for this caller serves the next one.
    pub(super) async fn run_item_tower(
        &self,
        model: &Model,
        request: EmbedRequest<'_>,
        contents: &[Content],
    ) -> Result<Rows, Error> {
        let EmbedRequest { items, priority, until, .. } = request;
        let with_content = items.iter().zip(contents).filter_map(|(known, content)| {
            Some((ItemKey { part: model.tower_digest, text: known.digest }, content.vector()?.clone()))
        });
        let (keys, inputs): (Vec<ItemKey>, Vec<Vector>) = with_content.unzip();
        if inputs.is_empty() {
            return Ok(contents.iter().map(vector_or_status).collect());
        }
        let n_inputs = inputs.len();
        let (dim, cache) = (model.manifest.item_tower.dim, self.caches.items.clone());
        let job = move |graphs: &mut TowerGraphs| -> Result<Rows, GraphError> {
            let start = Instant::now();
            let embedded = item_tower::embed(graphs, &inputs, dim)?;
            events::stage_finished("item_tower", start);
            for batch in inputs.chunks(item_tower::BATCH) {
                events::batch_ran("item_tower", batch.len());
            }
            Ok(keys.into_iter().zip(embedded).map(|(key, item)| cache_item(&cache, key, item, priority)).collect())
        };
        let all_rows = |status: RowStatus| vec![Err(status); n_inputs];
        let embedded: Rows = match model.towers.run(until, job).await {
            Ok(Ok(rows)) => rows,
            Ok(Err(error)) => {
                events::item_tower_failed(contents.len(), &error);
                all_rows(RowStatus::Failed)
            }
            Err(JobError::QueueFull) => {
                events::shed(ShedReason::TowerQueue, 1);
                return Err(shed(ShedReason::TowerQueue));
            }
            Err(JobError::Expired) => all_rows(RowStatus::NotInTime),
            Err(JobError::Panicked(_)) => all_rows(RowStatus::Failed),
        };
        let mut embedded = embedded.into_iter();
        let mut rows = Vec::with_capacity(contents.len());
        for content in contents {
            let has_content = content.vector().is_some();
            rows.push(if has_content {
                embedded.next().unwrap_or(Err(RowStatus::Failed))
            } else {
                vector_or_status(content)
            });
        }
        Ok(rows)
    }
}

/// Caches an item embedding and returns it; one that is not finite fails its row and is not cached.
fn cache_item(
    cache: &VectorCache<ItemKey>,
    key: ItemKey,
    item: Vector,
    priority: Priority,
) -> Result<Vector, RowStatus> {
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
