//! Replay: fills the item cache of a model that is about to serve from what is hot for the models that serve now.
//!
//! With the same encoder every content embedding is there already, under the same key, and only the item tower has to run:
//! seconds for a whole catalogue. With a new encoder the hottest texts are encoded again, as warm-up, which yields to
//! traffic; how far that gets is a question of time, so the hottest come first. What a replay puts in starts in the cache's
//! main queue, and it takes half of the cache's room at most: the models that serve now go on needing the rest, and a
//! rollback finds what was hottest.

use super::{Pipeline, warm_up::Warmth};
use crate::{
    bundle::{
        BundleError, Model,
        golden::{Golden, check_tokens},
    },
    cache::vectors::VectorCache,
    content::{Content, EmbedRequest, Encoder},
    domain::{ContentKey, EncoderDigest, IdKey, ItemKey, KnownItem, Priority, TextDigest, Vector},
};
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

/// Items of one step.
const CHUNK: usize = 256;
/// The golden texts of a bundle are few, but they wait behind whatever the encoder is at.
const GOLDEN_PATIENCE: Duration = Duration::from_secs(60);

/// The id of items whose text is at hand, so that it need not be looked up.
const NO_ID: IdKey = IdKey::from_bytes([0; 16]);

/// What a replay did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Items that were hot, as far as there is room for them.
    pub n_items: usize,
    /// Those that are cached for the new model now.
    pub n_embedded: usize,
}

impl Pipeline {
    /// Caches for `model` as much of what is `hot` as can be done until then. `progress` is told how many items of how many are
    /// done.
    ///
    /// Cancel-safe: what was queued goes on and is cached.
    pub async fn replay(
        &self,
        model: &Model,
        hot: &[KnownItem],
        until: Instant,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Replayed {
        let mut replayed = Replayed { n_items: hot.len(), n_embedded: 0 };
        for (i, chunk) in hot.chunks(CHUNK).enumerate() {
            progress((i * CHUNK) as u64, hot.len() as u64);
            let Ok(warmths) = tokio::time::timeout_at(until.into(), self.warm_for(model, chunk)).await else { break };
            replayed.n_embedded += warmths.iter().filter(|warmth| **warmth != Warmth::Failed).count();
        }
        replayed
    }

    /// What is hot for the models that serve and not there for `model`, hottest first; as much as half of the item cache holds, divided
    /// by the models that are new together.
    ///
    /// Looks at all keys of the caches: call it where a second does not matter.
    pub fn hot_items(&self, model: &Model, n_models: u64) -> Vec<KnownItem> {
        let Ok(snapshot) = self.registry.current() else { return Vec::new() };
        let towers: HashSet<_> = snapshot.all().map(|served| served.tower_digest).collect();
        let encoders: HashSet<_> = snapshot.all().map(|served| served.encoder.digest()).collect();
        let items = self.caches.items.hottest_keys().into_iter().filter(|key| towers.contains(&key.part));
        let items: Vec<TextDigest> = items.map(|key| key.text).collect();
        let texts = if encoders.contains(&model.encoder.digest()) {
            items
        } else {
            // Histories are read as content alone.
            let contents = self.caches.contents.hottest_keys().into_iter();
            let contents = contents.filter(|key| encoders.contains(&key.part)).map(|key| key.text);
            alternate(items, contents.collect())
        };
        let is_there =
            |text: &TextDigest| self.caches.items.contains(&ItemKey { part: model.tower_digest, text: *text });
        let entry_bytes = VectorCache::<ItemKey>::entry_bytes(model.manifest.item_tower.dim);
        let room = self.caches.items.measure().max_bytes / 2 / n_models.max(1) / entry_bytes;
        let mut seen = HashSet::new();
        let wanted = texts.into_iter().filter(|text| seen.insert(*text) && !is_there(text)).take(room as usize);
        let known = self.caches.known_items.hottest().into_iter();
        let known: HashMap<TextDigest, KnownItem> = known.map(|item| (item.digest, item)).collect();
        // The text is needed where its content embedding is not cached; the id is not.
        let item = |digest| known.get(&digest).cloned().unwrap_or(KnownItem { id: NO_ID, digest, text: None });
        wanted.map(item).collect()
    }

    /// Holds an encoder that runs to the golden texts of another bundle. What it gave for them before is cached, so that
    /// mostly nothing is encoded.
    pub async fn check_encoder(&self, encoder: &Encoder, golden: &Golden) -> Result<(), BundleError> {
        check_tokens(golden, encoder.model())?;
        let item = |text| {
            let digest = TextDigest::of(text);
            KnownItem { id: NO_ID, digest, text: Some(Arc::new(text.clone())) }
        };
        let items: Vec<KnownItem> = golden.texts().map(item).collect();
        let until = Instant::now() + GOLDEN_PATIENCE;
        let embed = self.contents.embed(encoder, EmbedRequest { items: &items, priority: Priority::WarmUp, until });
        // The encoder's queue may have no room for that long.
        let contents = tokio::time::timeout_at(until.into(), embed).await.unwrap_or_default();
        let found: Vec<&Vector> = contents.iter().filter_map(Content::vector).collect();
        if found.len() < items.len() {
            return Err(BundleError::EncoderBusy);
        }
        golden.check_contents(found.into_iter().map(|vector| &vector[..])).map(|_report| ())
    }

    /// Caches what a new encoder gave for the golden texts.
    pub fn keep_golden(&self, encoder: EncoderDigest, contents: Vec<(TextDigest, Vector)>) {
        for (text, content) in contents {
            self.caches.contents.insert_ahead(ContentKey { part: encoder, text }, content);
        }
    }
}

/// One of each in turn.
fn alternate<T>(a: Vec<T>, b: Vec<T>) -> Vec<T> {
    let mut both = Vec::with_capacity(a.len() + b.len());
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    loop {
        let pair = [a.next(), b.next()];
        if pair.iter().all(Option::is_none) {
            return both;
        }
        both.extend(pair.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use super::alternate;

    #[test]
    fn two_lists_take_turns_until_both_are_empty() {
        assert_eq!(alternate(vec![1, 3, 5, 6], vec![2, 4]), [1, 2, 3, 4, 5, 6]);
        assert_eq!(alternate(Vec::<u8>::new(), vec![2]), [2]);
    }
}
