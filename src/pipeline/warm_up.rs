//! Warm-up: texts arrive ahead of traffic, are remembered under their ids, and are encoded and embedded for every model.

use super::{Pipeline, items::Distinct};
use crate::{
    bundle::Model,
    cache::known_items::HashedItem,
    content::{Content, EmbedRequest, Open},
    domain::{Item, ItemKey, KnownItem, Priority, RowStatus, WarmSummary, error::Error},
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// The number of items that one warm-up call processes at a time. It keeps the models that serve until they are done, and a swap
/// waits for whoever keeps models.
const CHUNK: usize = 64;
/// Warm-up has no deadline of its own; this only keeps a stuck encoder from blocking a stream forever.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Items of a warm-up that borrow nothing from their message any more.
#[derive(Debug)]
pub struct PreparedItems {
    /// The number of items sent.
    n_items: usize,
    /// Those with an id and a text.
    valid: Vec<HashedItem>,
}

/// Items of a warm-up: their texts are remembered, and they wait to be encoded.
#[derive(Debug)]
pub struct WarmUp {
    /// The number of items sent.
    n_items: usize,
    /// The items that can be encoded.
    known: Vec<KnownItem>,
}

/// The outcome of warming one item. The order of the variants matters: across models, the greatest outcome is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum WarmOutcome {
    /// It was cached already, or another call encoded it.
    Cached,
    /// This call encoded it.
    Encoded,
    /// It could not be embedded.
    Failed,
}

impl Pipeline {
    /// Takes from the items of a warm-up what is needed once their message is gone; like [`Pipeline::prepare`].
    pub fn prepare_items(&self, items: Vec<Item<'_>>) -> PreparedItems {
        let n_items = items.len();
        let is_valid = |item: &Item<'_>| item.text.is_some() && !item.id.is_empty();
        PreparedItems { n_items, valid: self.caches.known_items.hash(items.into_iter().filter(is_valid).collect()) }
    }

    /// Remembers the texts of a warm-up, each as the newest text for its id. [`Pipeline::warm`] encodes them.
    pub fn remember(&self, items: PreparedItems) -> WarmUp {
        let PreparedItems { n_items, valid } = items;
        let [resolved] = self.caches.known_items.resolve_lists([valid], Priority::WarmUp);
        WarmUp { n_items, known: resolved.into_iter().flatten().collect() }
    }

    /// Encodes and caches the items of a warm-up for every model that serves.
    ///
    /// Cancel-safe: queued encoding continues and its result is cached.
    pub async fn warm(&self, warm_up: WarmUp) -> Result<WarmSummary, Error> {
        let WarmUp { n_items, known } = warm_up;
        let n_invalid = (n_items - known.len()) as u64;
        let mut summary = WarmSummary { n_items: n_items as u64, n_invalid, ..WarmSummary::default() };
        for chunk in known.chunks(CHUNK) {
            let models = self.registry.current()?;
            let mut outcomes = vec![WarmOutcome::Cached; chunk.len()];
            for model in models.all() {
                let model_outcomes = self.warm_model(model, chunk).await;
                for (outcome, model_outcome) in outcomes.iter_mut().zip(model_outcomes) {
                    *outcome = model_outcome.max(*outcome);
                }
            }
            for outcome in outcomes {
                match outcome {
                    WarmOutcome::Cached => summary.n_cached += 1,
                    WarmOutcome::Encoded => summary.n_encoded += 1,
                    WarmOutcome::Failed => summary.n_failed += 1,
                }
            }
        }
        Ok(summary)
    }

    /// Fills the caches for one model; returns one outcome per item.
    pub(super) async fn warm_model(&self, model: &Model, known: &[KnownItem]) -> Vec<WarmOutcome> {
        let is_missing =
            |item: &&KnownItem| !self.caches.items.contains(&ItemKey { part: model.tower_digest, text: item.digest });
        let missing = Distinct::of(known.iter().filter(is_missing));
        let until = Instant::now() + PATIENCE;
        let request = EmbedRequest { items: &missing.items, priority: Priority::WarmUp, until, gate: &Open };
        let contents = self.contents.embed(&model.encoder, request).await;
        let records = self.run_item_tower(model, request, &contents).await;
        let records = records.unwrap_or_else(|_shed| vec![Err(RowStatus::Shed); contents.len()]);
        let mut computed = HashMap::with_capacity(missing.items.len());
        for ((item, content), record) in missing.items.iter().zip(&contents).zip(&records) {
            let outcome = match content {
                _ if record.is_err() => WarmOutcome::Failed,
                // A joined item is counted by the call that encodes it.
                Content::Cached(_) | Content::Joined(_) => WarmOutcome::Cached,
                Content::Encoded(_) => WarmOutcome::Encoded,
                _ => WarmOutcome::Failed,
            };
            computed.insert(item.digest, outcome);
        }
        known.iter().map(|item| computed.get(&item.digest).copied().unwrap_or(WarmOutcome::Cached)).collect()
    }
}
