//! Reading a cache by heat, most likely to be asked for first, for callers that save or refresh entries.
//!
//! A key's heat is what eviction knows about it. Entries of the main queue come first, ordered by use count and then by how
//! recently they joined the queue, which is the reverse of the order in which they would be evicted; then entries on probation
//! that were read; then those that were not.
//!
//! Nothing here counts as a use or blocks readers for long. A shard is walked in groups of slots, and an entry never changes
//! its slot, so an entry that stays throughout the walk is found exactly once. An entry that is inserted or evicted during the
//! walk may be missed, or found twice. All keys are collected before they are sorted, which takes a key and eight bytes per
//! entry, off the request path.

use super::{BoundedCache, Queue, Slot, read_lock};
use std::{cmp::Reverse, hash::BuildHasher, hash::Hash, sync::atomic::Ordering};

/// Slots that are read under one lock. They are adjacent in memory, so this takes some microseconds.
const SLOTS_AT_ONCE: usize = 1000;

impl<K: Copy + Eq + Hash, V> BoundedCache<K, V> {
    /// All keys, hottest first.
    pub fn hottest_keys(&self) -> Vec<K> {
        let now = self.shared.n_joins.load(Ordering::Relaxed);
        let mut found: Vec<(u64, K)> = Vec::new();
        for shard in &self.shared.shards {
            let mut start = 0;
            loop {
                let shard = read_lock(shard);
                let Some(slots) = shard.slots.get(start..).filter(|slots| !slots.is_empty()) else { break };
                let slots = &slots[..slots.len().min(SLOTS_AT_ONCE)];
                for slot in slots {
                    if let Some((key, _value)) = &slot.entry {
                        found.push((slot.heat(now), *key));
                    }
                }
                start += slots.len();
            }
        }
        found.sort_unstable_by_key(|(heat, _key)| Reverse(*heat));
        found.into_iter().map(|(_heat, key)| key).collect()
    }

    /// Calls `read` once per key, in the order of `keys`, with the key's index and its value. Does not count as a use.
    ///
    /// A shard is locked for one look-up at a time, so the values need not be from the same moment.
    pub fn peek_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&V>)) {
        for (i, key) in keys.iter().enumerate() {
            let hash = self.shared.hasher.hash_one(key);
            let shard = read_lock(self.shared.shard(hash));
            let slot = shard.find(key, hash).map(|index| &shard.slots[index as usize]);
            read(i, slot.and_then(|slot| slot.entry.as_ref()).map(|(_key, value)| value));
        }
    }
}

impl<K, V> Slot<K, V> {
    /// Higher is hotter. Joins are counted modulo 2^32, so entries must have joined within 2^31 joins of `now`.
    fn heat(&self, now: u32) -> u64 {
        let uses = u64::from(self.uses.load(Ordering::Relaxed));
        let tier = match self.queue {
            Queue::Probation => uses.min(1),
            Queue::Main => 2 + uses,
        };
        let recency = self.joined.wrapping_sub(now).wrapping_add(1 << 31);
        (tier << 32) | u64::from(recency)
    }
}
