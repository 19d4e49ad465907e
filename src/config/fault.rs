//! Why a config is refused.

use super::key::Bound;
use crate::domain::bounded_text::cut;
use std::{borrow::Cow, fmt, io, path::PathBuf};
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
    /// Keys are unknown, or values are outside their bounds: all of them up to a bound, not the first alone.
    #[error("config: {}", join(.0))]
    Invalid(Vec<Fault>),
}

/// The most bytes of a key, a value and a reason in a fault, and the most faults of a config. What an operator wrote may have
/// any length, and a fault goes into answers, the log and the status.
const MAX_KEY_BYTES: usize = 128;
const MAX_VALUE_BYTES: usize = 128;
const MAX_REASON_BYTES: usize = 384;
const MAX_FAULTS: usize = 50;

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
        let (key, reason) = (key.into(), reason.into());
        Fault { key: cut(&key, MAX_KEY_BYTES).into_owned(), reason: cut(&reason, MAX_REASON_BYTES).into_owned() }
    }

    pub(super) fn out_of_bound(key: impl Into<String>, value: &str, bound: &Bound) -> Self {
        Fault::new(key, format!("{:?} is not {bound}", short(value)))
    }

    fn n_bytes(&self) -> usize {
        self.key.len() + self.reason.len()
    }
}

/// A value as a fault shows it.
pub(super) fn short(value: &str) -> Cow<'_, str> {
    cut(value, MAX_VALUE_BYTES)
}

/// The faults of a config in their order: the first [`MAX_FAULTS`], and how many more there are.
#[derive(Debug, Default)]
pub(super) struct Faults {
    first: Vec<Fault>,
    n_more: usize,
}

impl Faults {
    pub(super) fn push(&mut self, fault: Fault) {
        if self.is_full() { self.n_more += 1 } else { self.first.push(fault) }
    }

    /// Whether further faults are only counted.
    pub(super) fn is_full(&self) -> bool {
        self.first.len() == MAX_FAULTS
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// The faults, with a last one in place of those that were only counted.
    pub(super) fn into_vec(self) -> Vec<Fault> {
        let mut faults = self.first;
        if self.n_more > 0 {
            faults.push(Fault::new("config", format!("{} more faults", self.n_more)));
        }
        faults
    }
}

/// The first faults, as many as have at most `max_bytes` together.
pub fn that_fit(faults: &[Fault], max_bytes: usize) -> impl Iterator<Item = &Fault> {
    let mut n_bytes = 0;
    faults.iter().take_while(move |fault| {
        n_bytes += fault.n_bytes();
        n_bytes <= max_bytes
    })
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.reason)
    }
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_bounded_in_size_and_number() {
        let long = "x".repeat(1 << 20);
        let mut faults = Faults::default();
        for _ in 0..MAX_FAULTS + 7 {
            faults.push(Fault::out_of_bound(long.clone(), &long, &Bound::Path));
        }
        let faults = faults.into_vec();
        assert_eq!(faults.len(), MAX_FAULTS + 1);
        assert_eq!(faults[MAX_FAULTS].to_string(), "config: 7 more faults");
        assert!(faults[0].n_bytes() <= MAX_KEY_BYTES + MAX_REASON_BYTES, "{} bytes", faults[0].n_bytes());
        assert!(faults[0].reason.ends_with("…\" is not a path"), "{}", faults[0]);
        let n_fit = that_fit(&faults, 3 * faults[0].n_bytes()).count();
        assert_eq!((n_fit, that_fit(&faults, 10).count()), (3, 0));
    }
}
