//! The caches in files: entries that were hot before a restart are hot after it, and vectors computed elsewhere can be imported.
//!
//! ```text
//! caches ──hottest first──> parts ──> <folder>/.new-…/ ──synced, renamed──> <folder>/snapshot-<unix millis>/
//! caches <──coldest first── checked parts <──────────────────────────────── the newest snapshot
//! ```
//!
//! A *part* is one safetensors file, which numpy and PyTorch can open too. There are three kinds; `n` is the number of entries:
//!
//! | kind | tensors | metadata of this kind |
//! |---|---|---|
//! | `content` | `vectors` F32 `[n, dim]`, `text_digests` U8 `[n, 16]` | `digest` (the encoder's, in hex), `dim` |
//! | `item` | the same; a vector is an item record: item embedding, then adapted content | `digest` (the tower's, in hex), `dim` |
//! | `known_items` | `text_ends` U64 `[n]`, `id_keys` U8 `[n, 16]`, `texts` U8 (concatenated JSON) | `id_hash_key` |
//!
//! Every part has the metadata `format` = `midemb-vectors`, `format_version` = `1`, `kind`, `n`, `made_by` and `checksum`, and
//! no other. The checksum is BLAKE3 in hex over one line `key=value`, ended by a line feed, per other metadata entry in the
//! order of the keys, and then over all bytes behind the header. A file of vectors made elsewhere may hold `texts` and
//! `text_ends` instead of `text_digests`, may hold vectors in F16 or BF16, and may lack `made_by` and `checksum`.
//!
//! Invariants:
//! - Memory is bounded: a part has at most 64 MB and is read and written on its own; besides it, only the keys are in memory.
//! - A snapshot is complete or absent. If writing one fails, the previous one is kept.
//! - Nothing in a file is trusted before it is checked: no bytes can make the reader panic, or allocate more than a small
//!   multiple of what was read. A part is taken as a whole or refused as a whole, with the reason.
//! - Known items are useless without the secret key under which their ids are hashed, so the key is written with them, and only
//!   the files' owner can read them.
//!
//! All functions here block, for seconds if the caches are large: call them on a thread of their own. Only one process may
//! write into a folder, which [`keeper`] holds it to, and the disk must have room for two snapshots. Not here: when a snapshot is taken, logs and
//! metrics ([`keeper`]), and the user embeddings, which expire.

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

/// What a served model caches. Vectors of other models are neither written nor restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// The digest of its encoder.
    pub encoder: EncoderDigest,
    /// The width of a content embedding.
    pub content_dim: usize,
    /// The digest of its item tower.
    pub tower: TowerDigest,
    /// The width of an item record.
    pub record_dim: usize,
}

/// The kind of entries in a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Content embeddings of one encoder.
    Content,
    /// Item records of one tower.
    Item,
    /// Texts by item id.
    KnownItems,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::Content, Kind::Item, Kind::KnownItems];

    /// The name in metadata and file names.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Content => "content",
            Kind::Item => "item",
            Kind::KnownItems => "known_items",
        }
    }
}

/// A part of a model whose vectors can be written to files.
pub trait VectorSource: Copy + Eq + Hash {
    /// The kind of its vectors.
    const KIND: Kind;
}

impl VectorSource for ids::Encoder {
    const KIND: Kind = Kind::Content;
}

impl VectorSource for ids::Tower {
    const KIND: Kind = Kind::Item;
}

/// How many entries of each kind were written or restored, and the size of their files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Content embeddings.
    pub n_contents: u64,
    /// Item records.
    pub n_items: u64,
    /// Texts by item id.
    pub n_known_items: u64,
    /// Bytes of the files.
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
    /// The number of entries and bytes in it.
    pub counts: Counts,
    /// Older snapshots that could not be removed.
    pub not_removed: Vec<PathBuf>,
}

/// A snapshot could not be written. The previous one is kept.
#[derive(Debug, Error)]
#[error("cache snapshot {}: {source}", path.display())]
pub struct SnapshotError {
    /// The file or folder that failed.
    pub path: PathBuf,
    /// The cause.
    pub source: io::Error,
}

impl SnapshotError {
    fn at(path: &Path) -> impl Fn(io::Error) -> SnapshotError {
        move |source| SnapshotError { path: path.to_path_buf(), source }
    }
}

/// The result of restoring a snapshot.
#[derive(Debug, Default)]
pub struct Restored {
    /// The newest snapshot's folder; `None` if there is no snapshot.
    pub snapshot: Option<PathBuf>,
    /// What was put into the caches. If a cache is smaller than before, it keeps the hottest entries.
    pub counts: Counts,
    /// Known items whose text exceeds this process's limit.
    pub n_skipped: u64,
    /// The parts that were refused.
    pub refused: Vec<Refused>,
}

/// A part that was refused.
#[derive(Debug)]
pub struct Refused {
    /// The part's file, or the folder of the snapshots if it cannot be read.
    pub file: PathBuf,
    /// The reason.
    pub reason: ReadError,
}

/// A part that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The kind of its entries.
    pub kind: Kind,
    /// How many entries were put into the cache.
    pub n_entries: u64,
    /// Known items whose text is empty or exceeds this process's limit.
    pub n_skipped: u64,
}

/// The size of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// The number of entries.
    pub n_entries: u64,
    /// The file's size.
    pub n_bytes: u64,
}

/// The most bytes of a part's tensors.
const PART_BYTES: usize = 64 << 20;

/// Writes a snapshot of everything that the served models have cached into `folder`, which is created if it does not exist, and
/// removes the previous snapshots.
pub fn write(folder: &Path, caches: &Caches, served: &[Served]) -> Result<Written, SnapshotError> {
    let fill = |new: &Path| write::PartsWriter::new(new, PART_BYTES).write(caches, served);
    let (snapshot, counts) = folder::create(folder, fill)?;
    let not_removed = folder::remove_all_but(folder, &snapshot);
    Ok(Written { snapshot, counts, not_removed })
}

/// Puts the newest snapshot in `folder` into the caches, except parts that are damaged or of a model that is not in `served`.
///
/// Known items are restored only if no items are known yet.
pub fn restore(folder: &Path, caches: &Caches, served: &[Served]) -> Restored {
    let mut restored = Restored::default();
    if let Err(error) = restore_newest(folder, &mut restored, caches, served) {
        restored.refused.push(Refused { file: folder.to_path_buf(), reason: ReadError::File(error) });
    }
    restored
}

fn restore_newest(folder: &Path, restored: &mut Restored, caches: &Caches, served: &[Served]) -> io::Result<()> {
    let Some(snapshot) = folder::newest(folder)? else { return Ok(()) };
    let files = folder::parts(&snapshot)?;
    restored.snapshot = Some(snapshot);
    let mut buffer = Vec::new();
    // The last file holds the coldest entries, and the hottest must be inserted last.
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
    Ok(())
}

/// Puts one part, given as all of its bytes, into the caches. It may be made elsewhere and then needs no checksum.
pub fn import(bytes: &[u8], caches: &Caches, served: &[Served]) -> Result<Imported, ReadError> {
    read::take(bytes, caches, served)
}

#[cfg(test)]
mod tests;
