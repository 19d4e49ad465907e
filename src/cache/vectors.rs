//! A bounded cache of embeddings.
//!
//! Keys are digests of everything a vector depends on, so an entry is never stale: it is only ever dropped for want of
//! room.

use super::{CacheName, Usage, bounded::BoundedCache};
use crate::domain::{Vector, all_finite};
use std::{hash::Hash, mem::size_of, sync::Arc};

/// What one entry costs beside its payload and key: the vector's counts and length, its place in the cache's tables, the
/// allocator's rounding, and tables that have room to grow (measured by `cargo bench --bench cache_memory`); and, once
/// the cache is full, the hash of one that is gone.
const ENTRY_OVERHEAD: usize = 90;

/// Vectors by digest. Cheap to clone: clones share their entries.
#[derive(Debug, Clone)]
pub struct VectorCache<K>(BoundedCache<K, Vector>);

impl<K: Copy + Eq + Hash> VectorCache<K> {
    /// An empty cache of at most `max_bytes`, which metrics call `name`.
    pub fn new(name: CacheName, max_bytes: u64) -> Self {
        VectorCache(BoundedCache::new(name, max_bytes, |_key, vector| Self::entry_bytes(vector.len())))
    }

    /// What a vector of `dim` numbers counts against the bound: payload, key and bookkeeping.
    pub fn entry_bytes(dim: usize) -> u64 {
        (dim * size_of::<f32>() + size_of::<K>() + ENTRY_OVERHEAD) as u64
    }

    /// The name that metrics use.
    pub fn name(&self) -> CacheName {
        self.0.name()
    }

    /// Calls `read` once for each of `keys`, in their order, with its place and the vector under it. `read` runs while the
    /// cache is locked: it copies what it needs and does nothing else.
    pub fn read_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&[f32]>)) {
        self.0.read_many(keys, |i, vector| read(i, vector.map(|vector| &**vector)));
    }

    /// The vector under each of `keys`, in their order.
    pub fn get_many(&self, keys: &[K]) -> Vec<Option<Vector>> {
        let mut found = Vec::with_capacity(keys.len());
        self.0.read_many(keys, |_, vector| found.push(vector.map(Arc::clone)));
        found
    }

    /// The vector under `key`.
    pub fn get(&self, key: &K) -> Option<Vector> {
        self.0.read(key, Arc::clone)
    }

    /// Whether there is a vector under `key`; does not count as a use.
    pub fn contains(&self, key: &K) -> bool {
        self.0.contains(key)
    }

    /// Caches a vector. The caller has checked that it is finite.
    pub fn insert(&self, key: K, vector: Vector) {
        debug_assert!(all_finite(&vector));
        self.0.insert(key, vector);
    }

    /// Like [`VectorCache::insert`], for what nobody has asked for yet.
    pub fn insert_ahead(&self, key: K, vector: Vector) {
        debug_assert!(all_finite(&vector));
        self.0.insert_ahead(key, vector);
    }

    /// All keys, the hottest first: see [`BoundedCache::hottest_keys`].
    pub fn hottest_keys(&self) -> Vec<K> {
        self.0.hottest_keys()
    }

    /// The vector under each of `keys`, in their order; does not count as a use.
    pub fn peek_many(&self, keys: &[K]) -> Vec<Option<Vector>> {
        let mut found = Vec::with_capacity(keys.len());
        self.0.peek_many(keys, |_, vector| found.push(vector.map(Arc::clone)));
        found
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Usage {
        self.0.measure()
    }

    /// Drops everything; returns how many entries there were.
    pub fn flush(&self) -> u64 {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_held_in_bytes_and_vectors_are_read_in_order() {
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
    fn the_hottest_are_read_first_and_stay_as_hot_as_they_were() {
        let cache = VectorCache::new(CacheName::Item, 1 << 20);
        (0..4_u64).for_each(|key| cache.insert_ahead(key, vec![key as f32].into()));
        assert!(cache.get(&2).is_some());
        for _ in 0..5 {
            assert_eq!(cache.hottest_keys(), [2, 3, 1, 0]);
            assert_eq!(cache.peek_many(&[0, 9]), [Some(vec![0.0].into()), None]);
        }
    }
}
