//! Single flight: identical misses are encoded once, even if callers leave.
//!
//! The first caller to miss a key leads: it gets the [`Flight`], which travels with the job through the encoder's queue, and a
//! [`Ticket`] to wait with. Later callers follow: they get a ticket only. [`Flight::land`] caches the vector, then removes the
//! flight from the table, then wakes everyone who waits. Dropping a flight, because of a failed batch, a panic or a shutdown,
//! also removes it and tells everyone that it failed; the next caller leads a new one.
//!
//! `interleavings` checks this protocol with loom (`--features loom`).

use super::Content;
use crate::{
    cache::vectors::VectorCache,
    domain::{ContentKey, Vector},
};
#[cfg(not(feature = "loom"))]
use dashmap::{DashMap, Entry};
#[cfg(feature = "loom")]
use stand_ins::{DashMap, Entry, watch};
use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
#[cfg(not(feature = "loom"))]
use tokio::sync::watch;

type Table = DashMap<ContentKey, TableEntry>;

/// A flight's entry in the table.
#[derive(Debug)]
struct TableEntry {
    result: watch::Receiver<Option<Vector>>,
    deadline: Arc<LatestDeadline>,
}

/// The latest deadline of the requests that wait for a flight, in milliseconds since [`EPOCH`]; 0 if only warm-up waits.
///
/// Every request that joins raises it. So a warm-up job that a request has joined gets ahead, and a job whose requests have all
/// run out of time falls behind.
#[derive(Debug, Default)]
struct LatestDeadline(AtomicU64);

impl LatestDeadline {
    fn raise(&self, until: Option<Instant>) {
        let until = until.map_or(0, |until| until.saturating_duration_since(*EPOCH).as_millis() as u64);
        self.0.fetch_max(until, Ordering::Relaxed);
    }

    /// Whether a request ever joined, even if it has run out of time since.
    fn has_request(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    fn time_left(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed)).saturating_sub(EPOCH.elapsed())
    }
}

/// Deadlines are milliseconds since this moment, so that they fit into an atomic.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The flights under way, by key.
#[derive(Debug, Default)]
pub(super) struct Flights {
    table: Arc<Table>,
}

pub(super) enum Boarding {
    /// A flight landed after the caller's look-up, so the vector is cached now.
    Cached(Vector),
    /// The caller leads: it must queue the flight.
    Led(Flight, Ticket),
    /// The flight is already under way.
    Followed(Ticket),
}

impl Flights {
    /// Whether there is a flight for `key`.
    pub(super) fn has(&self, key: &ContentKey) -> bool {
        self.table.get(key).is_some()
    }

    /// Joins the flight for `key`, if there is one. `until` is when a request stops waiting; `None` for warm-up.
    pub(super) fn follow(&self, key: &ContentKey, until: Option<Instant>) -> Option<Ticket> {
        self.table.get(key).map(|entry| entry.follow(until))
    }

    /// Joins the flight for `key`, or opens one. `until` is when a request stops waiting; `None` for warm-up.
    ///
    /// Holds the lock of one shard of the table for a look-up in `cache`, never across an await.
    pub(super) fn board(&self, key: ContentKey, until: Option<Instant>, cache: &VectorCache<ContentKey>) -> Boarding {
        match self.table.entry(key) {
            Entry::Occupied(entry) => Boarding::Followed(entry.get().follow(until)),
            Entry::Vacant(entry) => {
                if let Some(vector) = cache.get(&key) {
                    return Boarding::Cached(vector);
                }
                let (sender, receiver) = watch::channel(None);
                let deadline = Arc::new(LatestDeadline::default());
                let ticket =
                    entry.insert(TableEntry { result: receiver, deadline: Arc::clone(&deadline) }).follow(until);
                let flight =
                    Flight { key, result: sender, deadline, table: Arc::clone(&self.table), cache: cache.clone() };
                Boarding::Led(flight, ticket)
            }
        }
    }
}

impl TableEntry {
    fn follow(&self, until: Option<Instant>) -> Ticket {
        self.deadline.raise(until);
        Ticket(self.result.clone())
    }
}

/// A vector that its owner has to compute. Landing or dropping the flight answers everyone who waits.
#[derive(Debug)]
pub(super) struct Flight {
    key: ContentKey,
    result: watch::Sender<Option<Vector>>,
    deadline: Arc<LatestDeadline>,
    table: Arc<Table>,
    cache: VectorCache<ContentKey>,
}

impl Flight {
    /// Whether a request is waiting for it.
    pub(super) fn has_waiting_request(&self) -> bool {
        !self.time_left().is_zero()
    }

    /// How long a request will still wait for it; zero if none does.
    pub(super) fn time_left(&self) -> Duration {
        self.deadline.time_left()
    }

    /// Caches `vector` and hands it to everyone who waits.
    pub(super) fn land(self, vector: Vector) {
        // The cache comes first: a caller that no longer finds the flight in the table must find the vector in the cache.
        if self.deadline.has_request() {
            self.cache.insert(self.key, Arc::clone(&vector));
        } else {
            self.cache.insert_ahead(self.key, Arc::clone(&vector));
        }
        self.table.remove(&self.key);
        self.result.send_replace(Some(vector));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // If this flight landed and its vector was evicted, a newer flight may be in the table. It must stay.
        let is_own = |_: &ContentKey, entry: &TableEntry| Arc::ptr_eq(&entry.deadline, &self.deadline);
        self.table.remove_if(&self.key, is_own);
    }
}

/// A caller's claim to the result of a flight.
#[derive(Debug)]
pub(super) struct Ticket(watch::Receiver<Option<Vector>>);

impl Ticket {
    /// The result, if it has arrived.
    pub(super) fn content(&self) -> Content {
        // The order matters: a flight that lands between the two reads must not look like one that was dropped.
        let was_dropped = self.0.has_changed().is_err();
        match self.0.borrow().clone() {
            Some(vector) => Content::Encoded(vector),
            None if was_dropped => Content::Failed,
            None => Content::NotInTime,
        }
    }

    /// Waits until the vector has arrived or the flight was dropped. Cancel-safe: the flight goes on.
    pub(super) async fn settled(&mut self) {
        // An error says that the flight was dropped, which `content` reports too.
        let _ = self.0.wait_for(Option::is_some).await;
    }
}

#[cfg(all(test, feature = "loom"))]
mod interleavings;
#[cfg(feature = "loom")]
mod stand_ins;
