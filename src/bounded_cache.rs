//! A cache bounded in bytes, made to be read in bulk: one hot request looks a thousand keys up.
//!
//! What such a look-up costs is waiting for memory: in a catalogue of a million items nothing that it touches lies in the
//! processor's caches. So [`BoundedCache::read_many`] takes every shard's lock once, for reading, and then works in passes
//! over all keys, first through the tables, then through the entries. Within a pass no step depends on the one before, and
//! all that is written is an entry's count of uses, so that the processor waits for many entries at once. A loop of single look-ups,
//! with a lock and a counted reference each, waits for one after the other: see `cargo bench --bench hot_path`.
//!
//! Eviction is a clock that counts: a read raises an entry's count (to at most three), the hand lowers it as it
//! passes and evicts what stands at none. A new entry lies just behind the hand, so it has a whole turn to be read in; it
//! is never refused, and what was put in can be read right afterwards, also where the cache is full. An entry that was
//! read more than once outlives a flood of entries that nobody reads.
//!
//! What counts against the bound is what the caller's `weigh` says: payload, key and bookkeeping.
//!
//! Locks: a reader holds all shards' locks for some microseconds and takes them in order; a writer holds one and waits for
//! no other. Nothing here is held across an await.

use crate::telemetry::events;
use foldhash::fast::RandomState;
use hashbrown::HashTable;
use std::{
    fmt,
    hash::{BuildHasher, Hash},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU8, Ordering},
    },
};

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

/// Values by key. Cheap to clone: clones share their entries.
pub struct BoundedCache<K, V> {
    shared: Arc<Shared<K, V>>,
}

struct Shared<K, V> {
    name: &'static str,
    weigh: fn(&K, &V) -> u64,
    /// Of each shard.
    max_bytes: u64,
    hasher: RandomState,
    shards: Box<[RwLock<Shard<K, V>>]>,
}

struct Shard<K, V> {
    /// Places in `slots`, by key.
    table: HashTable<u32>,
    slots: Vec<Slot<K, V>>,
    /// Slots without an entry.
    vacant: Vec<u32>,
    /// The slot at which the next eviction starts to look.
    hand: usize,
    n_bytes: u64,
}

struct Slot<K, V> {
    /// Reads since the hand passed, at most [`MAX_USES`].
    uses: AtomicU8,
    entry: Option<(K, V)>,
}

/// A frequent entry outlives so many turns of the hand without being read.
const MAX_USES: u8 = 3;
/// Writers wait for writers of the same shard only; readers take all locks, so there are not many of them.
const MAX_SHARDS: u64 = 8;
/// A shard has room for a good number of entries, or their sizes would leave much of it unused.
const MIN_SHARD_BYTES: u64 = 1 << 20;

impl<K: Copy + Eq + Hash, V> BoundedCache<K, V> {
    /// An empty cache of at most `max_bytes`, as `weigh` counts them, which metrics call `name`.
    pub fn new(name: &'static str, max_bytes: u64, weigh: fn(&K, &V) -> u64) -> Self {
        let n_shards = (max_bytes / MIN_SHARD_BYTES).clamp(1, MAX_SHARDS);
        let shards = (0..n_shards).map(|_| RwLock::new(Shard::default())).collect();
        let shared = Shared { name, weigh, max_bytes: max_bytes / n_shards, hasher: RandomState::default(), shards };
        BoundedCache { shared: Arc::new(shared) }
    }

    /// The name that metrics use.
    pub fn name(&self) -> &'static str {
        self.shared.name
    }

    /// Calls `read` once for each of `keys`, in their order, with its place and the value under it.
    ///
    /// `read` runs while all shards are locked: it copies what it needs and does nothing else.
    pub fn read_many(&self, keys: &[K], mut read: impl FnMut(usize, Option<&V>)) {
        let hashes: Vec<u64> = keys.iter().map(|key| self.shared.hasher.hash_one(key)).collect();
        let shards: Vec<RwLockReadGuard<'_, Shard<K, V>>> = self.shared.shards.iter().map(read_lock).collect();
        let shard = |hash: u64| &shards[shard_of(hash, shards.len())];
        let places: Vec<Option<u32>> =
            keys.iter().zip(&hashes).map(|(key, hash)| shard(*hash).find(key, *hash)).collect();
        for (i, (place, hash)) in places.iter().zip(&hashes).enumerate() {
            read(i, place.and_then(|place| shard(*hash).value(place)));
        }
    }

    /// Reads the value under `key`.
    pub fn read<T>(&self, key: &K, read: impl FnOnce(&V) -> T) -> Option<T> {
        let hash = self.shared.hasher.hash_one(key);
        let shard = read_lock(self.shared.shard(hash));
        shard.find(key, hash).and_then(|place| shard.value(place)).map(read)
    }

    /// Whether there is a value under `key`; does not count as a use.
    pub fn contains(&self, key: &K) -> bool {
        let hash = self.shared.hasher.hash_one(key);
        read_lock(self.shared.shard(hash)).find(key, hash).is_some()
    }

    /// Puts a value in; one that is there under the same key is replaced. Others make room for it.
    pub fn insert(&self, key: K, value: V) {
        let shared = &*self.shared;
        let hash = shared.hasher.hash_one(key);
        let n_evicted = write_lock(shared.shard(hash)).insert((key, value), hash, shared);
        if n_evicted > 0 {
            events::cache_evicted(shared.name, n_evicted);
        }
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Contents {
        let shared = &*self.shared;
        let max_bytes = shared.max_bytes * shared.shards.len() as u64;
        let mut contents = Contents { cache: shared.name, n_entries: 0, n_bytes: 0, max_bytes };
        for shard in shared.shards.iter().map(read_lock) {
            contents.n_entries += shard.table.len() as u64;
            contents.n_bytes += shard.n_bytes;
        }
        contents
    }

    /// Drops everything; returns how many entries there were.
    pub fn flush(&self) -> u64 {
        let empty = |shard| std::mem::take(&mut *write_lock(shard));
        self.shared.shards.iter().map(empty).map(|shard| shard.table.len() as u64).sum()
    }
}

impl<K, V> Shared<K, V> {
    fn shard(&self, hash: u64) -> &RwLock<Shard<K, V>> {
        &self.shards[shard_of(hash, self.shards.len())]
    }
}

/// The table within a shard uses a hash's highest and lowest bits: these are others.
fn shard_of(hash: u64, n_shards: usize) -> usize {
    ((hash >> 32) as u16 as usize * n_shards) >> 16
}

/// A shard is changed by moves of whole entries, between which only the caller's `weigh` runs: a panic there cannot leave
/// it half-changed.
fn read_lock<K, V>(shard: &RwLock<Shard<K, V>>) -> RwLockReadGuard<'_, Shard<K, V>> {
    shard.read().unwrap_or_else(PoisonError::into_inner)
}

fn write_lock<K, V>(shard: &RwLock<Shard<K, V>>) -> RwLockWriteGuard<'_, Shard<K, V>> {
    shard.write().unwrap_or_else(PoisonError::into_inner)
}

impl<K, V> Default for Shard<K, V> {
    fn default() -> Self {
        Shard { table: HashTable::new(), slots: Vec::new(), vacant: Vec::new(), hand: 0, n_bytes: 0 }
    }
}

impl<K: Copy + Eq + Hash, V> Shard<K, V> {
    fn find(&self, key: &K, hash: u64) -> Option<u32> {
        self.table.find(hash, |place| self.is_at(*place, key)).copied()
    }

    fn is_at(&self, place: u32, key: &K) -> bool {
        self.slots[place as usize].entry.as_ref().is_some_and(|(found, _)| found == key)
    }

    /// The value in a slot, counted as used. A lost count of two that race is no loss.
    fn value(&self, place: u32) -> Option<&V> {
        let slot = &self.slots[place as usize];
        let uses = slot.uses.load(Ordering::Relaxed);
        if uses < MAX_USES {
            slot.uses.store(uses + 1, Ordering::Relaxed);
        }
        slot.entry.as_ref().map(|(_, value)| value)
    }

    /// Returns how many entries had to go.
    fn insert(&mut self, entry: (K, V), hash: u64, shared: &Shared<K, V>) -> u64 {
        if let Some(place) = self.find(&entry.0, hash) {
            self.remove(place, shared);
        }
        let n_bytes = (shared.weigh)(&entry.0, &entry.1);
        let n_evicted = self.make_room(n_bytes, shared);
        let slot = Slot { uses: AtomicU8::new(0), entry: Some(entry) };
        let place = match self.vacant.pop() {
            Some(place) => {
                self.slots[place as usize] = slot;
                place
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.n_bytes += n_bytes;
        let slots = &self.slots;
        let rehash =
            |place: &u32| slots[*place as usize].entry.as_ref().map_or(0, |(key, _)| shared.hasher.hash_one(key));
        self.table.insert_unique(hash, place, rehash);
        n_evicted
    }

    /// Evicts until `n_bytes` more fit, or nothing is left. Returns how many entries went.
    fn make_room(&mut self, n_bytes: u64, shared: &Shared<K, V>) -> u64 {
        let mut n_evicted = 0;
        while self.n_bytes + n_bytes > shared.max_bytes && !self.table.is_empty() {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            match self.slots[place].uses.get_mut() {
                0 => n_evicted += u64::from(self.remove(place as u32, shared)),
                uses => *uses -= 1,
            }
        }
        n_evicted
    }

    /// Empties a slot; false where it was empty.
    fn remove(&mut self, place: u32, shared: &Shared<K, V>) -> bool {
        let Some((key, value)) = self.slots[place as usize].entry.take() else { return false };
        self.n_bytes -= (shared.weigh)(&key, &value);
        if let Ok(found) = self.table.find_entry(shared.hasher.hash_one(key), |at| *at == place) {
            found.remove();
        }
        self.vacant.push(place);
        true
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

#[cfg(test)]
mod tests;
