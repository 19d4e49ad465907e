//! Reading a cache by heat: which entries its next readers will most likely ask for, for who saves or refreshes them.
//!
//! A key's heat is what eviction knows of it. Entries of the main queue come first, by their count of uses and then by how
//! lately they joined the queue, which is the order in which they would have to go; then those on probation that were read
//! meanwhile; then those that nobody has read.
//!
//! Nothing here counts as a use, and nothing here keeps readers waiting: a shard is walked some entries at a time, by their
//! slots, which an entry never leaves while it is there. So what stays throughout the walk is found, and found once. What
//! comes, goes, or goes and comes back meanwhile may be missed or be met twice. All keys are gathered before they are
//! sorted: that takes a key and eight bytes for each entry, off the request path.

use super::{BoundedCache, Queue, Slot, read_lock};
use std::{cmp::Reverse, hash::BuildHasher, hash::Hash, sync::atomic::Ordering};

/// Slots that are looked at under one lock: they lie side by side, so this takes some microseconds.
const SLOTS_AT_ONCE: usize = 1000;

impl<K: Copy + Eq + Hash, V> BoundedCache<K, V> {
    /// All keys, the hottest first.
    pub fn hottest_keys(&self) -> Vec<K> {
        let now = self.shared.turns.load(Ordering::Relaxed);
        let mut found: Vec<(u64, K)> = Vec::new();
        for shard in &self.shared.shards {
            let mut start = 0;
            loop {
                let shard = read_lock(shard);
                let Some(slots) = shard.slots.get(start..).filter(|slots| !slots.is_empty()) else { break };
                let slots = &slots[..slots.len().min(SLOTS_AT_ONCE)];
                found.extend(slots.iter().filter_map(|slot| Some((slot.heat(now), slot.entry.as_ref()?.0))));
                start += slots.len();
            }
        }
        found.sort_unstable_by_key(|(heat, _key)| Reverse(*heat));
        found.into_iter().map(|(_heat, key)| key).collect()
    }

    /// Calls `read` once for each of `keys`, in their order, with its place and the value under it. Does not count as a use.
    ///
    /// Each key's shard is locked for its own look-up only, so the values are not those of one moment.
    pub fn peek_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&V>)) {
        for (i, key) in keys.iter().enumerate() {
            let hash = self.shared.hasher.hash_one(key);
            let shard = read_lock(self.shared.shard(hash));
            let slot = shard.find(key, hash).map(|place| &shard.slots[place as usize]);
            read(i, slot.and_then(|slot| slot.entry.as_ref()).map(|(_key, value)| value));
        }
    }
}

impl<K, V> Slot<K, V> {
    /// Higher is hotter. Turns are counted modulo 2^32: what joined before or after `now` is told apart up to half of that.
    fn heat(&self, now: u32) -> u64 {
        let uses = u64::from(self.uses.load(Ordering::Relaxed));
        let tier = match self.queue {
            Queue::New => uses.min(1),
            Queue::Main => 2 + uses,
        };
        let joined = self.turn.wrapping_sub(now).wrapping_add(1 << 31);
        (tier << 32) | u64::from(joined)
    }
}
