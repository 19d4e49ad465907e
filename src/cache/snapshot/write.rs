//! Writes the caches into parts. No vector is copied on its way into a file.

use super::{
    Counts, Exported, Kind, Served, SnapshotError, VectorSource,
    format::{DIGEST, DIM, ID_HASH_KEY, ID_KEYS, NewPart, TEXT_DIGESTS, TEXT_ENDS, TEXTS, Tensor, VECTORS},
};
use crate::{
    cache::{
        Caches,
        known_items::{HashKey, KnownItems},
        vectors::VectorCache,
    },
    domain::{Digest, EmbeddingKey, IdKey, ItemText, TextDigest, Vector},
};
use safetensors::Dtype;
use std::{
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    mem::size_of,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

const DIGEST_BYTES: usize = TextDigest::N_BYTES;
const BUFFER_BYTES: usize = 256 << 10;

/// Writes parts into a folder and counts their entries.
pub(super) struct PartsWriter<'a> {
    folder: &'a Path,
    /// The most bytes of one part's tensors. A part with a single entry may exceed it.
    max_bytes: usize,
    counts: Counts,
}

impl<'a> PartsWriter<'a> {
    pub(super) fn new(folder: &'a Path, max_bytes: usize) -> Self {
        PartsWriter { folder, max_bytes, counts: Counts::default() }
    }

    pub(super) fn write(mut self, caches: &Caches, served: &[Served]) -> Result<Counts, SnapshotError> {
        self.write_vectors(&caches.contents, served.iter().map(|served| (served.encoder, served.content_dim)))?;
        self.write_vectors(&caches.items, served.iter().map(|served| (served.tower, served.record_dim)))?;
        self.write_known_items(&caches.known_items)?;
        Ok(self.counts)
    }

    /// Writes the vectors of each digest once: models may share one.
    fn write_vectors<P: VectorSource>(
        &mut self,
        cache: &VectorCache<EmbeddingKey<P>>,
        served: impl Iterator<Item = (Digest<P>, usize)>,
    ) -> Result<(), SnapshotError> {
        let keys = cache.hottest_keys();
        let mut done: Vec<Digest<P>> = Vec::new();
        for (digest, dim) in served {
            if done.contains(&digest) {
                continue;
            }
            done.push(digest);
            let n_rows = (self.max_bytes / (dim * size_of::<f32>() + DIGEST_BYTES)).max(1);
            let mut keys = keys.iter().filter(|key| key.part == digest).copied();
            for number in 0.. {
                let part_keys: Vec<EmbeddingKey<P>> = keys.by_ref().take(n_rows).collect();
                if part_keys.is_empty() {
                    break;
                }
                let rows = rows(cache, part_keys, dim);
                let name = format!("{}-{digest}-{number:06}", P::KIND.as_str());
                self.write_part(&name, P::KIND, |out| write_rows(out, digest, dim, &rows))?;
            }
        }
        Ok(())
    }

    fn write_known_items(&mut self, known: &KnownItems) -> Result<(), SnapshotError> {
        let (hash_key, texts) = hottest_texts(known);
        let (mut columns, mut number) = (TextColumns::default(), 0);
        let mut json = Vec::new();
        for (id, text) in texts {
            json.clear();
            serde_json::to_writer(&mut json, &*text).map_err(|error| SnapshotError::at(self.folder)(error.into()))?;
            if columns.n() > 0 && columns.n_bytes() + json.len() > self.max_bytes {
                self.write_texts(number, hash_key, &columns)?;
                columns = TextColumns::default();
                number += 1;
            }
            columns.push(id, &json);
        }
        if columns.n() > 0 {
            self.write_texts(number, hash_key, &columns)?;
        }
        Ok(())
    }

    fn write_texts(&mut self, number: usize, hash_key: HashKey, columns: &TextColumns) -> Result<(), SnapshotError> {
        let name = format!("{}-{number:06}", Kind::KnownItems.as_str());
        self.write_part(&name, Kind::KnownItems, |out| columns.write(out, hash_key))
    }

    fn write_part(
        &mut self,
        name: &str,
        kind: Kind,
        write: impl FnOnce(&mut dyn Write) -> io::Result<Exported>,
    ) -> Result<(), SnapshotError> {
        let path = self.folder.join(name).with_extension("safetensors");
        let write_file = || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
            let exported = write(&mut out)?;
            out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            Ok(exported)
        };
        let exported = write_file().map_err(SnapshotError::at(&path))?;
        self.counts.add(kind, exported.n_entries, exported.n_bytes);
        Ok(())
    }
}

/// All known texts, hottest first, and the key under which their ids are hashed. Each text is looked up when the iterator comes
/// to it, so that those that are evicted meanwhile do not stay in memory.
fn hottest_texts(known: &KnownItems) -> (HashKey, impl Iterator<Item = (IdKey, Arc<ItemText>)>) {
    let (hash_key, ids) = hottest_ids(known);
    (hash_key, ids.into_iter().filter_map(|id| Some((id, known.peek(id)?))))
}

/// Reads both again if the key changed meanwhile.
fn hottest_ids(known: &KnownItems) -> (HashKey, Vec<IdKey>) {
    loop {
        let (hash_key, ids) = (known.hash_key(), known.hottest_ids());
        if known.hash_key() == hash_key {
            return (hash_key, ids);
        }
    }
}

/// Writes all vectors of one digest into one file, hottest first.
///
/// The vectors stay in memory until the file is written, in addition to those that a busy cache inserts in their place.
pub fn export<P: VectorSource>(
    out: &mut dyn Write,
    cache: &VectorCache<EmbeddingKey<P>>,
    digest: Digest<P>,
    dim: usize,
) -> io::Result<Exported> {
    let keys = cache.hottest_keys().into_iter().filter(|key| key.part == digest).collect();
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
    let exported = write_rows(&mut out, digest, dim, &rows(cache, keys, dim))?;
    out.flush()?;
    Ok(exported)
}

/// The vectors under `keys` that are still cached.
fn rows<P: VectorSource>(
    cache: &VectorCache<EmbeddingKey<P>>,
    keys: Vec<EmbeddingKey<P>>,
    dim: usize,
) -> Vec<(EmbeddingKey<P>, Vector)> {
    let vectors = cache.peek_many(&keys);
    let found = keys.into_iter().zip(vectors).filter_map(|(key, vector)| Some((key, vector?)));
    found.filter(|(_key, vector)| vector.len() == dim).collect()
}

fn write_rows<P: VectorSource>(
    out: &mut dyn Write,
    digest: Digest<P>,
    dim: usize,
    rows: &[(EmbeddingKey<P>, Vector)],
) -> io::Result<Exported> {
    let vectors = rows.iter().map(|(_key, vector)| bytemuck::cast_slice(vector)).collect();
    let text_digests = rows.iter().map(|(key, _vector)| key.text.as_bytes().as_slice()).collect();
    let n = rows.len();
    let part = NewPart {
        kind: P::KIND,
        n_entries: n,
        own_metadata: vec![(DIGEST, digest.to_string()), (DIM, dim.to_string())],
        tensors: vec![
            Tensor { name: VECTORS, dtype: Dtype::F32, shape: vec![n, dim], pieces: vectors },
            Tensor { name: TEXT_DIGESTS, dtype: Dtype::U8, shape: vec![n, DIGEST_BYTES], pieces: text_digests },
        ],
    };
    part.write(out)
}

/// The tensors of a part of known items.
#[derive(Default)]
struct TextColumns {
    id_keys: Vec<u8>,
    text_ends: Vec<u8>,
    texts: Vec<u8>,
}

impl TextColumns {
    fn push(&mut self, id: IdKey, text: &[u8]) {
        self.id_keys.extend(id.as_bytes());
        self.texts.extend(text);
        self.text_ends.extend((self.texts.len() as u64).to_le_bytes());
    }

    fn n(&self) -> usize {
        self.text_ends.len() / size_of::<u64>()
    }

    fn n_bytes(&self) -> usize {
        self.id_keys.len() + self.text_ends.len() + self.texts.len()
    }

    fn write(&self, out: &mut dyn Write, hash_key: HashKey) -> io::Result<Exported> {
        let n = self.n();
        let HashKey([high, low]) = hash_key;
        let part = NewPart {
            kind: Kind::KnownItems,
            n_entries: n,
            own_metadata: vec![(ID_HASH_KEY, format!("{high:016x}{low:016x}"))],
            tensors: vec![
                Tensor { name: TEXT_ENDS, dtype: Dtype::U64, shape: vec![n], pieces: vec![&self.text_ends] },
                Tensor { name: ID_KEYS, dtype: Dtype::U8, shape: vec![n, DIGEST_BYTES], pieces: vec![&self.id_keys] },
                Tensor { name: TEXTS, dtype: Dtype::U8, shape: vec![self.texts.len()], pieces: vec![&self.texts] },
            ],
        };
        part.write(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Item, Priority};

    /// All known texts used to stay in memory until the last part was written, besides those that replaced them in the cache.
    #[test]
    fn texts_are_looked_up_when_they_are_written() {
        let known = KnownItems::new(1 << 20, 100);
        let item = |id| Item { id, text: Some(Ok(ItemText::titled(id))) };
        known.resolve(vec![item("a"), item("b"), item("c")], Priority::Request);
        let (_hash_key, mut texts) = hottest_texts(&known);
        assert!(texts.next().is_some());
        known.flush();
        assert_eq!(texts.next(), None, "a text that was forgotten is still held");
    }
}
