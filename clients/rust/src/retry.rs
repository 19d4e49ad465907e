//! Which failures are worth another attempt, and when.

use crate::{
    Error,
    deadline::{Deadline, is_local_timeout},
    replicas::Availability,
};
use std::{error::Error as _, time::Duration};
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// How often and how fast a call is sent again. All attempts and pauses share the call's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The most attempts per request; 1 never sends a request again. When rows of a page come back `UNKNOWN_ITEM`, the client
    /// sends a second request for them, with as many attempts of its own: `get_mid_emb` sends at most twice this number.
    pub max_attempts: u32,
    /// The longest pause before the second attempt. Each further pause may be twice as long as the one before. The pause
    /// itself is drawn at random below that, so that callers do not come back all at once. There is no pause where another
    /// replica can be asked instead.
    pub first_backoff: Duration,
    /// No pause is longer, except one that the server asks for.
    pub max_backoff: Duration,
}

impl RetryPolicy {
    /// One attempt.
    pub const NEVER: RetryPolicy =
        RetryPolicy { max_attempts: 1, first_backoff: Duration::ZERO, max_backoff: Duration::ZERO };
}

impl Default for RetryPolicy {
    /// Four attempts, with pauses of up to 10, 20 and 40 ms.
    fn default() -> Self {
        RetryPolicy {
            max_attempts: 4,
            first_backoff: Duration::from_millis(10),
            max_backoff: Duration::from_millis(200),
        }
    }
}

/// What a failed attempt means for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The replica did not serve the call: it is starting, draining or gone, or the connection broke before an answer came.
    /// Calls of this client change nothing on the server, so another attempt is safe.
    Unanswered,
    /// The replica is overloaded and says how long to wait.
    Shed(Duration),
    /// Another attempt would end in the same way, or is not known to be safe.
    Final,
}

impl Failure {
    pub(crate) fn of(status: &Status) -> Self {
        match status.code() {
            Code::Unavailable => Failure::Unanswered,
            _ if is_local_timeout(status) => Failure::Final,
            // A status that a server sent has no source: here the connection ended before an answer came.
            Code::Cancelled | Code::Internal | Code::Unknown if status.source().is_some() => Failure::Unanswered,
            Code::ResourceExhausted => match status.get_details_retry_info().and_then(|info| info.retry_delay) {
                Some(delay) => Failure::Shed(delay),
                None => Failure::Final,
            },
            _ => Failure::Final,
        }
    }
}

/// The attempts of one call.
#[derive(Debug)]
pub(crate) struct Attempts {
    method: &'static str,
    policy: RetryPolicy,
    deadline: Deadline,
    n_failed: u32,
}

impl Attempts {
    pub(crate) fn new(method: &'static str, policy: RetryPolicy, deadline: Deadline) -> Self {
        Attempts { method, policy, deadline, n_failed: 0 }
    }

    /// Waits until the next attempt is due, or returns the call's error if there is none.
    pub(crate) async fn wait_after(&mut self, status: Status, replicas: Availability) -> Result<(), Error> {
        self.n_failed += 1;
        if self.deadline.explains(&status) {
            return Err(self.deadline.error(self.method));
        }
        let pause = match Failure::of(&status) {
            Failure::Unanswered => match replicas {
                Availability::SomeReady => Duration::ZERO,
                Availability::NoneReady => self.backoff(),
            },
            // Up to half as long again as the server asked, so that callers do not come back all at once.
            Failure::Shed(delay) => delay.mul_f64(1.0 + fastrand::f64() / 2.0),
            Failure::Final => return Err(Error::failed(self.method)(status)),
        };
        if self.n_failed >= self.policy.max_attempts || pause >= self.deadline.remaining() {
            return Err(Error::failed(self.method)(status));
        }
        sleep(pause).await;
        Ok(())
    }

    fn backoff(&self) -> Duration {
        let n_doublings = (self.n_failed - 1).min(16);
        let longest = self.policy.first_backoff.saturating_mul(1 << n_doublings).min(self.policy.max_backoff);
        longest.mul_f64(fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;
    use tonic_types::ErrorDetails;

    fn shed(delay: Duration) -> Status {
        let details = ErrorDetails::with_retry_info(Some(delay));
        Status::with_error_details(Code::ResourceExhausted, "busy", details)
    }

    fn attempts(max_attempts: u32, deadline: Duration) -> Attempts {
        let policy = RetryPolicy { max_attempts, ..RetryPolicy::default() };
        Attempts::new("GetMidEmb", policy, Deadline::after(deadline))
    }

    #[test]
    fn only_calls_that_no_server_took_or_that_were_shed_are_sent_again() {
        let mut broken = Status::internal("h2");
        broken.set_source(std::sync::Arc::new(std::io::Error::other("connection reset")));
        assert_eq!(Failure::of(&Status::unavailable("draining")), Failure::Unanswered);
        assert_eq!(Failure::of(&broken), Failure::Unanswered);
        assert_eq!(Failure::of(&Status::internal("a fault of the server")), Failure::Final);
        assert_eq!(Failure::of(&Status::invalid_argument("no candidates")), Failure::Final);
        assert_eq!(Failure::of(&shed(Duration::from_millis(7))), Failure::Shed(Duration::from_millis(7)));
        assert_eq!(Failure::of(&Status::resource_exhausted("forever")), Failure::Final);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_attempts_is_bounded() {
        let mut attempts = attempts(3, Duration::from_secs(60));
        for _ in 0..2 {
            attempts.wait_after(Status::unavailable("draining"), Availability::NoneReady).await.unwrap();
        }
        let error = attempts.wait_after(Status::unavailable("draining"), Availability::NoneReady).await.unwrap_err();
        assert_eq!(error.to_string(), "GetMidEmb: Unavailable: draining");
    }

    #[tokio::test(start_paused = true)]
    async fn a_shed_call_waits_as_long_as_the_server_asks_and_not_beyond_the_deadline() {
        let mut attempts = attempts(9, Duration::from_secs(1));
        let start = Instant::now();
        attempts.wait_after(shed(Duration::from_millis(100)), Availability::NoneReady).await.unwrap();
        assert!((100..=151).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        let error = attempts.wait_after(shed(Duration::from_secs(2)), Availability::NoneReady).await.unwrap_err();
        assert_eq!(error.code(), Some(Code::ResourceExhausted));
        assert!(start.elapsed() < Duration::from_millis(200), "it waited for an attempt that could not be made");
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_passed_is_reported_as_such() {
        let mut attempts = attempts(9, Duration::from_millis(20));
        let error = attempts
            .wait_after(Status::deadline_exceeded("no row was ready"), Availability::NoneReady)
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "GetMidEmb: no answer within the deadline of 20ms");
        tokio::time::advance(Duration::from_millis(20)).await;
        let error =
            attempts.wait_after(Status::cancelled("Timeout expired"), Availability::NoneReady).await.unwrap_err();
        assert_eq!(error.code(), Some(Code::DeadlineExceeded));
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_no_pause_where_another_replica_is_ready() {
        let mut attempts = attempts(9, Duration::from_secs(60));
        let start = Instant::now();
        for _ in 0..8 {
            attempts.wait_after(Status::unavailable("draining"), Availability::SomeReady).await.unwrap();
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
