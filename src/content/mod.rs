//! CEG, content embedding generation: item text in, the frozen LLM's vectors out.
//!
//! ```text
//! known item ──> cache ──hit─────────────────────────────────────────> vector
//!                  └─miss─> flight ──already under way──> wait ──────> vector
//!                             └─new──> queue ─> tokenize ─> batch ─> encode, cache, wake everyone who waits
//! ```
//!
//! Invariants:
//! - A vector is cached under the encoder's digest and the text's digest: everything it depends on.
//! - Identical misses, within and across requests, are encoded once.
//! - A flight belongs to the job in the queue, not to a request. A queued job is finished and its result cached even if all
//!   its callers have left, so a caller that leaves strands nobody.
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
use flight::{Boarding, Flights, Ticket};
use std::{sync::Arc, time::Instant};

/// How one content embedding was obtained, or why it was not.
#[derive(Debug, Clone)]
pub enum Content {
    /// It was cached.
    Cached(Vector),
    /// It was encoded for this call.
    Encoded(Vector),
    /// It was already being encoded for another call.
    Joined(Vector),
    /// It was not ready in time. It is still being encoded and will be cached, unless it is a warm-up's that found no room in the
    /// encoder's queue.
    NotInTime,
    /// The encoder failed on it.
    Failed,
    /// It was refused: the encoder's queue is full, or the call may not wait for the encoder.
    Shed(ShedReason),
    /// Its text was forgotten after the item was resolved.
    NoText,
}

impl Content {
    /// Why it was refused, if it was.
    pub fn shed_reason(&self) -> Option<ShedReason> {
        match self {
            Content::Shed(reason) => Some(*reason),
            _ => None,
        }
    }

    /// The vector, if there is one.
    pub fn vector(&self) -> Option<&Vector> {
        match self {
            Content::Cached(vector) | Content::Encoded(vector) | Content::Joined(vector) => Some(vector),
            Content::NotInTime | Content::Failed | Content::Shed(_) | Content::NoText => None,
        }
    }
}

/// Asked before a call waits for the encoder.
pub trait EncoderGate: std::fmt::Debug + Sync {
    /// Whether the call may. It is asked again for other items of the same call.
    fn enter(&self) -> bool;
}

/// The gate of work whose amount is bounded elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct Open;

impl EncoderGate for Open {
    fn enter(&self) -> bool {
        true
    }
}

/// A request for the content embeddings of some items.
#[derive(Debug, Clone, Copy)]
pub struct EmbedRequest<'a> {
    /// The items.
    pub items: &'a [KnownItem],
    /// Who waits for them.
    pub priority: Priority,
    /// When the caller stops waiting. Jobs that are not done by then go on, and their results are cached.
    pub until: Instant,
    /// Decides whether those that are not cached and can be encoded may be waited for. If not, they are [`Content::Shed`].
    pub gate: &'a dyn EncoderGate,
}

/// How far one item of a call has got.
enum ItemState {
    Cached(Vector),
    Led(Ticket),
    Followed(Ticket),
    Shed(ShedReason),
    NotInTime,
    NoText,
}

impl ItemState {
    fn into_content(self) -> Content {
        match self {
            ItemState::Cached(vector) => Content::Cached(vector),
            ItemState::Led(ticket) => ticket.content(),
            ItemState::Followed(ticket) => match ticket.content() {
                Content::Encoded(vector) => Content::Joined(vector),
                other => other,
            },
            ItemState::Shed(reason) => Content::Shed(reason),
            ItemState::NotInTime => Content::NotInTime,
            ItemState::NoText => Content::NoText,
        }
    }

    fn count(&self, lookups: &mut Lookups) {
        match self {
            ItemState::Cached(_) => lookups.n_hits += 1,
            ItemState::Followed(_) => lookups.n_coalesced += 1,
            ItemState::Led(_) | ItemState::Shed(_) | ItemState::NotInTime | ItemState::NoText => lookups.n_misses += 1,
        }
    }
}

/// Counts one item as refused.
fn refuse(reason: ShedReason) -> ItemState {
    events::shed(reason, 1);
    ItemState::Shed(reason)
}

async fn wait_for_all(states: &mut [ItemState]) {
    for state in states {
        if let ItemState::Led(ticket) | ItemState::Followed(ticket) = state {
            ticket.settled().await;
        }
    }
}

/// The source of content embeddings: the cache, one table of flights for all encoders, and the texts to encode.
#[derive(Debug)]
pub struct Contents {
    caches: Arc<Caches>,
    flights: Flights,
}

impl Contents {
    /// Uses the content cache and the known items of `caches`.
    pub fn new(caches: Arc<Caches>) -> Self {
        Contents { caches, flights: Flights::default() }
    }

    /// The content embedding of each item of `request`, in order, or why there is none.
    ///
    /// If the encoder's queue is full, a request is refused ([`Content::Shed`]), while warm-up waits for room, at most until
    /// `request.until`. Cancel-safe: jobs that were queued go on, and their results are cached.
    pub async fn embed(&self, encoder: &Encoder, request: EmbedRequest<'_>) -> Vec<Content> {
        let cache = &self.caches.contents;
        let key = |item: &KnownItem| ContentKey { part: encoder.digest(), text: item.digest };
        let cached = cache.get_many(&request.items.iter().map(key).collect::<Vec<_>>());
        let mut lookups = Lookups::default();
        let mut states = Vec::with_capacity(cached.len());
        let mut jobs = Vec::new();
        for (item, cached) in request.items.iter().zip(cached) {
            let state = match cached {
                Some(vector) => ItemState::Cached(vector),
                None => self.begin(encoder, item, &request, &mut jobs).await,
            };
            state.count(&mut lookups);
            states.push(state);
        }
        encoder.submit(jobs);
        events::cache_looked_up(cache.name().as_str(), lookups);
        // One timer serves all items. When it fires, items that are ready are returned and the others cost nothing more.
        let _ = tokio::time::timeout_at(request.until.into(), wait_for_all(&mut states)).await;
        states.into_iter().map(ItemState::into_content).collect()
    }

    /// Joins the flight of an item that is not cached, or opens one and appends its job to `jobs`.
    async fn begin(
        &self,
        encoder: &Encoder,
        item: &KnownItem,
        request: &EmbedRequest<'_>,
        jobs: &mut Vec<EncodeJob>,
    ) -> ItemState {
        let key = ContentKey { part: encoder.digest(), text: item.digest };
        let until = (request.priority == Priority::Request).then_some(request.until);
        let text = self.caches.known_items.text(item);
        // An item that cannot be encoded needs no place among those that wait for the encoder.
        if text.is_none() && !self.flights.has(&key) {
            return ItemState::NoText;
        }
        if !request.gate.enter() {
            return refuse(ShedReason::Encoding);
        }
        // Following needs no room in the queue: the job that is under way has its place already.
        if let Some(ticket) = self.flights.follow(&key, until) {
            return ItemState::Followed(ticket);
        }
        let Some(text) = text else { return ItemState::NoText };
        let place = match (encoder.try_reserve(&text, request.priority), request.priority) {
            (Some(place), _) => place,
            (None, Priority::Request) => return refuse(ShedReason::EncoderQueue),
            (None, Priority::WarmUp) => {
                // There may be no room until the jobs of this call have run, so they are queued first.
                encoder.submit(std::mem::take(jobs));
                let reserve = encoder.reserve_warm_up(&text);
                let Ok(place) = tokio::time::timeout_at(request.until.into(), reserve).await else {
                    return ItemState::NotInTime;
                };
                place
            }
        };
        match self.flights.board(key, until, &self.caches.contents) {
            Boarding::Cached(vector) => ItemState::Cached(vector),
            Boarding::Followed(ticket) => ItemState::Followed(ticket),
            Boarding::Led(flight, ticket) => {
                jobs.push(EncodeJob::new(text, flight, place));
                ItemState::Led(ticket)
            }
        }
    }
}

#[cfg(test)]
mod tests;
