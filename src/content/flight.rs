//! Single flight: identical misses are encoded once, whoever asks and whoever leaves.
//!
//! The [`Flight`] travels with the job through the encoder's queue. Landing it caches the vector, then closes the flight,
//! then wakes everybody. Dropping it, by a failed batch, a panic or a shutdown, closes it and tells everybody that it
//! failed; the next caller starts a new one.

use super::{Content, ContentKey};
use crate::{domain::Vector, vector_cache::VectorCache};
use dashmap::{DashMap, Entry};
use std::sync::Arc;
use tokio::sync::watch;

type Table = DashMap<ContentKey, watch::Receiver<Option<Vector>>>;

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
    /// Joins the flight for `key`, or opens it.
    ///
    /// Holds one shard's lock for a look-up in `cache`, never across an await.
    pub(super) fn board(&self, key: ContentKey, cache: &VectorCache<ContentKey>) -> Boarding {
        match self.table.entry(key) {
            Entry::Occupied(entry) => Boarding::Followed(Landing(entry.get().clone())),
            Entry::Vacant(entry) => {
                if let Some(vector) = cache.get(&key) {
                    return Boarding::Cached(vector);
                }
                let (result, landing) = watch::channel(None);
                entry.insert(landing.clone());
                let flight = Flight { key, result, table: Arc::clone(&self.table), cache: cache.clone() };
                Boarding::Led(flight, Landing(landing))
            }
        }
    }
}

/// One vector on its way. Land it or drop it: either way nobody waits in vain.
#[derive(Debug)]
pub(super) struct Flight {
    key: ContentKey,
    result: watch::Sender<Option<Vector>>,
    table: Arc<Table>,
    cache: VectorCache<ContentKey>,
}

impl Flight {
    /// Caches `vector` and hands it to everybody who waits.
    pub(super) fn land(self, vector: Vector) {
        // Cached first: who finds the table empty afterwards must find the cache full.
        self.cache.insert(self.key, Arc::clone(&vector));
        self.table.remove(&self.key);
        self.result.send_replace(Some(vector));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        // A flight that landed may have been followed by a new one (after an eviction): that one is not ours to close.
        let ours =
            |_: &ContentKey, landing: &watch::Receiver<Option<Vector>>| landing.same_channel(&self.result.subscribe());
        self.table.remove_if(&self.key, ours);
    }
}

/// Where a flight's vector arrives.
#[derive(Debug)]
pub(super) struct Landing(watch::Receiver<Option<Vector>>);

impl Landing {
    /// What has arrived by now.
    pub(super) fn now(&self) -> Content {
        let vector = self.0.borrow().clone();
        match vector {
            Some(vector) => Content::Encoded(vector),
            None if self.0.has_changed().is_err() => Content::Failed,
            None => Content::NotInTime,
        }
    }

    /// Waits until the vector has arrived, or will not arrive. Cancel-safe: the flight goes on.
    pub(super) async fn settled(&mut self) {
        // An error says that the flight was dropped, which `now` finds as well.
        let _ = self.0.wait_for(Option::is_some).await;
    }
}
