//! Everything that can go wrong with a call or a connection.

use std::{error::Error as StdError, fmt, io, iter, path::PathBuf, time::Duration};
use tonic::{Code, Status, transport};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The list of addresses is empty.
    #[error("there is no server address")]
    NoAddress,
    /// An address is not `host:port` or a URL.
    #[error("server address {address:?} is neither host:port nor a URL")]
    Address {
        /// As it was given.
        address: String,
    },
    /// The certificates or the key cannot be used.
    #[error("cannot set up TLS to {address}")]
    Tls {
        /// The server.
        address: String,
        /// What is wrong with them.
        source: transport::Error,
    },
    /// No address can be reached; this is the first one.
    #[error("cannot connect to {address}")]
    Connect {
        /// The server.
        address: String,
        /// Why not.
        source: transport::Error,
    },
    /// Options that cannot be used together, or one that is missing.
    #[error("{0}")]
    Options(&'static str),
    /// A file with a token, a certificate or a key cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A token file does not hold a token in its first line. The message never shows the line.
    #[error("token file {}: {reason}", path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with its first line.
        reason: &'static str,
    },
    /// A certificate or key file is not PEM.
    #[error("{} is not a PEM file", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
    },
    /// The deadline passed before an answer came, or before another attempt could be made.
    #[error("{method}: no answer within the deadline of {deadline:?}")]
    DeadlineExceeded {
        /// The rpc.
        method: &'static str,
        /// Of the whole call, all attempts together.
        deadline: Duration,
    },
    /// An answer does not have one status and one row per candidate: the server has a fault, or is no midemb.
    #[error("GetMidEmb: an answer to {n_candidates} candidates has {n_statuses} statuses, or tensors of other lengths")]
    Rows {
        /// As sent.
        n_candidates: usize,
        /// As received.
        n_statuses: usize,
    },
    /// The last attempt ended with this status.
    #[error("{method}: {}", Described(status))]
    Failed {
        /// The rpc.
        method: &'static str,
        /// What the server answered, or what tonic made of a connection that broke.
        status: Box<Status>,
    },
}

impl Error {
    /// Turns the status that a generated stub returned into an error, as in `.map_err(Error::failed("GetMidEmb"))`.
    pub fn failed(method: &'static str) -> impl FnOnce(Status) -> Error {
        move |status| Error::Failed { method, status: Box::new(status) }
    }

    /// The gRPC code, where a call was made.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::DeadlineExceeded { .. } => Some(Code::DeadlineExceeded),
            Error::Failed { status, .. } => Some(status.code()),
            _ => None,
        }
    }
}

/// A status with its code, its message and, if the connection broke, the innermost cause, which is the one that says why.
struct Described<'a>(&'a Status);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Described(status) = self;
        write!(f, "{:?}: {}", status.code(), status.message())?;
        let innermost_cause = iter::successors(status.source(), |&cause| cause.source()).last();
        match innermost_cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}
