//! CEG, content embedding generation: item text in, the frozen LLM's vectors out.
//!
//! ```text
//! known item ──> cache ──hit──────────────────────────────────────────> vector
//!                  └─miss─> flight ──somebody is at it─> wait ─────────> vector
//!                             └─first─> queue ─> tokenize ─> batch ─> encode, cache, wake all who wait
//! ```
//!
//! Invariants:
//! - A vector is cached under the encoder's digest and the text's digest: everything it depends on.
//! - Identical misses, within and across requests, are encoded once.
//! - A flight belongs to the job in the queue, not to a request. Work that was queued is finished and cached whoever stays
//!   to wait for it, so a caller that leaves strands nobody.
//! - A failure or a vector that is not finite is never cached.

pub mod batcher;
pub mod encoder;
mod flight;
pub mod tokenizer;

pub use encoder::{EncodeError, Encoder, EncoderModel};
pub use tokenizer::{Tokenizer, TokenizerError};

use crate::{
    cache::Caches,
    domain::{ContentKey, KnownItem, Priority, Vector, error::ShedReason},
    telemetry::events::{self, Lookups},
};
use encoder::EncodeJob;
use flight::{Boarding, Flights, Landing};
use std::{sync::Arc, time::Instant};

/// How one content embedding was obtained, or why it was not.
#[derive(Debug, Clone)]
pub enum Content {
    /// It was cached.
    Cached(Vector),
    /// It was encoded just now, for this caller.
    Encoded(Vector),
    /// It was being encoded already, for another caller.
    Joined(Vector),
    /// It is being encoded, and will be cached.
    NotInTime,
    /// The encoder failed on it.
    Failed,
    /// The encoder's queue is full.
    Shed,
    /// Its text was forgotten between being looked up and being needed.
    NoText,
}

impl Content {
    /// The vector, if there is one.
    pub fn vector(&self) -> Option<&Vector> {
        match self {
            Content::Cached(vector) | Content::Encoded(vector) | Content::Joined(vector) => Some(vector),
            Content::NotInTime | Content::Failed | Content::Shed | Content::NoText => None,
        }
    }
}

/// The items whose content embeddings one call asks for.
#[derive(Debug, Clone, Copy)]
pub struct EmbedRequest<'a> {
    /// The items.
    pub items: &'a [KnownItem],
    /// Who waits for them.
    pub priority: Priority,
    /// The caller stops waiting then. Encoding that is under way goes on, and its result is cached.
    pub until: Instant,
}

/// One item on its way.
enum Slot {
    Cached(Vector),
    Led(Landing),
    Followed(Landing),
    Shed,
    NoText,
}

impl Slot {
    fn now(self) -> Content {
        match self {
            Slot::Cached(vector) => Content::Cached(vector),
            Slot::Led(landing) => landing.now(),
            Slot::Followed(landing) => match landing.now() {
                Content::Encoded(vector) => Content::Joined(vector),
                other => other,
            },
            Slot::Shed => Content::Shed,
            Slot::NoText => Content::NoText,
        }
    }

    fn count(&self, lookups: &mut Lookups) {
        match self {
            Slot::Cached(_) => lookups.n_hits += 1,
            Slot::Followed(_) => lookups.n_coalesced += 1,
            Slot::Led(_) | Slot::Shed | Slot::NoText => lookups.n_misses += 1,
        }
    }
}

async fn settle(slots: &mut [Slot]) {
    for slot in slots {
        if let Slot::Led(landing) | Slot::Followed(landing) = slot {
            landing.settled().await;
        }
    }
}

/// Where content embeddings come from: one cache, one table of flights for all encoders, and the texts to encode.
#[derive(Debug)]
pub struct Contents {
    caches: Arc<Caches>,
    flights: Flights,
}

impl Contents {
    /// Reads and fills the content cache of `caches`, and takes texts from its known items.
    pub fn new(caches: Arc<Caches>) -> Self {
        Contents { caches, flights: Flights::default() }
    }

    /// The content embedding of each item of `request`, in order, or why there is none.
    ///
    /// A full queue turns a request away ([`Content::Shed`]); warm-up waits for room. Cancel-safe: encoding that was queued
    /// goes on, and its result is cached.
    pub async fn embed(&self, encoder: &Encoder, request: EmbedRequest<'_>) -> Vec<Content> {
        let cache = &self.caches.contents;
        let key = |item: &KnownItem| ContentKey { part: encoder.digest(), text: item.digest };
        let cached = cache.get_many(&request.items.iter().map(key).collect::<Vec<_>>());
        let mut lookups = Lookups::default();
        let mut slots = Vec::with_capacity(cached.len());
        let mut jobs = Vec::new();
        for (item, cached) in request.items.iter().zip(cached) {
            let slot = match cached {
                Some(vector) => Slot::Cached(vector),
                None => self.begin(encoder, item, &request, &mut jobs).await,
            };
            slot.count(&mut lookups);
            slots.push(slot);
        }
        encoder.submit(jobs);
        events::cache_looked_up(cache.name().as_str(), lookups);
        // One timer for all: after it only what has arrived counts, and thousands of late rows cost nothing more.
        let _ = tokio::time::timeout_at(request.until.into(), settle(&mut slots)).await;
        slots.into_iter().map(Slot::now).collect()
    }

    /// Joins or opens the flight of an item that is not cached.
    async fn begin(
        &self,
        encoder: &Encoder,
        item: &KnownItem,
        request: &EmbedRequest<'_>,
        jobs: &mut Vec<EncodeJob>,
    ) -> Slot {
        let key = ContentKey { part: encoder.digest(), text: item.digest };
        let until = (request.priority == Priority::Request).then_some(request.until);
        // Following needs no room in the queue: the text is in it already.
        if let Some(landing) = self.flights.follow(&key, until) {
            return Slot::Followed(landing);
        }
        let Some(text) = self.caches.known_items.text(item) else { return Slot::NoText };
        let place = match (encoder.try_reserve(&text, request.priority), request.priority) {
            (Some(place), _) => place,
            (None, Priority::Request) => {
                events::shed(ShedReason::EncoderQueue, 1);
                return Slot::Shed;
            }
            (None, Priority::WarmUp) => {
                // What this call queued so far has to run before there is room.
                encoder.submit(std::mem::take(jobs));
                encoder.reserve_warm_up(&text).await
            }
        };
        match self.flights.board(key, until, &self.caches.contents) {
            Boarding::Cached(vector) => Slot::Cached(vector),
            Boarding::Followed(landing) => Slot::Followed(landing),
            Boarding::Led(flight, landing) => {
                jobs.push(EncodeJob::new(text, flight, place));
                Slot::Led(landing)
            }
        }
    }
}

#[cfg(test)]
mod tests;
