//! A cache of embeddings with a limit in bytes.
//!
//! A key is a digest of everything its vector depends on, so an entry is never stale and is dropped only to make room.

use super::{CacheName, Usage, bounded::BoundedCache};
use crate::domain::{Vector, all_finite};
use std::{hash::Hash, mem::size_of, sync::Arc};

/// The bytes of an entry besides its payload and key: the vector's counts and length, its slot in the cache's tables, the
/// allocator's rounding, spare room in the tables (measured with `benches/micro/cache_memory.rs`) and, once the cache is
/// full, the hash of one evicted entry.
const ENTRY_OVERHEAD: usize = 90;

/// Vectors by digest. Cheap to clone: clones share their entries.
#[derive(Debug, Clone)]
pub struct VectorCache<K>(BoundedCache<K, Vector>);

impl<K: Copy + Eq + Hash> VectorCache<K> {
    /// An empty cache of at most `max_bytes`.
    pub fn new(name: CacheName, max_bytes: u64) -> Self {
        VectorCache(BoundedCache::new(name, max_bytes, |_key, vector| Self::entry_bytes(vector.len())))
    }

    /// How many bytes of the limit a vector of `dim` numbers takes: payload, key and bookkeeping.
    pub fn entry_bytes(dim: usize) -> u64 {
        (dim * size_of::<f32>() + size_of::<K>() + ENTRY_OVERHEAD) as u64
    }

    /// The name that metrics use.
    pub fn name(&self) -> CacheName {
        self.0.name()
    }

    /// Calls `read` once per key, in the order of `keys`, with the key's index and its vector. `read` runs while the cache is
    /// locked: it must only copy what it needs.
    pub fn read_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&[f32]>)) {
        self.0.read_many(keys, |i, vector| read(i, vector.map(|vector| &**vector)));
    }

    /// The vector under each key, in the order of `keys`.
    pub fn get_many(&self, keys: &[K]) -> Vec<Option<Vector>> {
        let mut found = Vec::with_capacity(keys.len());
        self.0.read_many(keys, |_, vector| found.push(vector.map(Arc::clone)));
        found
    }

    /// The vector under `key`.
    pub fn get(&self, key: &K) -> Option<Vector> {
        self.0.read(key, Arc::clone)
    }

    /// Whether there is a vector under `key`. Does not count as a use.
    pub fn contains(&self, key: &K) -> bool {
        self.0.contains(key)
    }

    /// Caches a vector. The caller must have checked that it is finite.
    pub fn insert(&self, key: K, vector: Vector) {
        debug_assert!(all_finite(&vector));
        self.0.insert(key, vector);
    }

    /// Caches a vector that nobody has asked for yet; see [`BoundedCache::insert_ahead`].
    pub fn insert_ahead(&self, key: K, vector: Vector) {
        debug_assert!(all_finite(&vector));
        self.0.insert_ahead(key, vector);
    }

    /// All keys, hottest first; see [`BoundedCache::hottest_keys`].
    pub fn hottest_keys(&self) -> Vec<K> {
        self.0.hottest_keys()
    }

    /// The vector under each key, in the order of `keys`. Does not count as a use.
    pub fn peek_many(&self, keys: &[K]) -> Vec<Option<Vector>> {
        let mut found = Vec::with_capacity(keys.len());
        self.0.peek_many(keys, |_, vector| found.push(vector.map(Arc::clone)));
        found
    }

    /// The number of entries, their bytes and the limit.
    pub fn measure(&self) -> Usage {
        self.0.measure()
    }

    /// Drops all entries and returns how many there were.
    pub fn flush(&self) -> u64 {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_holds_in_bytes_and_vectors_are_read_in_order() {
        let cache = VectorCache::new(CacheName::Item, 100 * VectorCache::<u64>::entry_bytes(64));
        for key in 0..1000_u64 {
            cache.insert(key, vec![key as f32; 64].into());
        }
        let contents = cache.measure();
        assert!(contents.n_bytes <= contents.max_bytes && contents.n_entries == 100, "{contents:?}");
        let first = |vector: Vector| vector[0];
        let found: Vec<Option<f32>> = cache.get_many(&[999, 1, 998]).into_iter().map(|v| v.map(first)).collect();
        assert_eq!(found, [Some(999.0), None, Some(998.0)]);
        let mut read = Vec::new();
        cache.read_many(&[998, 2, 999], |i, vector| read.push((i, vector.map(|vector| vector[63]))));
        assert_eq!(read, [(0, Some(998.0)), (1, None), (2, Some(999.0))]);
        assert_eq!(cache.get(&999).as_deref(), Some([999.0; 64].as_slice()));
    }

    #[test]
    fn reading_keys_by_heat_does_not_change_their_heat() {
        let cache = VectorCache::new(CacheName::Item, 1 << 20);
        for key in 0..4_u64 {
            cache.insert_ahead(key, vec![key as f32].into());
        }
        assert!(cache.get(&2).is_some());
        for _ in 0..5 {
            assert_eq!(cache.hottest_keys(), [2, 3, 1, 0]);
            assert_eq!(cache.peek_many(&[0, 9]), [Some(vec![0.0].into()), None]);
        }
    }
}
