//! Warm-up: texts arrive ahead of traffic, are remembered under their ids, and are encoded and embedded for every model.

use super::{Pipeline, candidates::unique};
use crate::{
    bundle::Model,
    content::{Content, EmbedRequest},
    domain::{Item, ItemKey, KnownItem, Priority, WarmSummary, error::Error},
};
use std::time::{Duration, Instant};

/// Items of a warm-up stream that are under way at once.
const CHUNK: usize = 256;
/// Warm-up has no deadline of its own; this only keeps a stuck encoder from holding a stream for ever.
const PATIENCE: Duration = Duration::from_secs(3600);

/// Items of a warm-up whose texts are remembered and that wait to be encoded.
#[derive(Debug)]
pub struct WarmUp {
    /// How many items were sent.
    n_items: usize,
    /// Those that can be encoded.
    known: Vec<KnownItem>,
}

/// How warm-up left an item. The order counts: of several models, the last of these outcomes is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Warmth {
    /// It was cached already, or another call is encoding it.
    Cached,
    /// It was encoded just now.
    Encoded,
    /// It could not be embedded.
    Failed,
}

impl Pipeline {
    /// Remembers the texts of a warm-up, each as the newest text of its id. [`Pipeline::warm`] encodes them.
    pub fn remember(&self, items: Vec<Item>) -> WarmUp {
        let n_items = items.len();
        let usable = |item: &Item| item.text.is_some() && !item.id.is_empty();
        let resolved = self.caches.known_items.resolve(items.into_iter().filter(usable).collect(), Priority::WarmUp);
        WarmUp { n_items, known: resolved.into_iter().flatten().collect() }
    }

    /// Encodes and caches the items of a warm-up for every model that serves.
    ///
    /// Cancel-safe: encoding that was queued goes on, and its result is cached.
    pub async fn warm(&self, warm_up: WarmUp) -> Result<WarmSummary, Error> {
        let snapshot = self.registry.current()?;
        let WarmUp { n_items, known } = warm_up;
        let n_invalid = (n_items - known.len()) as u64;
        let mut summary = WarmSummary { n_items: n_items as u64, n_invalid, ..WarmSummary::default() };
        for chunk in known.chunks(CHUNK) {
            let mut outcomes = vec![Warmth::Cached; chunk.len()];
            for model in snapshot.all() {
                let of_model = self.warm_for(model, chunk).await;
                for (outcome, new) in outcomes.iter_mut().zip(of_model) {
                    *outcome = new.max(*outcome);
                }
            }
            for outcome in outcomes {
                match outcome {
                    Warmth::Cached => summary.n_cached += 1,
                    Warmth::Encoded => summary.n_encoded += 1,
                    Warmth::Failed => summary.n_failed += 1,
                }
            }
        }
        Ok(summary)
    }

    /// Fills the caches of one model; returns how each item was left.
    pub(super) async fn warm_for(&self, model: &Model, known: &[KnownItem]) -> Vec<Warmth> {
        let (items, places) = unique(known.iter());
        let until = Instant::now() + PATIENCE;
        let request = EmbedRequest { items: &items, priority: Priority::WarmUp, until };
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
        let request = EmbedRequest { items: &missing_items, priority: Priority::WarmUp, until };
        if let Ok(rows) = self.run_item_tower(model, request, &missing_contents).await {
            for (i, row) in missing.into_iter().zip(rows) {
                is_embedded[i] = row.is_ok();
            }
        }
        let warmth = |i: usize| match &contents[i] {
            _ if !is_embedded[i] => Warmth::Failed,
            // The chunk or call that is encoding it counts it.
            Content::Cached(_) | Content::Joined(_) => Warmth::Cached,
            Content::Encoded(_) => Warmth::Encoded,
            _ => Warmth::Failed,
        };
        places.into_iter().map(warmth).collect()
    }
}
