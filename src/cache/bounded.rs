//! A cache with a limit in bytes, designed for bulk reads: one hot request looks up a thousand keys.
//!
//! The cost of such a look-up is memory latency: with a catalogue of a million items, nothing it touches is in the processor's
//! caches. So [`BoundedCache::read_many`] takes every shard's read lock once and then makes two passes over all keys, first
//! through the tables, then through the entries. Within a pass no step depends on the previous one, and the only write is an
//! entry's use count, so the processor can wait for many entries at once. A loop of single look-ups, each with a lock and a
//! reference count, waits for one entry after another: see `benches/micro/hot_path.rs`.
//!
//! Eviction is S3-FIFO (Yang et al., SOSP 2023): three queues, and a read moves nothing. A new entry starts in the probation queue,
//! which has a tenth of the space. An entry that is not read there is evicted; one that is read moves on to the main queue, where
//! each read (up to three) earns it another round. The ghost queue remembers the hashes of entries evicted on probation: one that
//! returns while it is remembered goes straight into the main queue. So items that are asked for once, as in a flood of new items,
//! never displace items that are asked for often, and yet no insertion is refused: an entry can be read right after it was
//! inserted, even if the cache is full. Entries inserted ahead of their first reader, by a warm-up, start in the main queue because
//! probation would end before the traffic comes. `benches/micro/hit_rate.rs` compares this cache with LRU and TinyLFU.
//!
//! The caller's `weigh` decides how many bytes an entry counts as: payload, key and bookkeeping.
//!
//! Locks: `read_many` takes all shards' locks in order and holds them for some microseconds; a writer holds one lock and waits
//! for no other. No lock is held across an await. `interleavings` checks this with loom (`--features loom`).
//!
//! [`BoundedCache::hottest_keys`], in a file of its own, says which entries are most worth saving or refreshing.

mod ghosts;
mod heat;

use super::{CacheName, Usage};
use crate::telemetry::events;
use foldhash::fast::RandomState;
use ghosts::GhostQueue;
use hashbrown::HashTable;
#[cfg(feature = "loom")]
use loom::sync::{
    RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicU8, AtomicU32},
};
#[cfg(not(feature = "loom"))]
use std::sync::{
    RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicU8, AtomicU32},
};
use std::{
    collections::VecDeque,
    fmt,
    hash::{BuildHasher, Hash},
    sync::{Arc, PoisonError, atomic::Ordering},
};

/// Values by key. Cheap to clone: clones share their entries.
pub struct BoundedCache<K, V> {
    shared: Arc<Shared<K, V>>,
}

struct Shared<K, V> {
    name: CacheName,
    weigh: fn(&K, &V) -> u64,
    /// The limit of each shard.
    max_bytes: u64,
    hasher: RandomState,
    /// How often an entry joined a queue, in all shards together. Orders entries by when they joined.
    n_joins: AtomicU32,
    shards: Box<[RwLock<Shard<K, V>>]>,
}

struct Shard<K, V> {
    /// Indices into `slots`, by key.
    table: HashTable<u32>,
    slots: Vec<Slot<K, V>>,
    /// Indices of slots without an entry.
    vacant: Vec<u32>,
    /// Indices of entries on probation, oldest first.
    probation: VecDeque<u32>,
    n_probation_bytes: u64,
    /// Indices of entries that passed or skipped probation, the next to be reviewed first.
    main: VecDeque<u32>,
    n_bytes: u64,
    ghosts: GhostQueue,
}

struct Slot<K, V> {
    /// Reads that were not yet spent on another round, at most [`MAX_USES`].
    uses: AtomicU8,
    queue: Queue,
    /// The value of `n_joins` when the entry joined its queue.
    joined: u32,
    entry: Option<(K, V)>,
}

/// The queues of entries in a shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    Probation,
    Main,
}

/// The result of reviewing an entry to make room.
enum Verdict {
    Evicted,
    Spared,
}

/// The most rounds of the main queue that an entry can stay without being read.
const MAX_USES: u8 = 3;
/// The reads that an entry needs to pass probation.
const USES_TO_STAY: u8 = 1;
/// The most entries that one insertion may spare. Readers wait meanwhile, and if all entries have been read, one of them has to
/// go anyway.
const MAX_SPARED: u64 = 256;
/// The probation queue has one part in this many of the space.
const PROBATION_PART: u64 = 10;
/// A writer waits only for writers of its own shard, but `read_many` takes all locks, so the number of shards is small.
const MAX_SHARDS: u64 = 8;
/// A shard must have room for many entries, or their different sizes would leave much of it unused.
const MIN_SHARD_BYTES: u64 = 1 << 20;

impl<K: Copy + Eq + Hash, V> BoundedCache<K, V> {
    /// An empty cache of at most `max_bytes`, as `weigh` counts them.
    pub fn new(name: CacheName, max_bytes: u64, weigh: fn(&K, &V) -> u64) -> Self {
        let n_shards = (max_bytes / MIN_SHARD_BYTES).clamp(1, MAX_SHARDS);
        let shards = (0..n_shards).map(|_| RwLock::new(Shard::default())).collect();
        let shared = Shared {
            name,
            weigh,
            max_bytes: max_bytes / n_shards,
            hasher: RandomState::default(),
            n_joins: AtomicU32::new(0),
            shards,
        };
        BoundedCache { shared: Arc::new(shared) }
    }

    /// The name that metrics use.
    pub fn name(&self) -> CacheName {
        self.shared.name
    }

    /// Calls `read` once per key, in the order of `keys`, with the key's index and its value.
    ///
    /// `read` runs while all shards are locked: it must only copy what it needs.
    pub fn read_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&V>)) {
        let hashes: Vec<u64> = keys.iter().map(|key| self.shared.hasher.hash_one(key)).collect();
        let shards: Vec<RwLockReadGuard<'_, Shard<K, V>>> = self.shared.shards.iter().map(read_lock).collect();
        let shard = |hash: u64| &shards[shard_of(hash, shards.len())];
        let found: Vec<Option<u32>> =
            keys.iter().zip(&hashes).map(|(key, hash)| shard(*hash).find(key, *hash)).collect();
        for (i, (slot, hash)) in found.iter().zip(&hashes).enumerate() {
            read(i, slot.and_then(|slot| shard(*hash).value(slot)));
        }
    }

    /// Reads the value under `key`.
    pub fn read<T>(&self, key: &K, read: impl FnOnce(&V) -> T) -> Option<T> {
        let hash = self.shared.hasher.hash_one(key);
        let shard = read_lock(self.shared.shard(hash));
        shard.find(key, hash).and_then(|index| shard.value(index)).map(read)
    }

    /// Whether there is a value under `key`. Does not count as a use.
    pub fn contains(&self, key: &K) -> bool {
        let hash = self.shared.hasher.hash_one(key);
        read_lock(self.shared.shard(hash)).find(key, hash).is_some()
    }

    /// Inserts a value, in place of the one under the same key if there is one. Evicts others to make room.
    pub fn insert(&self, key: K, value: V) {
        self.insert_into(Queue::Probation, key, value);
    }

    /// Inserts a value that nobody has asked for yet. It stays for a whole round of the main queue even if it is not read.
    pub fn insert_ahead(&self, key: K, value: V) {
        self.insert_into(Queue::Main, key, value);
    }

    fn insert_into(&self, queue: Queue, key: K, value: V) {
        let shared = &*self.shared;
        let hash = shared.hasher.hash_one(key);
        let n_evicted = write_lock(shared.shard(hash)).insert((key, value), hash, queue, shared);
        if n_evicted > 0 {
            events::cache_evicted(shared.name.as_str(), n_evicted);
        }
    }

    /// The number of entries, their bytes and the limit.
    pub fn measure(&self) -> Usage {
        let shared = &*self.shared;
        let max_bytes = shared.max_bytes * shared.shards.len() as u64;
        let mut usage = Usage { cache: shared.name.as_str(), n_entries: 0, n_bytes: 0, max_bytes };
        for shard in &shared.shards {
            let shard = read_lock(shard);
            usage.n_entries += shard.table.len() as u64;
            usage.n_bytes += shard.n_bytes;
        }
        usage
    }

    /// Drops all entries and returns how many there were.
    pub fn flush(&self) -> u64 {
        let mut n_entries = 0;
        for shard in &self.shared.shards {
            let dropped = std::mem::take(&mut *write_lock(shard));
            n_entries += dropped.table.len() as u64;
        }
        n_entries
    }
}

impl<K, V> Shared<K, V> {
    fn shard(&self, hash: u64) -> &RwLock<Shard<K, V>> {
        &self.shards[shard_of(hash, self.shards.len())]
    }

    fn next_join(&self) -> u32 {
        self.n_joins.fetch_add(1, Ordering::Relaxed)
    }
}

/// The table within a shard uses the hash's highest and lowest bits, so the shard is chosen by bits in the middle.
fn shard_of(hash: u64, n_shards: usize) -> usize {
    ((hash >> 32) as u16 as usize * n_shards) >> 16
}

/// A poisoned lock is used as it is: a shard is changed by moving whole entries, and the only foreign code that runs in between
/// is the caller's `weigh`, so a panic there cannot leave the shard half-changed.
fn read_lock<K, V>(shard: &RwLock<Shard<K, V>>) -> RwLockReadGuard<'_, Shard<K, V>> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock<K, V>(shard: &RwLock<Shard<K, V>>) -> RwLockWriteGuard<'_, Shard<K, V>> {
    shard.write().unwrap_or_else(PoisonError::into_inner)
}

impl<K, V> Default for Shard<K, V> {
    fn default() -> Self {
        Shard {
            table: HashTable::new(),
            slots: Vec::new(),
            vacant: Vec::new(),
            probation: VecDeque::new(),
            n_probation_bytes: 0,
            main: VecDeque::new(),
            n_bytes: 0,
            ghosts: GhostQueue::default(),
        }
    }
}

impl<K: Copy + Eq + Hash, V> Shard<K, V> {
    fn find(&self, key: &K, hash: u64) -> Option<u32> {
        self.table.find(hash, |index| self.has_key(*index, key)).copied()
    }

    fn has_key(&self, index: u32, key: &K) -> bool {
        self.slots[index as usize].entry.as_ref().is_some_and(|(found, _value)| found == key)
    }

    /// The value in a slot. Counts a use; of two readers that race, one may not be counted, which does no harm.
    fn value(&self, index: u32) -> Option<&V> {
        let slot = &self.slots[index as usize];
        let uses = slot.uses.load(Ordering::Relaxed);
        if uses < MAX_USES {
            slot.uses.store(uses + 1, Ordering::Relaxed);
        }
        slot.entry.as_ref().map(|(_key, value)| value)
    }

    /// Inserts an entry and returns how many others were evicted.
    fn insert(&mut self, entry: (K, V), hash: u64, queue: Queue, shared: &Shared<K, V>) -> u64 {
        let n_bytes = (shared.weigh)(&entry.0, &entry.1);
        if let Some(index) = self.find(&entry.0, hash) {
            let slot = &mut self.slots[index as usize];
            let n_old_bytes = slot.entry.replace(entry).map_or(0, |(key, value)| (shared.weigh)(&key, &value));
            if slot.queue == Queue::Probation {
                self.n_probation_bytes = self.n_probation_bytes + n_bytes - n_old_bytes;
            }
            self.n_bytes = self.n_bytes + n_bytes - n_old_bytes;
            return self.make_room(0, Some(index), shared);
        }
        let n_evicted = self.make_room(n_bytes, None, shared);
        // An entry that returns soon after its eviction is asked for more often than probation could see.
        let queue = if self.ghosts.take(hash) { Queue::Main } else { queue };
        let slot = Slot { uses: AtomicU8::new(0), queue, joined: shared.next_join(), entry: Some(entry) };
        let index = match self.vacant.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.n_bytes += n_bytes;
        match queue {
            Queue::Probation => {
                self.n_probation_bytes += n_bytes;
                self.probation.push_back(index);
            }
            Queue::Main => self.main.push_back(index),
        }
        let slots = &self.slots;
        let rehash =
            |index: &u32| slots[*index as usize].entry.as_ref().map_or(0, |(key, _)| shared.hasher.hash_one(key));
        self.table.insert_unique(hash, index, rehash);
        n_evicted
    }

    /// Evicts entries until `n_bytes` more fit or only the entry at `keep` is left. Returns how many were evicted.
    fn make_room(&mut self, n_bytes: u64, keep: Option<u32>, shared: &Shared<K, V>) -> u64 {
        let (mut n_evicted, mut n_spared) = (0, 0);
        while self.n_bytes + n_bytes > shared.max_bytes && self.table.len() > usize::from(keep.is_some()) {
            let probation_is_full = self.n_probation_bytes > shared.max_bytes / PROBATION_PART;
            let main_is_empty = self.main.iter().all(|index| keep == Some(*index));
            let verdict = if probation_is_full || main_is_empty {
                self.review_probation(keep, n_spared, shared)
            } else {
                self.review_main(keep, n_spared, shared)
            };
            match verdict {
                Verdict::Evicted => n_evicted += 1,
                Verdict::Spared => n_spared += 1,
            }
        }
        n_evicted
    }

    /// Moves the oldest entry on probation to the main queue if it was read, else evicts it.
    fn review_probation(&mut self, keep: Option<u32>, n_spared: u64, shared: &Shared<K, V>) -> Verdict {
        let Some(index) = self.probation.pop_front() else { return Verdict::Spared };
        let slot = &mut self.slots[index as usize];
        self.n_probation_bytes -= slot.entry.as_ref().map_or(0, |(key, value)| (shared.weigh)(key, value));
        let was_read = slot.uses.load(Ordering::Relaxed) >= USES_TO_STAY;
        if keep == Some(index) || (was_read && n_spared < MAX_SPARED) {
            slot.queue = Queue::Main;
            self.requeue(index, shared);
            return Verdict::Spared;
        }
        if let Some(hash) = self.remove(index, shared) {
            self.ghosts.add(hash, self.main.len());
        }
        Verdict::Evicted
    }

    /// Gives the next entry of the main queue another round if it was read, else evicts it.
    fn review_main(&mut self, keep: Option<u32>, n_spared: u64, shared: &Shared<K, V>) -> Verdict {
        let Some(index) = self.main.pop_front() else { return Verdict::Spared };
        let was_read = self.slots[index as usize].uses.load(Ordering::Relaxed) > 0;
        if keep == Some(index) || (was_read && n_spared < MAX_SPARED) {
            self.requeue(index, shared);
            return Verdict::Spared;
        }
        self.remove(index, shared);
        Verdict::Evicted
    }

    /// Puts an entry at the end of the main queue, which costs it one use.
    fn requeue(&mut self, index: u32, shared: &Shared<K, V>) {
        let slot = &mut self.slots[index as usize];
        slot.joined = shared.next_join();
        let uses = slot.uses.load(Ordering::Relaxed);
        slot.uses.store(uses.saturating_sub(1), Ordering::Relaxed);
        self.main.push_back(index);
    }

    /// Removes the entry of a slot that has left its queue, and returns the entry's hash.
    fn remove(&mut self, index: u32, shared: &Shared<K, V>) -> Option<u64> {
        let (key, value) = self.slots[index as usize].entry.take()?;
        self.n_bytes -= (shared.weigh)(&key, &value);
        let hash = shared.hasher.hash_one(key);
        if let Ok(found) = self.table.find_entry(hash, |other| *other == index) {
            found.remove();
        }
        self.vacant.push(index);
        Some(hash)
    }
}

impl<K, V> Clone for BoundedCache<K, V> {
    fn clone(&self) -> Self {
        BoundedCache { shared: Arc::clone(&self.shared) }
    }
}

impl<K, V> fmt::Debug for BoundedCache<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundedCache").field("name", &self.shared.name).finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "loom"))]
mod interleavings;
#[cfg(test)]
mod tests;
