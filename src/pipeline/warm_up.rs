//! Warm-up: texts arrive ahead of traffic, are remembered under their ids, and are encoded and embedded for every model.

use super::{Pipeline, candidates::Distinct};
use crate::{
    bundle::Model,
    content::{Content, EmbedRequest, Open},
    domain::{Item, ItemKey, KnownItem, Priority, WarmSummary, error::Error},
};
use std::time::{Duration, Instant};

/// The number of items that one warm-up call processes at a time. It keeps the models that serve until they are done, and a swap
/// waits for whoever keeps models.
const CHUNK: usize = 64;
/// Warm-up has no deadline of its own; this only keeps a stuck encoder from blocking a stream forever.
const PATIENCE: Duration = Duration::from_secs(3600);

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
    /// Remembers the texts of a warm-up, each as the newest text for its id. [`Pipeline::warm`] encodes them.
    pub fn remember(&self, items: Vec<Item>) -> WarmUp {
        let n_items = items.len();
        let is_valid = |item: &Item| item.text.is_some() && !item.id.is_empty();
        let resolved = self.caches.known_items.resolve(items.into_iter().filter(is_valid).collect(), Priority::WarmUp);
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
        let Distinct { items, positions } = Distinct::of(known.iter());
        let until = Instant::now() + PATIENCE;
        let request = EmbedRequest { items: &items, priority: Priority::WarmUp, until, gate: &Open };
        let contents = self.contents.embed(&model.encoder, request).await;
        let mut is_embedded = Vec::with_capacity(items.len());
        let mut missing = Vec::new();
        let (mut missing_items, mut missing_contents) = (Vec::new(), Vec::new());
        for (i, item) in items.iter().enumerate() {
            let is_cached = self.caches.items.contains(&ItemKey { part: model.tower_digest, text: item.digest });
            is_embedded.push(is_cached);
            if !is_cached {
                missing.push(i);
                missing_items.push(item.clone());
                missing_contents.push(contents[i].clone());
            }
        }
        let request = EmbedRequest { items: &missing_items, priority: Priority::WarmUp, until, gate: &Open };
        if let Ok(rows) = self.run_item_tower(model, request, &missing_contents).await {
            for (i, row) in missing.into_iter().zip(rows) {
                is_embedded[i] = row.is_ok();
            }
        }
        let outcome = |i: usize| match &contents[i] {
            _ if !is_embedded[i] => WarmOutcome::Failed,
            // A joined item is counted by the call that encodes it.
            Content::Cached(_) | Content::Joined(_) => WarmOutcome::Cached,
            Content::Encoded(_) => WarmOutcome::Encoded,
            _ => WarmOutcome::Failed,
        };
        positions.into_iter().map(outcome).collect()
    }
}
