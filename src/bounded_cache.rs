//! A cache bounded in bytes that many threads read at once: what one hot request looks up a thousand times.
//!
//! A read takes one shard's lock for reading and moves nothing, so readers do not wait for each other; what was read is
//! marked. Eviction is S3-FIFO's kind of CLOCK (quick_cache): a new entry starts in a small queue, goes on to the main
//! one if it was read there, and is dropped if not; entries of the main queue stay for as long as they are read between
//! two turns of the clock. An entry is never refused, so what was put in can be read right afterwards, also where the
//! cache is full. What counts against the bound is what the caller's weigher says: payload, key and bookkeeping.
//!
//! moka stood here before. It records every read and replays it, to keep strict recency, and an entry of its takes some
//! 260 bytes more: W1 cost 3.7 CPU milliseconds a request with it and 2.8 with this, a cached item embedding 625 bytes and
//! 362 (two cores, the same run; `midemb bench`, `cargo bench --bench cache_memory`).

use crate::telemetry::events;
use quick_cache::{DefaultHashBuilder, Equivalent, Lifecycle, OptionsBuilder, Weighter, sync::Cache};
use std::{fmt, hash::Hash, sync::Arc};

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// The cache's name.
    pub cache: &'static str,
    /// How many entries.
    pub n_entries: u64,
    /// As the bound counts them.
    pub n_bytes: u64,
    /// The bound.
    pub max_bytes: u64,
}

/// How large a cache is and how its entries are counted.
#[derive(Debug, Clone, Copy)]
pub struct Bound<K, V> {
    /// Bytes at most.
    pub max_bytes: u64,
    /// Bytes of one entry, everything included.
    pub weigh: fn(&K, &V) -> u64,
    /// Bytes of an entry of the usual size; only the number of shards depends on it.
    pub usual_bytes: u64,
}

type Entries<K, V> = Cache<K, V, Weigh<K, V>, DefaultHashBuilder, CountEvictions>;

/// Values by key. Cheap to clone: clones share their entries.
pub struct BoundedCache<K, V> {
    name: &'static str,
    cache: Arc<Entries<K, V>>,
}

/// Part of the bound that new entries have for themselves: in a cache of 256 MB some 60,000 item embeddings, or a hundred
/// pages of new items between their first reading and their second.
const NEW_PART: f64 = 0.1;

/// Evicted keys that are remembered by their hash, as a part of the entries: one that comes back goes straight to the main
/// queue. Each costs the bookkeeping of an entry.
const GHOSTS: f64 = 0.1;

impl<K: Hash + Eq, V: Clone> BoundedCache<K, V> {
    /// An empty cache, which metrics call `name`.
    pub fn new(name: &'static str, bound: Bound<K, V>) -> Self {
        let usual_items = usize::try_from(bound.max_bytes / bound.usual_bytes.max(1)).unwrap_or(usize::MAX).max(1);
        let options = OptionsBuilder::new()
            .weight_capacity(bound.max_bytes)
            .estimated_items_capacity(usual_items)
            .hot_allocation(1.0 - NEW_PART)
            .ghost_allocation(GHOSTS)
            .build();
        #[expect(clippy::expect_used, reason = "both capacities that a build asks for were just given")]
        let options = options.expect("complete options");
        let hasher = DefaultHashBuilder::default();
        let cache = Cache::with_options(options, Weigh(bound.weigh), hasher, CountEvictions(name));
        BoundedCache { name, cache: Arc::new(cache) }
    }

    /// The name that metrics use.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The value under `key`.
    pub fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<V> {
        self.cache.get(key)
    }

    /// Whether there is a value under `key`; does not count as a use.
    pub fn contains<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> bool {
        self.cache.contains_key(key)
    }

    /// Puts a value in; one that is there under the same key is replaced.
    pub fn insert(&self, key: K, value: V) {
        self.cache.insert(key, value);
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Contents {
        Contents {
            cache: self.name,
            n_entries: self.cache.len() as u64,
            n_bytes: self.cache.weight(),
            max_bytes: self.cache.capacity(),
        }
    }

    /// Drops everything; returns how many entries there were.
    pub fn flush(&self) -> u64 {
        let n_entries = self.cache.len() as u64;
        self.cache.clear();
        n_entries
    }
}

impl<K, V> Clone for BoundedCache<K, V> {
    fn clone(&self) -> Self {
        BoundedCache { name: self.name, cache: Arc::clone(&self.cache) }
    }
}

impl<K, V> fmt::Debug for BoundedCache<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundedCache").field("name", &self.name).finish_non_exhaustive()
    }
}

struct Weigh<K, V>(fn(&K, &V) -> u64);

impl<K, V> Clone for Weigh<K, V> {
    fn clone(&self) -> Self {
        Weigh(self.0)
    }
}

impl<K, V> Weighter<K, V> for Weigh<K, V> {
    fn weight(&self, key: &K, value: &V) -> u64 {
        (self.0)(key, value)
    }
}

/// Counts what was dropped for want of room. Replaced and flushed entries are not.
#[derive(Clone)]
struct CountEvictions(&'static str);

/// What one insertion pushed out; counted when the shard's lock is free again.
#[derive(Default)]
struct Evicted {
    cache: &'static str,
    n_entries: u64,
}

impl<K, V> Lifecycle<K, V> for CountEvictions {
    type RequestState = Evicted;

    fn on_evict(&self, evicted: &mut Evicted, _key: K, _value: V) {
        evicted.cache = self.0;
        evicted.n_entries += 1;
    }
}

impl Drop for Evicted {
    fn drop(&mut self) {
        if self.n_entries > 0 {
            events::cache_evicted(self.cache, self.n_entries);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(max_bytes: u64) -> BoundedCache<u64, u64> {
        BoundedCache::new("test", Bound { max_bytes, weigh: |_, bytes| *bytes, usual_bytes: 10 })
    }

    #[test]
    fn the_bound_is_held_in_bytes_and_the_newest_entry_is_there() {
        let cache = cache(10_000);
        for key in 0..100_000 {
            cache.insert(key, 1 + key % 20);
            assert!(cache.contains(&key), "the newest entry was thrown away");
            let contents = cache.measure();
            assert!(contents.n_bytes <= 10_000 && contents.max_bytes >= 10_000, "{contents:?}");
        }
        let contents = cache.measure();
        assert!(contents.n_bytes > 9_000, "a third of the room is not used: {contents:?}");
        assert_eq!(cache.flush(), contents.n_entries);
        assert_eq!(cache.measure().n_entries, 0);
        assert!(!cache.contains(&99_999));
    }

    #[test]
    fn what_is_read_outlives_what_is_not() {
        let cache = cache(10_000);
        for round in 0..100 {
            for key in 0..100 {
                assert!(round == 0 || cache.get(&key).is_some(), "{key} was dropped although it was read all the time");
                if round == 0 {
                    cache.insert(key, 10);
                }
            }
            (0..500).for_each(|i| cache.insert(1_000 + 500 * round + i, 10));
        }
    }

    #[test]
    fn a_replaced_value_is_counted_once() {
        let cache = cache(10_000);
        (0..50).for_each(|bytes| cache.insert(7, bytes + 1));
        assert_eq!((cache.get(&7), cache.measure().n_entries, cache.measure().n_bytes), (Some(50), 1, 50));
    }
}
