//! Replay: fills the item cache for a model that is about to serve with the items that are hot for the models that serve now.
//!
//! If the encoder stays the same, content embeddings are still cached, under the same keys, and only the item tower has to run for
//! these items, which takes seconds for a whole catalogue. Other texts are encoded again, as warm-up, which yields to traffic. Time may run out, so the hottest items come first. A replay inserts its items into the cache's main queue and
//! uses at most half of the cache: the models that serve now need the rest, and after a rollback their hottest items are
//! still cached.

use super::{Pipeline, warm_up::WarmOutcome};
use crate::{
    bundle::{
        BundleError, Model,
        golden::{Golden, check_tokens},
    },
    cache::vectors::VectorCache,
    content::{Content, EmbedRequest, Encoder, Open},
    domain::{ContentKey, EncoderDigest, IdKey, ItemKey, KnownItem, Priority, TextDigest, Tolerance, Vector},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// The number of items replayed per step.
const CHUNK: usize = 256;
/// A bundle has few golden texts, but they wait behind the encoder's current work.
const GOLDEN_PATIENCE: Duration = Duration::from_secs(60);

/// A placeholder for items whose own id is not known. No text is remembered under it.
const NO_ID: IdKey = IdKey::from_bytes([0; 16]);

/// The result of a replay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReplaySummary {
    /// Hot items that were to be replayed.
    pub n_items: usize,
    /// Items that are now cached for the new model.
    pub n_embedded: usize,
}

impl Pipeline {
    /// Embeds and caches the `hot` items for `model`, as many as can be done before `until`. Calls `progress` with the number
    /// of items done and the total.
    ///
    /// Cancel-safe: queued work continues and its results are cached.
    pub async fn replay(
        &self,
        model: &Model,
        hot: &[KnownItem],
        until: Instant,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> ReplaySummary {
        let mut summary = ReplaySummary { n_items: hot.len(), n_embedded: 0 };
        for (i, chunk) in hot.chunks(CHUNK).enumerate() {
            progress((i * CHUNK) as u64, hot.len() as u64);
            let warming = self.warm_model(model, chunk);
            let Ok(outcomes) = tokio::time::timeout_at(until.into(), warming).await else { break };
            summary.n_embedded += outcomes.iter().filter(|outcome| **outcome != WarmOutcome::Failed).count();
        }
        summary
    }

    /// The items that are hot for the models that serve and not cached for `model`, hottest first. Their number is limited to
    /// what half of the item cache holds, divided by the number of models that are loaded together.
    ///
    /// Scans all keys of the caches, which may take a second.
    pub fn hot_items(&self, model: &Model, n_models: u64) -> Vec<KnownItem> {
        let Ok(models) = self.registry.current() else { return Vec::new() };
        let towers: HashSet<_> = models.all().map(|served| served.tower_digest).collect();
        let keys = self.caches.items.hottest_keys().into_iter();
        let texts = keys.filter(|key| towers.contains(&key.part)).map(|key| key.text);
        let is_cached =
            |text: &TextDigest| self.caches.items.contains(&ItemKey { part: model.tower_digest, text: *text });
        let entry_bytes = VectorCache::<ItemKey>::entry_bytes(model.manifest.item_tower.record_dims().width());
        let max_items = self.caches.items.measure().max_bytes / 2 / n_models.max(1) / entry_bytes;
        let mut seen = HashSet::new();
        let selected = texts.filter(|text| seen.insert(*text) && !is_cached(text)).take(max_items as usize);
        let known = self.caches.known_items.hottest().into_iter();
        let known: HashMap<TextDigest, KnownItem> = known.map(|item| (item.digest, item)).collect();
        // An item whose text is no longer known can still be embedded if its content embedding is cached.
        let item = |digest| known.get(&digest).cloned().unwrap_or(KnownItem { id: NO_ID, digest, text: None });
        selected.map(item).collect()
    }

    /// Checks a running encoder against the golden texts of another bundle. Its embeddings of these texts are usually cached,
    /// so that nothing has to be encoded.
    pub async fn check_encoder(
        &self,
        encoder: &Encoder,
        golden: &Golden,
        tolerance: Tolerance,
    ) -> Result<(), BundleError> {
        check_tokens(golden, encoder.model())?;
        let item = |text| {
            let digest = TextDigest::of(text);
            KnownItem { id: NO_ID, digest, text: Some(Arc::new(text.clone())) }
        };
        let items: Vec<KnownItem> = golden.texts().map(item).collect();
        let until = Instant::now() + GOLDEN_PATIENCE;
        let request = EmbedRequest { items: &items, priority: Priority::WarmUp, until, gate: &Open };
        let contents = self.contents.embed(encoder, request).await;
        let vectors: Vec<&Vector> = contents.iter().filter_map(Content::vector).collect();
        if vectors.len() < items.len() {
            return Err(BundleError::EncoderBusy);
        }
        let found = vectors.into_iter().map(|vector| &vector[..]);
        golden.check_contents(found, tolerance).map(|_report| ())
    }

    /// Caches the content embeddings that a new encoder computed for the golden texts.
    pub fn cache_golden_contents(&self, encoder: EncoderDigest, contents: Vec<(TextDigest, Vector)>) {
        for (text, content) in contents {
            self.caches.contents.insert_ahead(ContentKey { part: encoder, text }, content);
        }
    }
}
