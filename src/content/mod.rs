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

/// What an id is looked up by: 128 bits of a keyed hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdKey(pub [u64; 2]);

/// An item whose text is known. The text itself is fetched only where it has to be encoded.
#[derive(Debug, Clone)]
pub struct KnownItem {
    /// Where its text is remembered.
    pub id: IdKey,
    /// The text's digest.
    pub digest: TextDigest,
    /// The text, where it came with this request and is new.
    pub text: Option<Arc<ItemText>>,
}

/// Where the texts of known items are.
pub trait Texts: fmt::Debug + Sync {
    /// The text of `item`; none where it was forgotten, or replaced, since the item was resolved.
    fn text(&self, item: &KnownItem) -> Option<Arc<ItemText>>;
}

/// How one content embedding was come by.
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

/// What one call asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The items.
    pub items: &'a [KnownItem],
    /// Where their texts are.
    pub texts: &'a dyn Texts,
    /// Who asks.
    pub priority: Priority,
    /// What is not there by then is left to the next caller.
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
        *match self {
            Slot::Cached(_) => &mut lookups.n_hits,
            Slot::Followed(_) => &mut lookups.n_coalesced,
            Slot::Led(_) | Slot::Shed | Slot::NoText => &mut lookups.n_misses,
        } += 1;
    }
}

async fn settle(slots: &mut [Slot]) {
    for slot in slots {
        if let Slot::Led(landing) | Slot::Followed(landing) = slot {
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

impl Contents {
    /// Nothing cached, at most `max_bytes` ever.
    pub fn new(max_bytes: u64) -> Self {
        Contents { cache: VectorCache::new("content", max_bytes), flights: Flights::default() }
    }

    /// The cache, for operators.
    pub fn cache(&self) -> &VectorCache<ContentKey> {
        &self.cache
    }

    /// The content embeddings of what is wanted, in order, as far as they are to be had in time.
    ///
    /// A request is turned away (`Content::Shed`) by a full queue, warm-up waits for room. Cancel-safe: what was queued
    /// goes on and is cached.
    pub async fn embed(&self, encoder: &Encoder, wanted: Wanted<'_>) -> Vec<Content> {
        let key = |item: &KnownItem| ContentKey { encoder: encoder.digest(), text: item.digest };
        let cached = self.cache.get_many(&wanted.items.iter().map(key).collect::<Vec<_>>());
        let mut lookups = Lookups::default();
        let mut slots = Vec::with_capacity(cached.len());
        let mut jobs = Vec::new();
        for (item, cached) in wanted.items.iter().zip(cached) {
            let slot = match cached {
                Some(vector) => Slot::Cached(vector),
                None => self.begin(encoder, (key(item), item), &wanted, &mut jobs).await,
            };
            slot.count(&mut lookups);
            slots.push(slot);
        }
        encoder.submit(jobs);
        events::cache_looked_up(self.cache.name(), lookups);
        // One timer for all: after it only what has arrived counts, and thousands of late rows cost nothing more.
        let _ = tokio::time::timeout_at(wanted.until.into(), settle(&mut slots)).await;
        slots.into_iter().map(Slot::now).collect()
    }

    /// Joins or opens the flight of an item that is not cached.
    async fn begin(
        &self,
        encoder: &Encoder,
        (key, item): (ContentKey, &KnownItem),
        wanted: &Wanted<'_>,
        jobs: &mut Vec<EncodeJob>,
    ) -> Slot {
        let until = (wanted.priority == Priority::Request).then_some(wanted.until);
        // Following takes no place: what is under way is waited for, however full the queue.
        if let Some(landing) = self.flights.follow(&key, until) {
            return Slot::Followed(landing);
        }
        let Some(text) = wanted.texts.text(item) else { return Slot::NoText };
        let place = match (encoder.try_reserve(&text, wanted.priority), wanted.priority) {
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
        match self.flights.board(key, until, &self.cache) {
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
