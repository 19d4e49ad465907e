//! Why a config is refused.

use super::key::Bound;
use std::{fmt, io, path::PathBuf};
use thiserror::Error;

/// Why a config is refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("config {} cannot be read: {source}", path.display())]
    #[expect(missing_docs, reason = "the message says what the fields are")]
    Read { path: PathBuf, source: io::Error },
    /// The file is not valid TOML.
    #[error("config {}: {reason}", path.display())]
    Syntax {
        #[expect(missing_docs, reason = "the name says what it is")]
        path: PathBuf,
        /// Where the error is and what it is, on one line.
        reason: String,
    },
    /// Keys are unknown, or values are outside their bounds: all of them, not the first alone.
    #[error("config: {}", join(.0))]
    Invalid(Vec<Fault>),
}

/// What is wrong with one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The dotted name; `models[0].share` for a key of a model.
    pub key: String,
    /// What is wrong, with the value and its bound unless the value may be secret.
    pub reason: String,
}

impl Fault {
    pub(super) fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Fault { key: key.into(), reason: reason.into() }
    }

    pub(super) fn out_of_bound(key: impl Into<String>, value: &str, bound: &Bound) -> Self {
        Fault::new(key, format!("{value:?} is not {bound}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.reason)
    }
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}
