//! A cache bounded in bytes, made to be read in bulk: one hot request looks a thousand keys up.
//!
//! What such a look-up costs is waiting for memory: in a catalogue of a million items nothing that it touches lies in the
//! processor's caches. So [`BoundedCache::read_many`] takes every shard's lock once, for reading, and then works in passes
//! over all keys, first through the tables, then through the entries. Within a pass no step depends on the one before, and
//! all that is written is an entry's count of uses, so that the processor waits for many entries at once. A loop of single
//! look-ups, with a lock and a counted reference each, waits for one after the other: see `cargo bench --bench hot_path`.
//!
//! Eviction is S3-FIFO (Yang et al., SOSP 2023): three queues, and a read that moves nothing. A new entry goes into a
//! queue of a tenth of the room, from which it leaves for good unless it was read again meanwhile; then it goes into the
//! main queue, where each read (up to three) is worth another round. What left the first queue is remembered by its hash,
//! and if it comes back while it is, it goes into the main queue at once. So what is asked for once, as in a flood of new
//! items, never displaces what is asked for often, and still nothing is refused: what was put in can be read right
//! afterwards, also where the cache is full. What is put in ahead of its first reader, by a warm-up, starts in the main
//! queue: probation would end before the traffic comes. `cargo bench --bench hit_rate` compares it with LRU and TinyLFU.
//!
//! What counts against the bound is what the caller's `weigh` says: payload, key and bookkeeping.
//!
//! Locks: a reader holds all shards' locks for some microseconds and takes them in order; a writer holds one and waits for
//! no other. Nothing here is held across an await.
//!
//! Which entries matter most, for who saves or refreshes them, is [`BoundedCache::hottest_keys`], in a file of its own.

mod ghosts;
mod heat;

use super::{CacheName, Usage};
use crate::telemetry::events;
use foldhash::fast::RandomState;
use ghosts::GhostQueue;
use hashbrown::HashTable;
use std::{
    collections::VecDeque,
    fmt,
    hash::{BuildHasher, Hash},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

/// Values by key. Cheap to clone: clones share their entries.
pub struct BoundedCache<K, V> {
    shared: Arc<Shared<K, V>>,
}

struct Shared<K, V> {
    name: CacheName,
    weigh: fn(&K, &V) -> u64,
    /// The bound of each shard.
    max_bytes: u64,
    hasher: RandomState,
    /// Counts what joins a queue, in all shards together: that tells which of two entries joined later.
    turns: AtomicU32,
    shards: Box<[RwLock<Shard<K, V>>]>,
}

struct Shard<K, V> {
    /// Places in `slots`, by key.
    table: HashTable<u32>,
    slots: Vec<Slot<K, V>>,
    /// Slots without an entry.
    vacant: Vec<u32>,
    /// Places of entries on probation, oldest first.
    new: VecDeque<u32>,
    n_new_bytes: u64,
    /// Places of entries that proved themselves, the next to be looked at first.
    main: VecDeque<u32>,
    n_bytes: u64,
    ghosts: GhostQueue,
}

struct Slot<K, V> {
    /// Reads that still count, at most [`MAX_USES`].
    uses: AtomicU8,
    /// The queue that it is in.
    queue: Queue,
    /// When it joined that queue.
    turn: u32,
    entry: Option<(K, V)>,
}

/// The queues of a shard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    /// Entries on probation.
    New,
    /// Entries that were read while on probation, or that did not have to pass it.
    Main,
}

/// What became of an entry that stood in the way of a new one.
enum Verdict {
    Evicted,
    Spared,
}

/// A frequent entry outlives so many rounds of the main queue without being read.
const MAX_USES: u8 = 3;
/// A new entry has to be read so often to stay.
const USES_TO_STAY: u8 = 1;
/// So many entries may be spared for one that comes: readers wait meanwhile, and where all have been read one of them has to
/// go anyway.
const MAX_SPARED: u64 = 256;
/// New entries have one part in so many of the room.
const NEW_PART: u64 = 10;
/// Writers wait for writers of the same shard only; readers take all locks, so there are not many of them.
const MAX_SHARDS: u64 = 8;
/// A shard has room for a good number of entries, or their sizes would leave much of it unused.
const MIN_SHARD_BYTES: u64 = 1 << 20;

impl<K: Copy + Eq + Hash, V> BoundedCache<K, V> {
    /// An empty cache of at most `max_bytes`, as `weigh` counts them, for metrics to count under `name`.
    pub fn new(name: CacheName, max_bytes: u64, weigh: fn(&K, &V) -> u64) -> Self {
        let n_shards = (max_bytes / MIN_SHARD_BYTES).clamp(1, MAX_SHARDS);
        let shards = (0..n_shards).map(|_| RwLock::new(Shard::default())).collect();
        let (max_bytes, hasher, turns) = (max_bytes / n_shards, RandomState::default(), AtomicU32::new(0));
        BoundedCache { shared: Arc::new(Shared { name, weigh, max_bytes, hasher, turns, shards }) }
    }

    /// The name that metrics use.
    pub fn name(&self) -> CacheName {
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
        self.put(key, value, Queue::New);
    }

    /// Like [`BoundedCache::insert`], for what nobody has asked for yet: it has a whole round to be read in.
    pub fn insert_ahead(&self, key: K, value: V) {
        self.put(key, value, Queue::Main);
    }

    fn put(&self, key: K, value: V, first: Queue) {
        let shared = &*self.shared;
        let hash = shared.hasher.hash_one(key);
        let n_evicted = write_lock(shared.shard(hash)).insert((key, value), hash, first, shared);
        if n_evicted > 0 {
            events::cache_evicted(shared.name.as_str(), n_evicted);
        }
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Usage {
        let shared = &*self.shared;
        let max_bytes = shared.max_bytes * shared.shards.len() as u64;
        let mut usage = Usage { cache: shared.name.as_str(), n_entries: 0, n_bytes: 0, max_bytes };
        for shard in shared.shards.iter().map(read_lock) {
            usage.n_entries += shard.table.len() as u64;
            usage.n_bytes += shard.n_bytes;
        }
        usage
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

    fn next_turn(&self) -> u32 {
        self.turns.fetch_add(1, Ordering::Relaxed)
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
        Shard {
            table: HashTable::new(),
            slots: Vec::new(),
            vacant: Vec::new(),
            new: VecDeque::new(),
            n_new_bytes: 0,
            main: VecDeque::new(),
            n_bytes: 0,
            ghosts: GhostQueue::default(),
        }
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
    fn insert(&mut self, entry: (K, V), hash: u64, first: Queue, shared: &Shared<K, V>) -> u64 {
        let n_bytes = (shared.weigh)(&entry.0, &entry.1);
        if let Some(place) = self.find(&entry.0, hash) {
            let slot = &mut self.slots[place as usize];
            let n_old_bytes = slot.entry.replace(entry).map_or(0, |(key, value)| (shared.weigh)(&key, &value));
            if slot.queue == Queue::New {
                self.n_new_bytes = self.n_new_bytes + n_bytes - n_old_bytes;
            }
            self.n_bytes = self.n_bytes + n_bytes - n_old_bytes;
            return self.make_room(0, Some(place), shared);
        }
        let n_evicted = self.make_room(n_bytes, None, shared);
        // An entry that returns soon after its eviction is asked for more often than probation could see.
        let queue = if self.ghosts.take(hash) { Queue::Main } else { first };
        let slot = Slot { uses: AtomicU8::new(0), queue, turn: shared.next_turn(), entry: Some(entry) };
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
        match queue {
            Queue::New => {
                self.n_new_bytes += n_bytes;
                self.new.push_back(place);
            }
            Queue::Main => self.main.push_back(place),
        }
        let slots = &self.slots;
        let rehash =
            |place: &u32| slots[*place as usize].entry.as_ref().map_or(0, |(key, _)| shared.hasher.hash_one(key));
        self.table.insert_unique(hash, place, rehash);
        n_evicted
    }

    /// Evicts until `n_bytes` more fit, or nothing is left but the entry at `keep`. Returns how many entries went.
    fn make_room(&mut self, n_bytes: u64, keep: Option<u32>, shared: &Shared<K, V>) -> u64 {
        let (mut n_evicted, mut n_spared) = (0, 0);
        while self.n_bytes + n_bytes > shared.max_bytes && self.table.len() > usize::from(keep.is_some()) {
            let may_spare = n_spared < MAX_SPARED;
            let new_has_its_part = self.n_new_bytes > shared.max_bytes / NEW_PART;
            let nothing_in_main = self.main.iter().all(|place| keep == Some(*place));
            let verdict = if new_has_its_part || nothing_in_main {
                self.review_oldest_new(keep, may_spare, shared)
            } else {
                self.review_next_of_main(keep, may_spare, shared)
            };
            match verdict {
                Verdict::Evicted => n_evicted += 1,
                Verdict::Spared => n_spared += 1,
            }
        }
        n_evicted
    }

    /// Moves the oldest new entry to the main queue if it was read; evicts it otherwise.
    fn review_oldest_new(&mut self, keep: Option<u32>, may_spare: bool, shared: &Shared<K, V>) -> Verdict {
        let Some(place) = self.new.pop_front() else { return Verdict::Spared };
        let slot = &mut self.slots[place as usize];
        self.n_new_bytes -= slot.entry.as_ref().map_or(0, |(key, value)| (shared.weigh)(key, value));
        let was_read = *slot.uses.get_mut() >= USES_TO_STAY;
        if keep == Some(place) || (may_spare && was_read) {
            slot.queue = Queue::Main;
            self.requeue(place, shared);
            return Verdict::Spared;
        }
        if let Some(hash) = self.remove(place, shared) {
            self.ghosts.add(hash, self.main.len());
        }
        Verdict::Evicted
    }

    /// Gives the next entry of the main queue another round if it was read; evicts it otherwise.
    fn review_next_of_main(&mut self, keep: Option<u32>, may_spare: bool, shared: &Shared<K, V>) -> Verdict {
        let Some(place) = self.main.pop_front() else { return Verdict::Spared };
        let was_read = *self.slots[place as usize].uses.get_mut() > 0;
        if keep == Some(place) || (may_spare && was_read) {
            self.requeue(place, shared);
            return Verdict::Spared;
        }
        self.remove(place, shared);
        Verdict::Evicted
    }

    /// Puts an entry at the end of the main queue. That costs it one of its reads.
    fn requeue(&mut self, place: u32, shared: &Shared<K, V>) {
        let slot = &mut self.slots[place as usize];
        slot.turn = shared.next_turn();
        let uses = slot.uses.get_mut();
        *uses = uses.saturating_sub(1);
        self.main.push_back(place);
    }

    /// Empties a slot that has left its queue; returns its entry's hash.
    fn remove(&mut self, place: u32, shared: &Shared<K, V>) -> Option<u64> {
        let (key, value) = self.slots[place as usize].entry.take()?;
        self.n_bytes -= (shared.weigh)(&key, &value);
        let hash = shared.hasher.hash_one(key);
        if let Ok(found) = self.table.find_entry(hash, |at| *at == place) {
            found.remove();
        }
        self.vacant.push(place);
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

#[cfg(test)]
mod tests;
