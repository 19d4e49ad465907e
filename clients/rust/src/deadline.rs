//! When a call must be over.

use crate::Error;
use std::{error::Error as _, future::Future, iter, sync::Arc, time::Duration};
use tokio::time::{Instant, error::Elapsed, timeout_at};
use tonic::{Code, Request, Response, Status, TimeoutExpired};

/// Longer deadlines are cut to this: the clock and `grpc-timeout` cannot hold every `Duration`.
const MAX_DEADLINE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The deadline of one call, which all its attempts and pauses share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    given: Duration,
}

impl Deadline {
    pub(crate) fn after(given: Duration) -> Self {
        Deadline { at: Instant::now() + given.min(MAX_DEADLINE), given }
    }

    pub(crate) fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub(crate) fn has_passed(self) -> bool {
        self.remaining().is_zero()
    }

    pub(crate) fn error(self, method: &'static str) -> Error {
        Error::DeadlineExceeded { method, deadline: self.given }
    }

    /// A request that tells the server how much time is left.
    pub(crate) fn request<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.remaining());
        request
    }

    /// Waits for the answer, body included, until the deadline. (tonic's own timer ends with the answer's headers.)
    pub(crate) async fn answer<T>(self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        match timeout_at(self.at, call).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(elapsed) => {
                let mut status = Status::deadline_exceeded("no answer in time");
                status.set_source(Arc::new(elapsed));
                Err(status)
            }
        }
    }

    /// Whether this status only says that the deadline has passed. tonic's own timer says CANCELLED.
    pub(crate) fn explains(self, status: &Status) -> bool {
        match status.code() {
            Code::DeadlineExceeded => true,
            Code::Cancelled => self.has_passed() || is_local_timeout(status),
            _ => false,
        }
    }
}

/// Whether this process stopped waiting. Such a status says nothing about the replica, which sent no answer.
pub(crate) fn is_local_timeout(status: &Status) -> bool {
    let mut causes = iter::successors(status.source(), |&cause| cause.source());
    causes.any(|cause| cause.is::<Elapsed>() || cause.is::<TimeoutExpired>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_deadline_there_is_can_be_given() {
        let deadline = Deadline::after(Duration::MAX);
        assert!(!deadline.has_passed());
        assert!(deadline.request(()).metadata().contains_key("grpc-timeout"));
        assert_eq!(deadline.answer(async { Ok(Response::new(7)) }).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_local_timeout_is_told_from_the_servers_answer() {
        let deadline = Deadline::after(Duration::ZERO);
        let status = deadline.answer::<()>(std::future::pending()).await.unwrap_err();
        assert!(is_local_timeout(&status) && deadline.explains(&status));
        assert!(!is_local_timeout(&Status::deadline_exceeded("no row was ready")));
    }
}
