//! Admission: which requests are accepted, and how much time each stage has.
//!
//! tonic's own concurrency limit is per connection, and an expired `grpc-timeout` makes it answer CANCELLED and drop the
//! future. So the limit over all connections is here, and so is the deadline: the server answers shortly before it.

use crate::{
    content::EncoderGate,
    domain::error::{Error, ShedReason},
    telemetry::events::{self, Encoding, InFlight},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The global limits on requests that are worked on, and on requests that wait for the encoder.
#[derive(Debug)]
pub struct Admission {
    in_flight: Arc<Semaphore>,
    encoding: Arc<Semaphore>,
}

/// Held while a request is in flight or waits for the encoder.
///
/// A request that has to wait for the encoder gives its place in flight to others: it does nothing but wait, for a thousand times
/// as long as a hot request takes. Its work after that is bounded by the number of requests that may wait.
#[derive(Debug)]
pub struct Permit {
    encoding_places: Arc<Semaphore>,
    /// Never held across an await.
    place: Mutex<Place>,
}

#[derive(Debug)]
#[expect(dead_code, reason = "held for their drops, never read")]
enum Place {
    InFlight(OwnedSemaphorePermit, InFlight),
    Encoding(OwnedSemaphorePermit, Encoding),
}

impl EncoderGate for Permit {
    fn enter(&self) -> bool {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Place::InFlight(..) = *place {
            let Ok(permit) = Arc::clone(&self.encoding_places).try_acquire_owned() else { return false };
            *place = Place::Encoding(permit, Encoding::start());
        }
        true
    }
}

/// The shortest time that a rejected caller should wait before it retries: a few times the duration of a hot request.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// A request may spend at most one part in `MAX_WAIT_DIVISOR` of its remaining time in the scoring queue. If the queue took
/// all of it, no request would be answered: every job would expire just before or just after its turn. Half leaves room for
/// a wrong estimate.
const MAX_WAIT_DIVISOR: u32 = 2;

impl Admission {
    /// Allows at most `max_in_flight` requests to be worked on at once, and `max_encoding` to wait for the encoder.
    pub fn new(max_in_flight: usize, max_encoding: usize) -> Self {
        let places = |n| Arc::new(Semaphore::new(n));
        Admission { in_flight: places(max_in_flight), encoding: places(max_encoding) }
    }

    /// Sheds a request if one that was admitted now would be shed.
    pub fn check(&self) -> Result<(), Error> {
        if self.in_flight.available_permits() > 0 { Ok(()) } else { Err(counted_shed()) }
    }

    /// Admits a request, or sheds it at once if too many are in flight.
    pub fn admit(&self) -> Result<Permit, Error> {
        let permit = Arc::clone(&self.in_flight).try_acquire_owned().map_err(|_none_left| counted_shed())?;
        let place = Mutex::new(Place::InFlight(permit, InFlight::start()));
        Ok(Permit { encoding_places: Arc::clone(&self.encoding), place })
    }
}

fn counted_shed() -> Error {
    events::shed(ShedReason::InFlight, 1);
    shed(ShedReason::InFlight)
}

/// The error for work that was shed for `reason`.
pub fn shed(reason: ShedReason) -> Error {
    Error::Shed { reason, retry_after: RETRY_AFTER }
}

/// Sheds a request if its expected `wait` for an inference thread takes too much of its `remaining` time. A request that is
/// shed early can still be answered by another replica.
pub fn check_wait(wait: Duration, remaining: Duration) -> Result<(), Error> {
    if wait <= remaining / MAX_WAIT_DIVISOR {
        return Ok(());
    }
    events::shed(ShedReason::TowerQueue, 1);
    Err(Error::Shed { reason: ShedReason::TowerQueue, retry_after: wait.max(RETRY_AFTER) })
}

/// The deadlines of the stages of one request, derived from the moment at which its caller stops waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Content embeddings that are not ready by then are left out of the answer.
    pub encode_by: Instant,
    /// Item records that are not ready by then are left out of the answer.
    pub embed_by: Instant,
    /// The answer must leave the pipeline by then.
    pub answer_by: Instant,
}

/// Time to serialise the answer and send it.
const WIRE: Reserve = Reserve { one_in: 10, at_most: Duration::from_millis(20) };
/// Time to score the embeddings that are ready, so that cached candidates are answered however late the others are.
const SCORING: Reserve = Reserve { one_in: 4, at_most: Duration::from_millis(40) };
/// Time to run the item tower on the content embeddings that are ready when the wait for the encoder ends.
const ITEM_TOWER: Reserve = Reserve { one_in: 8, at_most: Duration::from_millis(20) };

/// One part in `one_in` of the remaining time, but no more than `at_most`.
struct Reserve {
    one_in: u32,
    at_most: Duration,
}

impl Reserve {
    fn before(&self, end: Instant, now: Instant) -> Instant {
        let remaining = end.saturating_duration_since(now);
        end - (remaining / self.one_in).min(self.at_most)
    }
}

impl Deadlines {
    /// Splits the time between `now` and `deadline`.
    pub fn split(now: Instant, deadline: Instant) -> Self {
        let answer_by = WIRE.before(deadline, now);
        let embed_by = SCORING.before(answer_by, now);
        Deadlines { encode_by: ITEM_TOWER.before(embed_by, now), embed_by, answer_by }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_over_the_limit_is_shed_and_a_dropped_permit_is_free_again() {
        let admission = Admission::new(1, 1);
        let permit = admission.admit().unwrap();
        let is_shed =
            |result: Result<(), Error>| matches!(result, Err(Error::Shed { reason: ShedReason::InFlight, .. }));
        assert!(is_shed(admission.check()) && is_shed(admission.admit().map(drop)));
        drop(permit);
        admission.check().unwrap();
        admission.admit().unwrap();
    }

    #[test]
    fn a_request_that_waits_for_the_encoder_leaves_its_place_to_a_hot_one() {
        let admission = Admission::new(1, 1);
        let cold = admission.admit().unwrap();
        assert!(cold.enter() && cold.enter());
        let second = admission.admit().unwrap();
        assert!(!second.enter(), "two requests wait for the encoder, and one may");
        assert!(admission.admit().is_err(), "a request that may not wait keeps its place");
        drop(cold);
        assert!(second.enter());
        admission.admit().unwrap();
    }

    #[test]
    fn a_request_that_would_wait_too_long_is_shed_with_a_retry_time() {
        let ms = Duration::from_millis;
        assert!(check_wait(ms(0), ms(0)).is_ok());
        assert!(check_wait(ms(50), ms(100)).is_ok());
        let shed = check_wait(ms(80), ms(100));
        assert!(
            matches!(shed, Err(Error::Shed { reason: ShedReason::TowerQueue, retry_after }) if retry_after == ms(80)),
            "{shed:?}"
        );
    }

    #[test]
    fn every_stage_ends_before_the_callers_deadline() {
        let now = Instant::now();
        let at = |ms: u64| now + Duration::from_millis(ms);
        let split = |encode_by, embed_by, answer_by| Deadlines { encode_by, embed_by, answer_by };
        assert_eq!(Deadlines::split(now, at(1000)), split(at(920), at(940), at(980)));
        for budget in [1, 5, 20, 50, 300, 60_000] {
            let Deadlines { encode_by, embed_by, answer_by } = Deadlines::split(now, at(budget));
            assert!(now < encode_by && encode_by < embed_by && embed_by < answer_by && answer_by < at(budget));
            let encoding = encode_by - now;
            assert!(encoding * 2 > at(budget) - now, "only {encoding:?} of {budget} ms remain for the encoder");
        }
        assert_eq!(Deadlines::split(now, now), split(now, now, now));
    }
}
