//! A bounded cache of embeddings.
//!
//! Keys are digests of everything a vector depends on, so an entry is never stale: it is only ever dropped for want of
//! room.

use crate::{
    bounded_cache::{Bound, BoundedCache, Contents},
    domain::Vector,
};
use std::{hash::Hash, mem::size_of};

/// What one entry costs beside its payload and key: the vector's counts and length, its place in the cache's tables, the
/// allocator's rounding, and tables that have room to grow. Measured by `cargo bench --bench cache_memory`.
const ENTRY_OVERHEAD: usize = 80;
/// The payload that the number of shards is chosen for; any other works, too.
const USUAL_DIM: usize = 64;

/// Vectors by digest. Cheap to clone: clones share their entries.
#[derive(Debug, Clone)]
pub struct VectorCache<K>(BoundedCache<K, Vector>);

impl<K: Hash + Eq> VectorCache<K> {
    /// An empty cache of at most `max_bytes`, which metrics call `name`.
    pub fn new(name: &'static str, max_bytes: u64) -> Self {
        let weigh = |_key: &K, vector: &Vector| entry_bytes::<K>(vector.len());
        VectorCache(BoundedCache::new(name, Bound { max_bytes, weigh, usual_bytes: entry_bytes::<K>(USUAL_DIM) }))
    }

    /// The name that metrics use.
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// The vector under `key`.
    pub fn get(&self, key: &K) -> Option<Vector> {
        self.0.get(key)
    }

    /// Whether there is a vector under `key`; does not count as a use.
    pub fn contains(&self, key: &K) -> bool {
        self.0.contains(key)
    }

    /// Caches a vector. The caller has checked that it is finite.
    pub fn insert(&self, key: K, vector: Vector) {
        debug_assert!(vector.iter().all(|x| x.is_finite()));
        self.0.insert(key, vector);
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Contents {
        self.0.measure()
    }

    /// Drops everything; returns how many entries there were.
    pub fn flush(&self) -> u64 {
        self.0.flush()
    }
}

fn entry_bytes<K>(dim: usize) -> u64 {
    (dim * size_of::<f32>() + size_of::<K>() + ENTRY_OVERHEAD) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_held_in_bytes() {
        let cache = VectorCache::new("test", 100 * entry_bytes::<u64>(64));
        for key in 0..1000_u64 {
            cache.insert(key, vec![1.0; 64].into());
        }
        let contents = cache.measure();
        assert!(contents.n_bytes <= contents.max_bytes, "{contents:?}");
        assert!((50..=100).contains(&contents.n_entries), "{contents:?}");
        assert!(cache.contains(&999), "the newest entry was thrown away");
        assert_eq!(cache.get(&999).as_deref(), Some([1.0; 64].as_slice()));
        assert_eq!(cache.flush(), contents.n_entries);
        assert_eq!(cache.measure().n_entries, 0);
    }
}
