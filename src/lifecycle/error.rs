//! Why a config is not put in force. Whatever the reason, the config and the models in force stay as they are.

use super::desired::PersistError;
use crate::{
    bundle::{BundleError, store::StoreError},
    config::{ConfigError, fault::Fault},
    domain::bounded_text::{MAX_MESSAGE_BYTES, cut},
    inference::LibraryError,
};
use std::path::PathBuf;
use thiserror::Error;

/// Why a push or a rollback was refused.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages name the fields; `name` is a model's name")]
pub enum PushError {
    /// The config is not TOML, or has invalid keys or values.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The config changes settings that only a restart can change.
    #[error("config: {}", join(.0))]
    Frozen(Vec<Fault>),
    /// The push is based on a config that is not in force.
    #[error("the config in force has the digest {found}, not {expected}: read it and push again")]
    Conflict { expected: String, found: String },
    /// Another config was put in force while this one was being loaded.
    #[error("another config was put in force during this push, with the digest {0}: read it and push again")]
    Overtaken(String),
    /// Another push is running; only one runs at a time. The text says who started it and when, or is empty.
    #[error("another push is running{0}: wait until it has ended and push again")]
    Busy(String),
    /// ONNX Runtime cannot be loaded.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// A bundle cannot be fetched.
    #[error("model {name:?}: {source}")]
    Fetch { name: String, source: Box<StoreError> },
    /// A bundle failed its checks.
    #[error("model {name:?}: {source}")]
    Bundle { name: String, source: Box<BundleError> },
    /// A shadow's mid-embs cannot be compared with those of the model that it shadows.
    #[error(
        "model {name:?}: its mid-embs have {found} dimensions, but those of {shadow_of:?}, which it shadows, have {expected}"
    )]
    Shadow { name: String, shadow_of: String, found: usize, expected: usize },
    /// The config cannot be saved for the next restart.
    #[error(transparent)]
    Persist(#[from] PersistError),
    /// The folder of a model that serves contains another bundle by now.
    #[error("model {name:?}: a restart would find another bundle in {}", folder.display())]
    BundleReplaced { name: String, folder: PathBuf },
    /// No config was replaced since the server started.
    #[error("there is no previous config to roll back to")]
    NoPreviousConfig,
    /// The server is shutting down.
    #[error("the server is draining")]
    Draining,
    /// A background task could not be started, panicked or was cancelled.
    #[error("a load failed: {0}")]
    Failed(String),
}

impl PushError {
    /// The reason in one line for a client, cut to 1 KB. The log has all of it.
    pub fn message(&self) -> String {
        cut(&self.to_string(), MAX_MESSAGE_BYTES).into_owned()
    }
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}
