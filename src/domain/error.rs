//! The closed set of errors that a request can end with.
//!
//! Each variant maps to one gRPC status code (`wire::status` holds the mapping). The message is safe to send to a client; a
//! cause that is not stays in `source` and is logged once, at the edge.

use super::bounded_text::cut;
use std::{error::Error as StdError, time::Duration};
use thiserror::Error;

/// Why a request failed as a whole. A failure that costs only one row is a `RowStatus` instead.
#[derive(Debug, Error)]
pub enum Error {
    /// The request breaks the contract. The caller must change it.
    #[error("{}", describe(.0))]
    InvalidArgument(Vec<FieldViolation>),
    /// No model of this name is served.
    #[error("no model named {0:?} is served")]
    ModelNotFound(String),
    /// The server is overloaded. The caller may try again after `retry_after`.
    #[error("overloaded: {reason}")]
    Shed {
        /// Which bound was reached.
        reason: ShedReason,
        /// How long the caller should wait before it tries again.
        retry_after: Duration,
    },
    /// The deadline passed before any row was ready.
    #[error("deadline exceeded before any row was ready")]
    DeadlineExceeded,
    /// The server is starting or draining.
    #[error("not serving: {0}")]
    Unavailable(&'static str),
    /// The server failed. The fault is ours, not the caller's.
    #[error("internal error in {stage}")]
    Internal {
        /// The stage that failed, for the client's bug report.
        stage: &'static str,
        /// The cause, for the log.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

/// The most bytes of a caller's text that a message repeats.
const MAX_ECHO_BYTES: usize = 128;

impl Error {
    /// No model of this name is served. A long name is cut.
    pub fn model_not_found(name: &str) -> Self {
        Error::ModelNotFound(cut(name, MAX_ECHO_BYTES).into_owned())
    }

    /// An internal error in `stage`.
    pub fn internal(stage: &'static str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Error::Internal { stage, source: source.into() }
    }
}

/// One field of a request that breaks its bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's path, for example `candidates[3].id`.
    pub field: String,
    /// The value it had and the values it may have.
    pub description: String,
}

fn describe(violations: &[FieldViolation]) -> String {
    let descriptions: Vec<String> = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
    descriptions.join("; ")
}

/// Which bound made the server refuse work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ShedReason {
    /// `limits.max_in_flight` requests are being served.
    #[error("too many requests in flight")]
    InFlight,
    /// The scoring queue is full, or the expected wait in it is too large a part of the request's remaining time.
    #[error("the scoring queue is too long")]
    TowerQueue,
    /// The encoder's queue is full.
    #[error("the encoder's queue is full")]
    EncoderQueue,
    /// `limits.max_encoding` requests wait for the encoder.
    #[error("too many requests wait for the encoder")]
    Encoding,
    /// The messages that are arriving take all of `limits.max_receiving_mb`, or all that one connection may have of it.
    #[error("too many bytes of messages are arriving")]
    Receiving,
    /// The requests that are being answered take all of `limits.max_decoded_mb`, or all that one connection may have of it.
    #[error("too many bytes of requests are being answered")]
    Decoded,
    /// The answers that callers have not read take all of `limits.max_unsent_mb`, or all that one connection may have of it.
    #[error("too many bytes of answers are waiting to be read")]
    UnsentAnswers,
    /// As many streams or operators' jobs of this kind are open as may be.
    #[error("too many calls of this kind are open")]
    Streams,
}

impl ShedReason {
    /// The label that metrics use.
    pub fn as_str(self) -> &'static str {
        match self {
            ShedReason::InFlight => "in_flight",
            ShedReason::TowerQueue => "tower_queue",
            ShedReason::EncoderQueue => "encoder_queue",
            ShedReason::Encoding => "encoding",
            ShedReason::Receiving => "receiving",
            ShedReason::Decoded => "decoded",
            ShedReason::UnsentAnswers => "unsent_answers",
            ShedReason::Streams => "streams",
        }
    }
}
