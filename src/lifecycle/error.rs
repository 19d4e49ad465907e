//! Why a config does not come into force. Whatever it is, what serves goes on serving.

use crate::{
    bundle::{BundleError, store::StoreError},
    config::{ConfigError, fault::Fault},
    inference::LibraryError,
};
use std::{io, path::PathBuf};
use thiserror::Error;

/// Why a push was refused.
#[derive(Debug, Error)]
pub enum PushError {
    /// The config is no TOML, or has keys or values that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It changes what only a restart can change.
    #[error("config: {}", join(.0))]
    Frozen(Vec<Fault>),
    /// Another config is in force than the caller thinks.
    #[error("the config in force has the digest {found}, not {expected}: look at it again and push to that one")]
    Conflict {
        /// As the caller has it.
        expected: String,
        /// As it is.
        found: String,
    },
    /// Another config came into force while this one was loading.
    #[error("another config came into force meanwhile, with the digest {0}: look at it again and push to that one")]
    Overtaken(String),
    /// One push at a time.
    #[error("another push is under way, {0}")]
    Busy(String),
    /// ONNX Runtime cannot be had.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// A bundle cannot be fetched.
    #[error("model {name:?}: {source}")]
    Fetch {
        /// The model.
        name: String,
        /// What failed.
        source: Box<StoreError>,
    },
    /// A bundle failed its checks.
    #[error("model {name:?}: {source}")]
    Bundle {
        /// The model.
        name: String,
        /// What failed.
        source: Box<BundleError>,
    },
    /// A shadow's mid-embs cannot be compared.
    #[error("model {name:?}: its mid-embs have {found} numbers, those of {of:?}, which it shadows, have {expected}")]
    Shadow {
        /// The shadow.
        name: String,
        /// The model that answers.
        of: String,
        /// The shadow's.
        found: usize,
        /// The answering model's.
        expected: usize,
    },
    /// The config would be lost at a restart.
    #[error("{} cannot be written, and a config that a restart would forget is not put in force: {source}", path.display())]
    Persist {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// What serves is no longer where the config says.
    #[error("model {name:?}: a restart would find another bundle in {}", folder.display())]
    Moved {
        /// The model.
        name: String,
        /// Where its bundle was.
        folder: PathBuf,
    },
    /// There was no push yet.
    #[error("there is no config before this one")]
    NothingBefore,
    /// The server is on its way out.
    #[error("the server is draining")]
    Draining,
    /// A fault of ours.
    #[error("a load failed: {0}")]
    Failed(String),
}

fn join(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("; ")
}
