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
    domain::{ItemText, Vector},
    error::ShedReason,
    item_text::TextDigest,
    telemetry::events::{self, Lookups},
    vector_cache::VectorCache,
};
use batcher::Priority;
use encoder::EncodeJob;
use flight::{Boarding, Flights, Landing};
use std::{fmt, sync::Arc, time::Instant};

/// Everything that a content embedding depends on beside the text: graph, weights, tokenizer, template, token limit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EncoderDigest(pub [u8; 16]);

impl fmt::Display for EncoderDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EncoderDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a content embedding is cached under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentKey {
    /// The encoder.
    pub encoder: EncoderDigest,
    /// The text.
    pub text: TextDigest,
}

/// An item whose text is known.
#[derive(Debug, Clone)]
pub struct KnownItem {
    /// The text's digest.
    pub digest: TextDigest,
    /// The text, for the encoder.
    pub text: Arc<ItemText>,
}

/// How one content embedding was come by.
#[derive(Debug, Clone)]
pub enum Content {
    /// It was cached.
    Cached(Vector),
    /// It was encoded just now, for this caller or for another.
    Encoded(Vector),
    /// It is being encoded, and will be cached.
    NotInTime,
    /// The encoder failed on it.
    Failed,
    /// The encoder's queue is full.
    Shed,
}

impl Content {
    /// The vector, if there is one.
    pub fn vector(&self) -> Option<&Vector> {
        match self {
            Content::Cached(vector) | Content::Encoded(vector) => Some(vector),
            Content::NotInTime | Content::Failed | Content::Shed => None,
        }
    }
}

impl Slot {
    fn now(self) -> Content {
        match self {
            Slot::Cached(vector) => Content::Cached(vector),
            Slot::Shed => Content::Shed,
            Slot::Waiting(landing) => landing.now(),
        }
    }
}

async fn settle(slots: &mut [Slot]) {
    for slot in slots {
        if let Slot::Waiting(landing) = slot {
            landing.settled().await;
        }
    }
}

/// The content embeddings of the process: one cache and one table of flights for all encoders.
#[derive(Debug)]
pub struct Contents {
    cache: VectorCache<ContentKey>,
    flights: Flights,
}

enum Slot {
    Cached(Vector),
    Waiting(Landing),
    Shed,
}

impl Contents {
    /// Nothing cached, at most `max_bytes` ever.
    pub fn new(max_bytes: u64) -> Self {
        Contents { cache: VectorCache::new("content", max_bytes), flights: Flights::default() }
    }

    /// The cache, for operators.
    pub fn cache(&self) -> &VectorCache<ContentKey> {
        &self.cache
    }

    /// The content embeddings of `items`, in order, as far as they are to be had `until` then.
    ///
    /// A request is turned away (`Content::Shed`) by a full queue, warm-up waits for room. Cancel-safe: what was queued
    /// goes on and is cached.
    pub async fn embed(
        &self,
        encoder: &Encoder,
        items: &[KnownItem],
        priority: Priority,
        until: Instant,
    ) -> Vec<Content> {
        let mut lookups = Lookups::default();
        let mut slots = Vec::with_capacity(items.len());
        let mut jobs = Vec::new();
        for item in items {
            slots.push(self.begin(encoder, item, (priority, until), &mut lookups, &mut jobs).await);
        }
        encoder.submit(jobs);
        events::cache_looked_up(self.cache.name(), lookups);
        // One timer for all: after it only what has arrived counts, and thousands of late rows cost nothing more.
        let _ = tokio::time::timeout_at(until.into(), settle(&mut slots)).await;
        slots.into_iter().map(Slot::now).collect()
    }

    #[expect(clippy::too_many_arguments, reason = "the loop body of `embed`, kept apart to be read")]
    async fn begin(
        &self,
        encoder: &Encoder,
        item: &KnownItem,
        (priority, until): (Priority, Instant),
        lookups: &mut Lookups,
        jobs: &mut Vec<EncodeJob>,
    ) -> Slot {
        let key = ContentKey { encoder: encoder.digest(), text: item.digest };
        if let Some(vector) = self.cache.get(&key) {
            lookups.n_hits += 1;
            return Slot::Cached(vector);
        }
        let until = (priority == Priority::Request).then_some(until);
        // Following takes no place: what is under way is waited for, however full the queue.
        if let Some(landing) = self.flights.follow(&key, until) {
            lookups.n_coalesced += 1;
            return Slot::Waiting(landing);
        }
        let place = match (encoder.try_reserve(priority), priority) {
            (Some(place), _) => place,
            (None, Priority::Request) => {
                lookups.n_misses += 1;
                events::shed(ShedReason::EncoderQueue, 1);
                return Slot::Shed;
            }
            (None, Priority::WarmUp) => {
                // What this call queued so far has to run before there is room.
                encoder.submit(std::mem::take(jobs));
                encoder.reserve_warm_up().await
            }
        };
        match self.flights.board(key, until, &self.cache) {
            Boarding::Cached(vector) => {
                lookups.n_hits += 1;
                Slot::Cached(vector)
            }
            Boarding::Followed(landing) => {
                lookups.n_coalesced += 1;
                Slot::Waiting(landing)
            }
            Boarding::Led(flight, landing) => {
                lookups.n_misses += 1;
                jobs.push(EncodeJob::new(Arc::clone(&item.text), flight, place));
                Slot::Waiting(landing)
            }
        }
    }
}

#[cfg(test)]
mod tests;
