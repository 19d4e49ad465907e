//! Why a part of a snapshot, or a file of vectors made elsewhere, is refused.

use super::Kind;
use crate::cache::known_items::HashKeyMismatch;
use std::io;
use thiserror::Error;

/// Why a part is refused.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file or its folder cannot be read.
    #[error("it cannot be read: {0}")]
    File(#[from] io::Error),
    /// The file is larger than any part.
    #[error("it is larger than {max} bytes, the limit for a part of a snapshot")]
    FileTooLarge {
        /// The limit.
        max: u64,
    },
    /// The file ends within its header.
    #[error("it is not a safetensors file, or it is incomplete: it ends within its header")]
    CutOff,
    /// The header is longer than any part's.
    #[error("it is not a safetensors file of this format: its header has {n_bytes} bytes, the limit is {max}")]
    HeaderTooLong {
        /// The length that the file states.
        n_bytes: u64,
        /// The limit.
        max: usize,
    },
    /// The header is not valid.
    #[error("its safetensors header cannot be read: {0}")]
    Header(String),
    /// The header and the file's size disagree.
    #[error("its header describes {described} bytes of tensors, but {found} bytes follow it")]
    DataLength {
        /// The number of bytes that the header describes.
        described: usize,
        /// The number of bytes that follow it.
        found: usize,
    },
    /// An entry of the metadata is missing.
    #[error("its metadata has no {0:?}")]
    NoEntry(&'static str),
    /// The metadata has an entry that the format does not define.
    #[error("its metadata has an unknown entry {0:?}")]
    UnknownEntry(String),
    /// An entry of the metadata has the wrong value: another format, version or kind, or a wrong count.
    #[error("its metadata has {key} {found:?}, it must be {expected}")]
    Entry {
        /// The entry.
        key: &'static str,
        /// Its value.
        found: String,
        /// The values that are allowed.
        expected: String,
    },
    /// The content is not what was written.
    #[error("it is damaged: its checksum does not match its content")]
    Checksum,
    /// The vectors belong to an encoder or tower that no served model uses.
    #[error("no served model uses its {} vectors, of {digest}", kind.as_str())]
    Foreign {
        /// Content embeddings or item records.
        kind: Kind,
        /// The digest of the encoder or tower.
        digest: String,
    },
    /// A tensor is missing.
    #[error("it has no tensor {0:?}")]
    NoTensor(&'static str),
    /// There is a tensor that the format does not define.
    #[error("it has an unknown tensor {0:?}")]
    UnknownTensor(String),
    /// A tensor has another type or shape.
    #[error("its tensor {name:?} is {found}, it must be {expected}")]
    Tensor {
        /// The tensor.
        name: &'static str,
        /// Its type and shape.
        found: String,
        /// The types and shapes that are allowed.
        expected: String,
    },
    /// A vector has an infinite or NaN value.
    #[error("vector {row} has a value that is not finite")]
    NotFinite {
        /// Counted from 0.
        row: usize,
    },
    /// The texts' ends are not in ascending order within the texts.
    #[error("text {row} does not end after the previous text and within the texts")]
    TextEnd {
        /// Counted from 0.
        row: usize,
    },
    /// A text is not valid JSON of an item text.
    #[error("text {row} is not an item text: {error}")]
    Text {
        /// Counted from 0.
        row: usize,
        /// The parser's error.
        error: String,
    },
    /// Items are already known under another hash key.
    #[error(transparent)]
    HashKey(#[from] HashKeyMismatch),
}
