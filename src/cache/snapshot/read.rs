//! Reads parts into the caches. Everything in a file is checked before its first entry is inserted.
//!
//! Entries are inserted coldest first and ahead of their readers, so the hottest are evicted last.

use super::{
    Imported, Kind, PART_BYTES, Served, VectorSource,
    error::ReadError,
    format::{
        DIGEST, DIM, ID_HASH_KEY, ID_KEYS, Origin, Part, TEXT_DIGESTS, TEXT_ENDS, TEXTS, TensorView, VECTORS, truncate,
    },
};
use crate::{
    cache::{
        Caches,
        known_items::{HashKey, KnownItems},
        vectors::VectorCache,
    },
    domain::{Digest, EmbeddingKey, IdKey, ItemText, TextDigest, Vector, all_finite},
};
use half::{bf16, f16};
use safetensors::Dtype;
use std::{fs::File, io::Read, path::Path};

/// A part may exceed [`PART_BYTES`] if it holds a single, long text.
const MAX_FILE_BYTES: u64 = 2 * PART_BYTES as u64;

/// Reads a part's file into `buffer`, replacing its content.
pub(super) fn load(path: &Path, buffer: &mut Vec<u8>) -> Result<(), ReadError> {
    let file = File::open(path)?;
    let n_bytes = file.metadata()?.len();
    buffer.clear();
    if n_bytes <= MAX_FILE_BYTES {
        buffer.reserve(n_bytes as usize + 1);
        // One byte more than the limit shows that the file is too long, even if its metadata states no size.
        file.take(MAX_FILE_BYTES + 1).read_to_end(buffer)?;
    }
    if n_bytes.max(buffer.len() as u64) > MAX_FILE_BYTES {
        return Err(ReadError::FileTooLarge { max: MAX_FILE_BYTES });
    }
    Ok(())
}

/// Puts a part that this program wrote into the caches.
pub(super) fn take_own(bytes: &[u8], caches: &Caches, served: &[Served]) -> Result<Imported, ReadError> {
    take_part(&Part::parse(bytes, Origin::Own)?, caches, served)
}

/// Puts a part that may be made elsewhere into the caches.
pub(super) fn take(bytes: &[u8], caches: &Caches, served: &[Served]) -> Result<Imported, ReadError> {
    take_part(&Part::parse(bytes, Origin::Elsewhere)?, caches, served)
}

fn take_part(part: &Part<'_>, caches: &Caches, served: &[Served]) -> Result<Imported, ReadError> {
    match part.kind()? {
        Kind::Content => take_vectors(part, &caches.contents, served.iter().map(|s| (s.encoder, s.content_dim))),
        Kind::Item => take_vectors(part, &caches.items, served.iter().map(|s| (s.tower, s.record_dim))),
        Kind::KnownItems => take_known_items(part, &caches.known_items),
    }
}

fn take_vectors<P: VectorSource>(
    part: &Part<'_>,
    cache: &VectorCache<EmbeddingKey<P>>,
    mut served: impl Iterator<Item = (Digest<P>, usize)>,
) -> Result<Imported, ReadError> {
    let stated = part.entry(DIGEST)?;
    let served = served.find(|(digest, _dim)| digest.to_string() == stated);
    let (digest, dim) = served.ok_or_else(|| ReadError::Foreign { kind: P::KIND, digest: truncate(stated) })?;
    part.expect_entry(DIM, &dim.to_string())?;
    let found = part.tensor(VECTORS)?;
    let vectors = widen(&found, dim)?;
    part.expect_n_entries(vectors.len())?;
    let texts = text_digests(part, vectors.len())?;
    if let Some(row) = vectors.iter().position(|vector| !all_finite(vector)) {
        return Err(ReadError::NotFinite { row });
    }
    let n_entries = vectors.len() as u64;
    for (text, vector) in texts.into_iter().zip(vectors).rev() {
        cache.insert_ahead(EmbeddingKey { part: digest, text }, vector);
    }
    Ok(Imported { kind: P::KIND, n_entries, n_skipped: 0 })
}

/// The rows of a tensor, which must be `[n, dim]`, as F32.
fn widen(found: &TensorView<'_>, dim: usize) -> Result<Vec<Vector>, ReadError> {
    let has_rows = dim > 0 && matches!(found.shape, [_n, n_columns] if *n_columns == dim);
    let vectors = match found.dtype {
        Dtype::F32 if has_rows => rows(found.data, dim, |value| f32::from_le_bytes(*value)),
        Dtype::F16 if has_rows => rows(found.data, dim, |value| f16::from_le_bytes(*value).to_f32()),
        Dtype::BF16 if has_rows => rows(found.data, dim, |value| bf16::from_le_bytes(*value).to_f32()),
        _ => {
            let expected = format!("F32, F16 or BF16 [n, {dim}]");
            return Err(ReadError::Tensor { name: VECTORS, found: found.describe(), expected });
        }
    };
    Ok(vectors)
}

/// Converts each row from the file's bytes into its vector directly.
fn rows<const N: usize>(data: &[u8], dim: usize, value: impl Fn(&[u8; N]) -> f32) -> Vec<Vector> {
    data.chunks_exact(dim * N).map(|row| row.as_chunks().0.iter().map(&value).collect()).collect()
}

fn text_digests(part: &Part<'_>, n: usize) -> Result<Vec<TextDigest>, ReadError> {
    if part.has_tensor(TEXT_DIGESTS) {
        part.expect_only_tensors(&[VECTORS, TEXT_DIGESTS])?;
        let digests = part.tensor_data(TEXT_DIGESTS, Dtype::U8, &[n, 16])?;
        return Ok(digests.as_chunks().0.iter().map(|bytes| TextDigest::from_bytes(*bytes)).collect());
    }
    part.expect_only_tensors(&[VECTORS, TEXTS, TEXT_ENDS])?;
    if !part.has_tensor(TEXTS) && !part.has_tensor(TEXT_ENDS) {
        return Err(ReadError::NoTensor(TEXT_DIGESTS));
    }
    texts(part, n)?.map(|text| text.map(|text| TextDigest::of(&text))).collect()
}

/// The `n` texts. Each is parsed when the iterator reaches it.
fn texts(part: &Part<'_>, n: usize) -> Result<impl Iterator<Item = Result<ItemText, ReadError>>, ReadError> {
    let found = part.tensor(TEXTS)?;
    let all = part.tensor_data(TEXTS, Dtype::U8, &[found.data.len()])?;
    let ends = part.tensor_data(TEXT_ENDS, Dtype::U64, &[n])?.as_chunks().0;
    if ends.last().map_or(0, |end| u64::from_le_bytes(*end)) != all.len() as u64 {
        return Err(ReadError::TextEnd { row: n.saturating_sub(1) });
    }
    let mut start = 0;
    Ok(ends.iter().enumerate().map(move |(row, end)| {
        let end = u64::from_le_bytes(*end) as usize;
        let text = all.get(start..end).ok_or(ReadError::TextEnd { row })?;
        start = end;
        serde_json::from_slice(text).map_err(|error| ReadError::Text { row, error: truncate(&error) })
    }))
}

fn take_known_items(part: &Part<'_>, known: &KnownItems) -> Result<Imported, ReadError> {
    part.expect_only_tensors(&[TEXT_ENDS, ID_KEYS, TEXTS])?;
    let n = part.tensor(TEXT_ENDS)?.shape.first().copied().unwrap_or_default();
    part.expect_n_entries(n)?;
    let ids = part.tensor_data(ID_KEYS, Dtype::U8, &[n, 16])?.as_chunks().0;
    let texts: Vec<ItemText> = texts(part, n)?.collect::<Result<_, _>>()?;
    known.adopt_hash_key(hash_key(part)?)?;
    let mut imported = Imported { kind: Kind::KnownItems, n_entries: 0, n_skipped: 0 };
    for (id, text) in ids.iter().zip(texts).rev() {
        match known.restore(IdKey::from_bytes(*id), text) {
            Ok(()) => imported.n_entries += 1,
            Err(_fault) => imported.n_skipped += 1,
        }
    }
    Ok(imported)
}

fn hash_key(part: &Part<'_>) -> Result<HashKey, ReadError> {
    let digits = part.entry(ID_HASH_KEY)?;
    let half = |digits: Option<&str>| u64::from_str_radix(digits?, 16).ok();
    match (half(digits.get(..16)), half(digits.get(16..))) {
        (Some(high), Some(low)) if digits.len() == 32 => Ok(HashKey([high, low])),
        // The key is a secret, and errors go into logs.
        _ => Err(ReadError::Entry { key: ID_HASH_KEY, found: String::new(), expected: "32 hex digits".to_owned() }),
    }
}
