//! The caches in files: what was hot before a restart is hot after it, and vectors computed in bulk elsewhere come in.
//!
//! ```text
//! caches ──hottest first──> parts ──> <folder>/.new-…/ ──synced, renamed──> <folder>/snapshot-<unix millis>/
//! caches <──coldest first── checked parts <──────────────────────────────── the newest snapshot
//! ```
//!
//! A *part* is one safetensors file, which numpy and PyTorch open, too. There are three kinds; `n` is a count of entries:
//!
//! | kind | tensors | metadata of its own |
//! |---|---|---|
//! | `content` | `vectors` F32 `[n, dim]`, `text_digests` U8 `[n, 16]` | `digest` (the encoder's, in hex), `dim` |
//! | `item` | the same | `digest` (the tower's, in hex), `dim` |
//! | `known_items` | `text_ends` U64 `[n]`, `id_keys` U8 `[n, 16]`, `texts` U8 (JSON, one after the other) | `id_hash_key` |
//!
//! All have `format` = `midemb-vectors`, `format_version` = `1`, `kind`, `n`, `made_by` and `checksum`, and no other metadata.
//! The checksum is BLAKE3 in hex over a line `key=value` and a line feed for each other entry of the metadata, in the order of
//! their keys, and then over all bytes behind the header. A vectors file that was made elsewhere may hold `texts` and
//! `text_ends` in place of `text_digests`, vectors in F16 or BF16, and neither `made_by` nor `checksum`.
//!
//! Invariants:
//! - Memory stays bounded: a part has at most 64 MB and is read and written alone; beside it there are the keys only.
//! - A snapshot is whole or is not there. Whatever fails while one is written, the one before stays.
//! - What a file says is believed once it was checked: no bytes at all can make the reader panic, or allocate more than a
//!   small multiple of what was read. A part is taken whole or refused whole, with its reason.
//! - Known items are worth nothing without the secret key that their ids are hashed under. So that is written with them, and
//!   all files are for their owner's eyes only.
//!
//! Everything here blocks, and takes seconds for large caches: it belongs on a thread of its own. One process writes into a
//! folder at a time, and the disk has room for two snapshots. Not here: when a snapshot is taken, logs, metrics, and the
//! users' embeddings, which expire.

mod error;
mod folder;
mod format;
pub mod keeper;
mod read;
mod write;

pub use error::ReadError;
pub use write::export;

use super::Caches;
use crate::domain::{EncoderDigest, TowerDigest, ids};
use std::{
    hash::Hash,
    io,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// What a model that serves has vectors of: those of others are neither written nor taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Its encoder.
    pub encoder: EncoderDigest,
    /// Numbers of a content embedding.
    pub content_dim: usize,
    /// Its item tower.
    pub tower: TowerDigest,
    /// Numbers of an item embedding.
    pub item_dim: usize,
}

/// What a part holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Content embeddings of one encoder.
    Content,
    /// Item embeddings of one tower.
    Item,
    /// Texts by item id.
    KnownItems,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Content, Kind::Item, Kind::KnownItems];

    /// As the metadata and the files' names have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Content => "content",
            Kind::Item => "item",
            Kind::KnownItems => "known_items",
        }
    }
}

/// A part of a model whose vectors are written to files.
pub trait VectorSource: Copy + Eq + Hash {
    /// What its vectors are.
    const KIND: Kind;
}

impl VectorSource for ids::Encoder {
    const KIND: Kind = Kind::Content;
}

impl VectorSource for ids::Tower {
    const KIND: Kind = Kind::Item;
}

/// How many entries of each kind were written or restored, and their files' bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Content embeddings.
    pub n_contents: u64,
    /// Item embeddings.
    pub n_items: u64,
    /// Texts by item id.
    pub n_known_items: u64,
    /// Of the files that hold them.
    pub n_bytes: u64,
}

impl Counts {
    fn add(&mut self, kind: Kind, n_entries: u64, n_bytes: u64) {
        match kind {
            Kind::Content => self.n_contents += n_entries,
            Kind::Item => self.n_items += n_entries,
            Kind::KnownItems => self.n_known_items += n_entries,
        }
        self.n_bytes += n_bytes;
    }
}

/// A snapshot that was written.
#[derive(Debug)]
pub struct Written {
    /// Its folder.
    pub snapshot: PathBuf,
    /// What is in it.
    pub counts: Counts,
    /// Older snapshots that could not be removed.
    pub not_removed: Vec<PathBuf>,
}

/// A snapshot cannot be written. The one before is still there.
#[derive(Debug, Error)]
#[error("cache snapshot {}: {source}", path.display())]
pub struct SnapshotError {
    /// The file or folder that failed.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl SnapshotError {
    fn at(path: &Path) -> impl Fn(io::Error) -> SnapshotError {
        move |source| SnapshotError { path: path.to_path_buf(), source }
    }
}

/// What was restored.
#[derive(Debug, Default)]
pub struct Restored {
    /// The newest snapshot's folder; none where there is no snapshot.
    pub snapshot: Option<PathBuf>,
    /// What was put into the caches. A smaller cache than before keeps the hottest of it.
    pub counts: Counts,
    /// Known items whose text is over the limit of this process.
    pub n_skipped: u64,
    /// Parts that were not taken.
    pub refused: Vec<Refused>,
}

/// A part that was not taken.
#[derive(Debug)]
pub struct Refused {
    /// The part's file.
    pub file: PathBuf,
    /// Why.
    pub reason: ReadError,
}

/// A part that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// What it holds.
    pub kind: Kind,
    /// How many entries were put into the cache.
    pub n_entries: u64,
    /// Known items whose text is empty or over the limit of this process.
    pub n_skipped: u64,
}

/// What an export wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// How many vectors.
    pub n_entries: u64,
    /// The file's size.
    pub n_bytes: u64,
}

/// Bytes of a part's tensors, at most.
const PART_BYTES: usize = 64 << 20;

/// Writes a snapshot of what the served models use into `folder`, which is made if need be, and removes those before it.
pub fn write(folder: &Path, caches: &Caches, served: &[Served]) -> Result<Written, SnapshotError> {
    let fill = |new: &Path| write::Parts::new(new, PART_BYTES).write(caches, served);
    let (snapshot, counts) = folder::replace(folder, fill)?;
    let not_removed = folder::remove_all_but(folder, &snapshot);
    Ok(Written { snapshot, counts, not_removed })
}

/// Puts the newest snapshot in `folder` into the caches: whatever of it is sound and of a model in `served`.
///
/// Known items are restored where none are known yet.
pub fn restore(folder: &Path, caches: &Caches, served: &[Served]) -> Restored {
    let mut restored = Restored::default();
    let files = folder::newest(folder).and_then(|newest| match &newest {
        Some(snapshot) => Ok((folder::parts(snapshot)?, newest)),
        None => Ok((Vec::new(), None)),
    });
    match files {
        Ok((files, snapshot)) => {
            restored.snapshot = snapshot;
            restore_parts(&files, &mut restored, caches, served);
        }
        Err(error) => restored.refused.push(Refused { file: folder.to_path_buf(), reason: ReadError::File(error) }),
    }
    restored
}

/// The last file holds the coldest entries.
fn restore_parts(files: &[PathBuf], restored: &mut Restored, caches: &Caches, served: &[Served]) {
    let mut buffer = Vec::new();
    for file in files.iter().rev() {
        let taken = read::load(file, &mut buffer).and_then(|()| read::take_own(&buffer, caches, served));
        match taken {
            Ok(imported) => {
                restored.counts.add(imported.kind, imported.n_entries, buffer.len() as u64);
                restored.n_skipped += imported.n_skipped;
            }
            Err(reason) => restored.refused.push(Refused { file: file.clone(), reason }),
        }
    }
}

/// Puts one part, which is all of `bytes`, into the caches. It may come from elsewhere, and then need not have a checksum.
pub fn import(bytes: &[u8], caches: &Caches, served: &[Served]) -> Result<Imported, ReadError> {
    read::take(bytes, caches, served)
}

#[cfg(test)]
mod tests;
