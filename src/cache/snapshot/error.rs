//! Why a part of a snapshot, or a file of vectors, is refused.

use super::Kind;
use crate::cache::known_items::OtherHashKey;
use std::io;
use thiserror::Error;

/// Why a part is not taken.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file or its folder cannot be read.
    #[error("it cannot be read: {0}")]
    File(#[from] io::Error),
    /// The file is larger than any part.
    #[error("it is larger than {max} bytes, which no part of a snapshot is")]
    FileTooLarge {
        /// The bound.
        max: u64,
    },
    /// It ends within its header.
    #[error("it is no safetensors file, or was cut off: it ends within its header")]
    CutOff,
    /// The header is longer than any part's.
    #[error(
        "it is no safetensors file of this format: its header is said to have {n_bytes} bytes, at most {max} are taken"
    )]
    HeaderTooLong {
        /// As the file says.
        n_bytes: u64,
        /// The bound.
        max: usize,
    },
    /// The header is no safetensors header.
    #[error("its safetensors header cannot be read: {0}")]
    Header(String),
    /// The header and the file's size do not agree.
    #[error("its header describes {said} bytes of tensors, and {found} follow it")]
    DataLength {
        /// As the header says.
        said: usize,
        /// In the file.
        found: usize,
    },
    /// An entry of the metadata is missing.
    #[error("its metadata has no {0:?}")]
    NoEntry(&'static str),
    /// An entry of the metadata has a name that means nothing here.
    #[error("its metadata has an unknown entry {0:?}")]
    UnknownEntry(String),
    /// An entry of the metadata is not what it must be: another format, version or kind, or a count that is wrong.
    #[error("its metadata says {key} {found:?}, this must be {expected}")]
    Entry {
        /// The entry.
        key: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        expected: String,
    },
    /// Not the bytes that were written.
    #[error("it was damaged: its checksum is not that of its content")]
    Checksum,
    /// Vectors of an encoder or tower that no model uses.
    #[error("no model that serves uses its {} vectors, of {digest}", kind.as_str())]
    Foreign {
        /// Content or item embeddings.
        kind: Kind,
        /// The digest it has.
        digest: String,
    },
    /// A tensor is missing.
    #[error("it has no tensor {0:?}")]
    NoTensor(&'static str),
    /// There is a tensor that means nothing here.
    #[error("it has an unknown tensor {0:?}")]
    UnknownTensor(String),
    /// A tensor has another type or shape.
    #[error("its tensor {name:?} is {found}, it must be {expected}")]
    Tensor {
        /// The tensor.
        name: &'static str,
        /// Its type and shape.
        found: String,
        /// What these may be.
        expected: String,
    },
    /// A vector is not finite.
    #[error("vector {row} has a value that is not finite")]
    NotFinite {
        /// Counted from 0.
        row: usize,
    },
    /// The ends of the texts do not lie in order within the texts.
    #[error("text {row} does not end after the one before it and within the texts")]
    TextEnd {
        /// Counted from 0.
        row: usize,
    },
    /// A text is not the JSON of one.
    #[error("text {row} is no item text: {error}")]
    Text {
        /// Counted from 0.
        row: usize,
        /// Why.
        error: String,
    },
    /// Items are known already, under another key.
    #[error(transparent)]
    HashKey(#[from] OtherHashKey),
}
