//! When a call must be over.

use crate::Error;
use std::{future::Future, time::Duration};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Request, Response, Status};

/// The deadline of one call, which all its attempts and pauses share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    given: Duration,
}

/// Longer deadlines are shortened to this: a `grpc-timeout` has eight digits, and a clock may overflow.
const MAX: Duration = Duration::from_secs(30 * 24 * 3600);

impl Deadline {
    pub(crate) fn after(given: Duration) -> Self {
        let given = given.min(MAX);
        Deadline { at: Instant::now() + given, given }
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
        let answer = timeout_at(self.at, call).await;
        answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))).map(Response::into_inner)
    }

    /// Whether this status only says that the deadline has passed. tonic's own timer says CANCELLED.
    pub(crate) fn explains(self, status: &Status) -> bool {
        match status.code() {
            Code::DeadlineExceeded => true,
            Code::Cancelled => self.has_passed(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_duration_is_a_deadline_too() {
        let deadline = Deadline::after(Duration::MAX);
        let request = deadline.request(());
        assert!(request.metadata().contains_key("grpc-timeout"));
        assert!(deadline.remaining() > MAX - Duration::from_secs(60));
    }
}
