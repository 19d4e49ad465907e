//! From a page's items to their records: the item cache, then content embeddings and the item tower for those that are missing.
//!
//! History items and candidates go the same way. The user tower reads one part of a record, the CVR graph the other.

use super::{Page, Pipeline, Records, Waits, admission::shed, no_row_ready, rows::Rows, user::User, vector_or_status};
use crate::{
    bundle::Model,
    cache::vectors::VectorCache,
    content::{Content, EmbedRequest},
    domain::{
        ItemKey, KnownItem, Priority, RowStatus, TextDigest, Vector, all_finite,
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

/// What a request reads of its page's items. A *place* counts all of them: first the history, then the candidates.
pub(super) struct PageItems {
    /// `[l, D]`: what the user tower reads.
    pub(super) history: Rows,
    /// `[n, E]`: item embeddings.
    pub(super) candidates: Rows,
}

impl PageItems {
    fn new(model: &Model, page: &Page, user: &User) -> Self {
        let dims = model.manifest.item_tower.record_dims();
        let history = match user.cached {
            Some(_) => Rows::without_values(&page.history),
            None => Rows::new(&page.history, dims.item..dims.width()),
        };
        PageItems { history, candidates: Rows::new(&page.candidates, 0..dims.item) }
    }

    fn rows_of(&mut self, place: usize) -> (&mut Rows, usize) {
        let n_history = self.history.statuses.len();
        match place.checked_sub(n_history) {
            Some(candidate) => (&mut self.candidates, candidate),
            None => (&mut self.history, place),
        }
    }

    fn set(&mut self, place: usize, record: &[f32]) {
        let (rows, row) = self.rows_of(place);
        rows.set(row, record);
    }

    fn set_status(&mut self, place: usize, status: RowStatus) {
        let (rows, row) = self.rows_of(place);
        rows.statuses[row] = status;
    }
}

impl Pipeline {
    /// Finds the record of each item of `page`, except those of a history whose `user` is cached. Fails if no candidate is ready
    /// and at least one was shed or late. Also fails if the scoring queue is full, because then nothing can be scored.
    pub(super) async fn embed_items(
        &self,
        model: &Model,
        page: &Page,
        user: &User,
        waits: Waits<'_>,
    ) -> Result<PageItems, Error> {
        let start = Instant::now();
        let mut items = PageItems::new(model, page, user);
        let first_place = if user.cached.is_some() { page.history.len() } else { 0 };
        let missing = self.look_up(model, page, first_place, &mut items);
        let embedded =
            if missing.is_empty() { Ok(None) } else { self.embed_missing(model, &missing, &mut items, waits).await };
        events::stage_finished("items", start);
        let shed_for = embedded?;
        no_row_ready(&items.candidates.statuses, shed_for).map_or(Ok(items), Err)
    }

    /// Copies the cached records to where the graphs read them, from `first_place` on, and returns the items that are not cached
    /// with their places.
    fn look_up<'a>(
        &self,
        model: &Model,
        page: &'a Page,
        first_place: usize,
        items: &mut PageItems,
    ) -> Vec<(usize, &'a KnownItem)> {
        let n_items = page.history.len() + page.candidates.len();
        let mut keys = Vec::with_capacity(n_items);
        let mut known_items = Vec::with_capacity(n_items);
        for (place, item) in page.history.iter().chain(&page.candidates).enumerate().skip(first_place) {
            if let Ok(known) = item {
                keys.push(ItemKey { part: model.tower_digest, text: known.digest });
                known_items.push((place, known));
            }
        }
        let mut missing = Vec::new();
        self.caches.items.read_many(&keys, |i, record| match record {
            Some(record) => items.set(known_items[i].0, record),
            None => missing.push(known_items[i]),
        });
        items.history.complete();
        items.candidates.complete();
        let n_misses = missing.len() as u64;
        let lookups = Lookups { n_hits: keys.len() as u64 - n_misses, n_misses, n_coalesced: 0 };
        events::cache_looked_up(self.caches.items.name().as_str(), lookups);
        missing
    }

    /// Computes the records of the items in `missing`, each text once. Returns why candidates were shed, if any were.
    async fn embed_missing(
        &self,
        model: &Model,
        missing: &[(usize, &KnownItem)],
        items: &mut PageItems,
        waits: Waits<'_>,
    ) -> Result<Option<ShedReason>, Error> {
        let start = Instant::now();
        let distinct = Distinct::of(missing.iter().map(|(_place, known)| *known));
        let request = EmbedRequest {
            items: &distinct.items,
            priority: Priority::Request,
            until: waits.deadlines.encode_by,
            gate: waits.gate,
        };
        let contents = self.contents.embed(&model.encoder, request).await;
        events::stage_finished("content", start);
        let request = EmbedRequest { until: waits.deadlines.embed_by, ..request };
        let records = self.run_item_tower(model, request, &contents).await?;
        let n_history = items.history.statuses.len();
        let mut shed_for = None;
        for ((place, _known), position) in missing.iter().zip(distinct.positions) {
            match &records[position] {
                Ok(record) => items.set(*place, record),
                Err(status) => items.set_status(*place, *status),
            }
            if *place >= n_history {
                shed_for = shed_for.or(contents[position].shed_reason());
            }
        }
        Ok(shed_for)
    }

    /// Runs the item tower for the items of `request` that have a content embedding (`contents` has one entry per item).
    /// Returns one record per item.
    ///
    /// The inference thread caches the records, so that a record that is too late for this caller serves the next one.
    pub(super) async fn run_item_tower(
        &self,
        model: &Model,
        request: EmbedRequest<'_>,
        contents: &[Content],
    ) -> Result<Records, Error> {
        let EmbedRequest { items, priority, until, .. } = request;
        let with_content = items.iter().zip(contents).filter_map(|(known, content)| {
            Some((ItemKey { part: model.tower_digest, text: known.digest }, content.vector()?.clone()))
        });
        let (keys, inputs): (Vec<ItemKey>, Vec<Vector>) = with_content.unzip();
        if inputs.is_empty() {
            return Ok(contents.iter().map(vector_or_status).collect());
        }
        let n_inputs = inputs.len();
        let (dims, cache) = (model.manifest.item_tower.record_dims(), self.caches.items.clone());
        let job = move |graphs: &mut TowerGraphs| -> Result<Records, GraphError> {
            let start = Instant::now();
            let records = item_tower::embed(graphs, &inputs, dims)?;
            events::stage_finished("item_tower", start);
            for batch in inputs.chunks(item_tower::BATCH) {
                events::batch_ran("item_tower", batch.len());
            }
            Ok(keys.into_iter().zip(records).map(|(key, record)| cache_record(&cache, key, record, priority)).collect())
        };
        let all_rows = |status: RowStatus| vec![Err(status); n_inputs];
        let embedded: Records = match model.towers.run(until, job).await {
            Ok(Ok(records)) => records,
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
        let mut records = Vec::with_capacity(contents.len());
        for content in contents {
            let has_content = content.vector().is_some();
            records.push(if has_content {
                embedded.next().unwrap_or(Err(RowStatus::Failed))
            } else {
                vector_or_status(content)
            });
        }
        Ok(records)
    }
}

/// Caches a record and returns it; one that is not finite fails its row and is not cached.
fn cache_record(
    cache: &VectorCache<ItemKey>,
    key: ItemKey,
    record: Vector,
    priority: Priority,
) -> Result<Vector, RowStatus> {
    if !all_finite(&record) {
        events::vector_not_finite("item_tower");
        return Err(RowStatus::Failed);
    }
    match priority {
        Priority::Request => cache.insert(key, record.clone()),
        Priority::WarmUp => cache.insert_ahead(key, record.clone()),
    }
    Ok(record)
}
