//! Admission: who may come in, and how long each stage has.
//!
//! tonic's own concurrency limit is per connection, and an expired `grpc-timeout` makes it answer CANCELLED and drop
//! the future. So the bound over all connections is here, and so is the deadline: we answer shortly before it.

use crate::{
    domain::error::{Error, ShedReason},
    telemetry::events::{self, InFlight},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The global bound on requests in flight.
#[derive(Debug)]
pub struct Admission {
    permits: Arc<Semaphore>,
}

/// Held for as long as a request is under way.
#[derive(Debug)]
pub struct Permit {
    _permit: OwnedSemaphorePermit,
    _in_flight: InFlight,
}

/// What a caller that was turned away should wait at least: a few times what a hot request takes.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// The part of a request's time that it may spend in the scoring queue. A queue as long as the deadline answers nothing:
/// every job in it expires just before, or just after, its turn. At half of it there is room for a wrong estimate.
const MAX_WAIT_PART: u32 = 2;

impl Admission {
    /// At most `max_in_flight` requests at once.
    pub fn new(max_in_flight: usize) -> Self {
        Admission { permits: Arc::new(Semaphore::new(max_in_flight)) }
    }

    /// Lets a request in, or turns it away at once.
    pub fn admit(&self) -> Result<Permit, Error> {
        match Arc::clone(&self.permits).try_acquire_owned() {
            Ok(permit) => Ok(Permit { _permit: permit, _in_flight: InFlight::start() }),
            Err(_) => {
                events::shed(ShedReason::InFlight, 1);
                Err(shed(ShedReason::InFlight))
            }
        }
    }
}

/// The error of work that was turned away for `reason`.
pub fn shed(reason: ShedReason) -> Error {
    Error::Shed { reason, retry_after: RETRY_AFTER }
}

/// Turns a request away whose `wait` for an inference thread would take too much of what is `left` of its time. Said at
/// once, it is a request that another replica can still answer.
pub fn check_wait(wait: Duration, left: Duration) -> Result<(), Error> {
    if wait <= left / MAX_WAIT_PART {
        return Ok(());
    }
    events::shed(ShedReason::TowerQueue, 1);
    Err(Error::Shed { reason: ShedReason::TowerQueue, retry_after: wait.max(RETRY_AFTER) })
}

/// When each part of a request has to be done, split from the moment at which its caller stops waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Content embeddings that are not there by then miss this answer.
    pub encode_by: Instant,
    /// Item embeddings that are not there by then miss this answer.
    pub embed_by: Instant,
    /// The answer is on its way by then.
    pub answer_by: Instant,
}

/// The answer's own way back: serialising and the wire.
const WIRE: Reserve = Reserve { of: 10, at_most: Duration::from_millis(20) };
/// Scoring what is there: what was cached is answered, however late the rest is.
const SCORING: Reserve = Reserve { of: 4, at_most: Duration::from_millis(40) };
/// The item tower over what the encoder gave, once the wait for it is over.
const ITEM_TOWER: Reserve = Reserve { of: 8, at_most: Duration::from_millis(20) };

/// One part in `of` of what is left, and no more than `at_most`.
struct Reserve {
    of: u32,
    at_most: Duration,
}

impl Reserve {
    fn before(&self, end: Instant, now: Instant) -> Instant {
        let left = end.saturating_duration_since(now);
        end - (left / self.of).min(self.at_most)
    }
}

impl Deadlines {
    /// Splits what is left between `now` and `deadline`.
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
    fn one_too_many_is_turned_away_and_a_place_that_is_left_is_free() {
        let admission = Admission::new(1);
        let permit = admission.admit().unwrap();
        assert!(matches!(admission.admit(), Err(Error::Shed { reason: ShedReason::InFlight, .. })));
        drop(permit);
        admission.admit().unwrap();
    }

    #[test]
    fn who_would_wait_too_long_is_told_at_once_when_to_come_back() {
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
    fn the_answer_leaves_before_the_caller_does() {
        let now = Instant::now();
        let at = |ms: u64| now + Duration::from_millis(ms);
        let split = |encode_by, embed_by, answer_by| Deadlines { encode_by, embed_by, answer_by };
        assert_eq!(Deadlines::split(now, at(1000)), split(at(920), at(940), at(980)));
        for budget in [1, 5, 20, 50, 300, 60_000] {
            let Deadlines { encode_by, embed_by, answer_by } = Deadlines::split(now, at(budget));
            assert!(now < encode_by && encode_by < embed_by && embed_by < answer_by && answer_by < at(budget));
            let waits = encode_by - now;
            assert!(waits * 2 > at(budget) - now, "of {budget} ms only {waits:?} are left to wait for the encoder");
        }
        assert_eq!(Deadlines::split(now, now), split(now, now, now));
    }
}
