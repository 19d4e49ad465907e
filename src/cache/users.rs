//! User embeddings of running sessions: the pages of one session send the same history again and again.
//!
//! A user embedding depends on the towers, the encoder, and the history's texts and actions in their order. Its key is a digest of
//! all of these, so an entry is never stale: it is exactly what the tower would compute. An entry is worth keeping only as long as a
//! session lasts, so it expires after ten minutes without a reader. A request looks up one user, so moka's strict LRU order and
//! expiry cost nothing here.

use super::{CacheName, Usage};
use crate::{
    domain::{TextDigest, TowerDigest, UserKey, Vector, all_finite},
    telemetry::events::{self, Lookups},
};
use moka::{notification::RemovalCause, policy::EvictionPolicy, sync::Cache};
use std::{mem::size_of, time::Duration};

const NAME: &str = CacheName::User.as_str();
/// A session that was silent for this long is over.
const TIME_TO_IDLE: Duration = Duration::from_secs(600);
/// The bytes of an entry besides its payload and key: moka's nodes (with expiry on), the vector's counts and length, and the
/// allocator's rounding. Measured with `benches/micro/cache_memory.rs`.
const ENTRY_OVERHEAD: usize = 340;

/// Computes the [`UserKey`] of a history.
#[derive(Debug)]
pub struct HistoryHasher {
    /// All that is hashed, because BLAKE3 is several times faster on one long input than on many short ones.
    hashed: Vec<u8>,
}

impl HistoryHasher {
    /// Starts the history of a user tower; `tower` covers the encoder and the item tower, too.
    pub fn new(tower: TowerDigest) -> Self {
        HistoryHasher { hashed: tower.as_bytes().to_vec() }
    }

    /// Adds the next newer item, and the code of its action if the tower reads actions.
    pub fn add(&mut self, text: TextDigest, action: Option<u8>) {
        // An item has the same width in all histories of a tower, so different histories never feed the same bytes to the hash.
        self.hashed.extend_from_slice(text.as_bytes());
        self.hashed.extend(action);
    }

    /// The key of the history.
    pub fn finish(self) -> UserKey {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.hashed);
        UserKey::from_blake3(&hasher)
    }
}

/// User embeddings by [`UserKey`].
#[derive(Debug)]
pub struct UserCache(Cache<UserKey, Vector>);

impl UserCache {
    /// An empty cache of at most `max_bytes`.
    pub fn new(max_bytes: u64) -> Self {
        let cache = Cache::builder()
            .name(NAME)
            .max_capacity(max_bytes)
            .time_to_idle(TIME_TO_IDLE)
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_key, vector: &Vector| entry_bytes(vector.len()))
            .eviction_listener(|_key, _vector, cause| {
                if cause == RemovalCause::Size {
                    events::cache_evicted(NAME, 1);
                }
            })
            .build();
        UserCache(cache)
    }

    /// The user embedding under `key`. Counts as a look-up in the metrics.
    pub fn get(&self, key: &UserKey) -> Option<Vector> {
        let found = self.0.get(key);
        let (n_hits, n_misses) = if found.is_some() { (1, 0) } else { (0, 1) };
        events::cache_looked_up(NAME, Lookups { n_hits, n_misses, n_coalesced: 0 });
        found
    }

    /// Caches a user embedding. The caller must have checked that it is finite.
    pub fn insert(&self, key: UserKey, user: Vector) {
        debug_assert!(all_finite(&user));
        self.0.insert(key, user);
    }

    /// The number of entries, their bytes and the limit, after running moka's pending tasks.
    pub fn measure(&self) -> Usage {
        self.0.run_pending_tasks();
        Usage {
            cache: NAME,
            n_entries: self.0.entry_count(),
            n_bytes: self.0.weighted_size(),
            max_bytes: self.0.policy().max_capacity().unwrap_or(u64::MAX),
        }
    }

    /// Drops all entries and returns how many there were.
    pub fn flush(&self) -> u64 {
        let n_entries = self.measure().n_entries;
        self.0.invalidate_all();
        self.0.run_pending_tasks();
        n_entries
    }
}

fn entry_bytes(dim: usize) -> u32 {
    u32::try_from(dim * size_of::<f32>() + size_of::<UserKey>() + ENTRY_OVERHEAD).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ItemText;

    fn text(title: &str) -> TextDigest {
        TextDigest::of(&ItemText::titled(title))
    }

    #[test]
    fn a_key_depends_on_tower_items_and_order() {
        let key = |tower, titles: &[&str]| {
            let mut key = HistoryHasher::new(TowerDigest::from_bytes([tower; 16]));
            titles.iter().for_each(|title| key.add(text(title), None));
            key.finish()
        };
        let known = key(1, &["a", "b"]);
        assert_eq!(known, key(1, &["a", "b"]));
        for other in [key(2, &["a", "b"]), key(1, &["b", "a"]), key(1, &["a"]), key(1, &["a", "b", "b"]), key(1, &[])] {
            assert_ne!(known, other);
        }
        let with_actions = |actions: [u8; 2]| {
            let mut key = HistoryHasher::new(TowerDigest::from_bytes([1; 16]));
            key.add(text("a"), Some(actions[0]));
            key.add(text("b"), Some(actions[1]));
            key.finish()
        };
        assert_eq!(with_actions([1, 2]), with_actions([1, 2]));
        assert_ne!(with_actions([1, 2]), with_actions([2, 1]));
    }

    #[test]
    fn the_limit_holds_in_bytes() {
        let cache = UserCache::new(100 * u64::from(entry_bytes(64)));
        let key = |i: u8| UserKey::from_bytes([i; 16]);
        for i in 0..=255 {
            cache.insert(key(i), vec![1.0; 64].into());
        }
        let contents = cache.measure();
        assert!(contents.n_entries == 100 && contents.n_bytes <= contents.max_bytes, "{contents:?}");
        assert!(cache.get(&key(255)).is_some(), "the newest entry was evicted");
        assert_eq!(cache.flush(), 100);
        assert!(cache.get(&key(255)).is_none());
    }
}
