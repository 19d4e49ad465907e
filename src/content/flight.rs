//! Single flight: identical misses are encoded once, whoever asks and whoever leaves.
//!
//! The [`Flight`] travels with the job through the encoder's queue. Landing it caches the vector, then closes the flight,
//! then wakes everybody. Dropping it, by a failed batch, a panic or a shutdown, closes it and tells everybody that it
//! failed; the next caller starts a new one.

use super::Content;
use crate::{
    cache::vectors::VectorCache,
    domain::{ContentKey, Vector},
};
use dashmap::{DashMap, Entry};
use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

type Table = DashMap<ContentKey, Pending>;

/// What the table holds of a flight.
#[derive(Debug)]
struct Pending {
    landing: watch::Receiver<Option<Vector>>,
    deadline: Arc<LatestDeadline>,
}

/// Until when a request waits for a flight. Every request that joins raises it, so that a warm-up which a request has come to
/// wait for goes first, and work whose requests are all out of time goes last.
#[derive(Debug, Default)]
struct LatestDeadline(AtomicU64);

impl LatestDeadline {
    fn raise(&self, until: Option<Instant>) {
        let until = until.map_or(0, |until| until.saturating_duration_since(*EPOCH).as_millis() as u64);
        self.0.fetch_max(until, Ordering::Relaxed);
    }

    /// Whether a request ever joined, in time or not.
    fn has_request(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    fn time_left(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed)).saturating_sub(EPOCH.elapsed())
    }
}

/// Deadlines are kept as milliseconds since then, so that they fit an atomic.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The flights under way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    table: Arc<Table>,
}

pub(super) enum Boarding {
    /// It landed between the caller's look-up and now.
    Cached(Vector),
    /// The caller has to queue the flight.
    Led(Flight, Landing),
    /// Somebody else is at it.
    Followed(Landing),
}

impl Flights {
    /// Joins the flight for `key`, if there is one. `until` is when a request stops waiting, `None` for warm-up.
    pub(super) fn follow(&self, key: &ContentKey, until: Option<Instant>) -> Option<Landing> {
        self.table.get(key).map(|pending| pending.follow(until))
    }

    /// Joins the flight for `key`, or opens it. `until` is when a request stops waiting, `None` for warm-up.
    ///
    /// Holds one shard's lock for a look-up in `cache`, never across an await.
    pub(super) fn board(&self, key: ContentKey, until: Option<Instant>, cache: &VectorCache<ContentKey>) -> Boarding {
        match self.table.entry(key) {
            Entry::Occupied(entry) => Boarding::Followed(entry.get().follow(until)),
            Entry::Vacant(entry) => {
                if let Some(vector) = cache.get(&key) {
                    return Boarding::Cached(vector);
                }
                let (result, landing) = watch::channel(None);
                let deadline = Arc::new(LatestDeadline::default());
                let landing = entry.insert(Pending { landing, deadline: Arc::clone(&deadline) }).follow(until);
                let flight = Flight { key, result, deadline, table: Arc::clone(&self.table), cache: cache.clone() };
                Boarding::Led(flight, landing)
            }
        }
    }
}

impl Pending {
    fn follow(&self, until: Option<Instant>) -> Landing {
        self.deadline.raise(until);
        Landing(self.landing.clone())
    }
}

/// One vector on its way. Land it or drop it: either way nobody waits in vain.
#[derive(Debug)]
pub(super) struct Flight {
    key: ContentKey,
    result: watch::Sender<Option<Vector>>,
    deadline: Arc<LatestDeadline>,
    table: Arc<Table>,
    cache: VectorCache<ContentKey>,
}

impl Flight {
    /// Whether a request waits for it now.
    pub(super) fn has_waiting_request(&self) -> bool {
        !self.time_left().is_zero()
    }

    /// How long a request will still wait for it; zero where none does.
    pub(super) fn time_left(&self) -> Duration {
        self.deadline.time_left()
    }

    /// Caches `vector` and hands it to everybody who waits.
    pub(super) fn land(self, vector: Vector) {
        // Cached first: who finds the table empty afterwards must find the cache full.
        match self.deadline.has_request() {
            true => self.cache.insert(self.key, Arc::clone(&vector)),
            false => self.cache.insert_ahead(self.key, Arc::clone(&vector)),
        }
        self.table.remove(&self.key);
        self.result.send_replace(Some(vector));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // A flight that landed may have been followed by a new one (after an eviction): that one is not ours to close.
        let ours = |_: &ContentKey, pending: &Pending| Arc::ptr_eq(&pending.deadline, &self.deadline);
        self.table.remove_if(&self.key, ours);
    }
}

/// Where a flight's vector arrives.
#[derive(Debug)]
pub(super) struct Landing(watch::Receiver<Option<Vector>>);

impl Landing {
    /// What has arrived by now.
    pub(super) fn now(&self) -> Content {
        // Asked before the value is read: a flight that lands in between was not dropped.
        let dropped = self.0.has_changed().is_err();
        match self.0.borrow().clone() {
            Some(vector) => Content::Encoded(vector),
            None if dropped => Content::Failed,
            None => Content::NotInTime,
        }
    }

    /// Waits until the vector has arrived, or will not arrive. Cancel-safe: the flight goes on.
    pub(super) async fn settled(&mut self) {
        // An error says that the flight was dropped, which `now` finds as well.
        let _ = self.0.wait_for(Option::is_some).await;
    }
}
