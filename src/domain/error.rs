//! The closed set of errors that a request can end with.
//!
//! Each variant is one gRPC status code (`wire::status` holds the mapping). The message is fit for a client; a cause
//! that is not stays in `source` and goes to the log, once, at the edge.

use std::{error::Error as StdError, time::Duration};
use thiserror::Error;

/// Why a request failed as a whole. What costs only one row is a `RowStatus`.
#[derive(Debug, Error)]
pub enum Error {
    /// The request breaks the contract. The caller has to change it.
    #[error("{}", describe(.0))]
    InvalidArgument(Vec<FieldViolation>),
    /// No model of this name is served.
    #[error("no model named {0:?} is served")]
    ModelNotFound(String),
    /// Too much work is under way. Worth another try after `retry_after`.
    #[error("overloaded: {reason}")]
    Shed {
        /// Which bound was reached, as the metric's label has it.
        reason: ShedReason,
        /// When another try makes sense.
        retry_after: Duration,
    },
    /// Not one row was ready in time.
    #[error("deadline exceeded before any row was ready")]
    DeadlineExceeded,
    /// The server is starting or draining.
    #[error("not serving: {0}")]
    Unavailable(&'static str),
    /// A fault of ours.
    #[error("internal error in {stage}")]
    Internal {
        /// Where it happened, for the client's report.
        stage: &'static str,
        /// What happened, for the log.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl Error {
    /// A fault of ours in `stage`.
    pub fn internal(stage: &'static str, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Error::Internal { stage, source: source.into() }
    }
}

/// One field of a request that breaks its bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's path, for example `candidates[3].id`.
    pub field: String,
    /// What it was and what it may be.
    pub description: String,
}

fn describe(violations: &[FieldViolation]) -> String {
    let lines: Vec<_> = violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
    lines.join("; ")
}

/// Which bound made the server turn work away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ShedReason {
    /// `limits.max_in_flight` requests are under way.
    #[error("too many requests in flight")]
    InFlight,
    /// The scoring queue is full, or longer than the request has time.
    #[error("the scoring queue is too long")]
    TowerQueue,
    /// The encoder's queue is full.
    #[error("the encoder's queue is full")]
    EncoderQueue,
}

impl ShedReason {
    /// The metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            ShedReason::InFlight => "in_flight",
            ShedReason::TowerQueue => "tower_queue",
            ShedReason::EncoderQueue => "encoder_queue",
        }
    }
}
