//! One part as bytes: a safetensors header followed by tensors. This file does not know what the tensors mean.
//!
//! The header is read and written with the safetensors crate's types, but the data is not: the crate's functions copy a whole
//! file, where this code copies nothing, and add up sizes from the header before comparing them with the file's size. Headers
//! are small here, so a large one is refused before it is parsed.

use super::{Exported, Kind, error::ReadError};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use std::{
    collections::BTreeMap,
    io::{self, BufWriter, Write},
};

pub(super) const VECTORS: &str = "vectors";
pub(super) const TEXT_DIGESTS: &str = "text_digests";
pub(super) const ID_KEYS: &str = "id_keys";
pub(super) const TEXT_ENDS: &str = "text_ends";
pub(super) const TEXTS: &str = "texts";

pub(super) const DIGEST: &str = "digest";
pub(super) const DIM: &str = "dim";
pub(super) const ID_HASH_KEY: &str = "id_hash_key";
const FORMAT: (&str, &str) = ("format", "midemb-vectors");
const VERSION: (&str, &str) = ("format_version", "1");
const KIND: &str = "kind";
const N: &str = "n";
const MADE_BY: &str = "made_by";
const CHECKSUM: &str = "checksum";

/// The headers we write have some hundred bytes.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// The file starts with the header's length as a u64.
const N_LENGTH_BYTES: usize = size_of::<u64>();
/// BLAKE3 is several times faster on long input than on many short pieces.
const HASHED_AT_ONCE: usize = 256 << 10;

/// The metadata of a part, ordered by key.
pub(super) type Entries = BTreeMap<String, String>;

/// A tensor to write.
pub(super) struct Tensor<'a> {
    pub(super) name: &'static str,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// The tensor's bytes are the concatenation of these.
    pub(super) pieces: Vec<&'a [u8]>,
}

/// A part to write.
pub(super) struct NewPart<'a> {
    pub(super) kind: Kind,
    pub(super) n_entries: usize,
    /// The metadata that only this kind of part has.
    pub(super) own_metadata: Vec<(&'static str, String)>,
    /// In descending order of their element sizes, so that each tensor is aligned to its elements.
    pub(super) tensors: Vec<Tensor<'a>>,
}

impl<'a> NewPart<'a> {
    pub(super) fn write(self, out: &mut dyn Write) -> io::Result<Exported> {
        let metadata = self.metadata()?;
        let mut infos = Vec::with_capacity(self.tensors.len());
        let mut end = 0;
        for tensor in &self.tensors {
            let start = end;
            end += tensor.pieces.iter().map(|piece| piece.len()).sum::<usize>();
            let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
            infos.push((tensor.name.to_owned(), info));
        }
        let header = Metadata::new(Some(metadata.into_iter().collect()), infos).map_err(io::Error::other)?;
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(N_LENGTH_BYTES), b' ');
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for piece in self.pieces() {
            out.write_all(piece)?;
        }
        let n_bytes = (N_LENGTH_BYTES + header.len() + end) as u64;
        Ok(Exported { n_entries: self.n_entries as u64, n_bytes })
    }

    fn metadata(&self) -> io::Result<Entries> {
        let mut entries = Entries::new();
        let made_by = concat!("midemb ", env!("CARGO_PKG_VERSION"));
        for (key, value) in [FORMAT, VERSION, (MADE_BY, made_by), (KIND, self.kind.as_str())] {
            entries.insert(key.to_owned(), value.to_owned());
        }
        entries.insert(N.to_owned(), self.n_entries.to_string());
        for (key, value) in &self.own_metadata {
            entries.insert((*key).to_owned(), value.clone());
        }
        let checksum = checksum(&entries, self.pieces())?;
        entries.insert(CHECKSUM.to_owned(), checksum);
        Ok(entries)
    }

    fn pieces(&self) -> impl Iterator<Item = &'a [u8]> {
        self.tensors.iter().flat_map(|tensor| tensor.pieces.iter().copied())
    }
}

/// The checksum over all metadata except the checksum itself, and over all bytes of the tensors.
fn checksum<'a>(entries: &Entries, pieces: impl Iterator<Item = &'a [u8]>) -> io::Result<String> {
    let mut hashed = BufWriter::with_capacity(HASHED_AT_ONCE, blake3::Hasher::new());
    for (key, value) in entries.iter().filter(|(key, _)| *key != CHECKSUM) {
        writeln!(hashed, "{key}={value}")?;
    }
    for piece in pieces {
        hashed.write_all(piece)?;
    }
    Ok(hashed.into_inner().map_err(io::IntoInnerError::into_error)?.finalize().to_hex().to_string())
}

/// Where a part comes from, which decides whether it must have a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// This program wrote it: the checksum is required.
    Own,
    /// It may have been made by other means: the checksum is optional.
    Elsewhere,
}

/// A part whose header agrees with its size and whose content agrees with its checksum.
pub(super) struct Part<'a> {
    entries: Entries,
    tensors: Metadata,
    data: &'a [u8],
}

/// A tensor that was read. Its data has the length that its shape says.
#[derive(Debug)]
pub(super) struct TensorView<'a> {
    pub(super) dtype: Dtype,
    pub(super) shape: &'a [usize],
    pub(super) data: &'a [u8],
}

impl<'a> Part<'a> {
    pub(super) fn parse(bytes: &'a [u8], origin: Origin) -> Result<Self, ReadError> {
        let (length, rest) = bytes.split_first_chunk().ok_or(ReadError::CutOff)?;
        let n_header_bytes = u64::from_le_bytes(*length);
        if n_header_bytes > MAX_HEADER_BYTES as u64 {
            return Err(ReadError::HeaderTooLong { n_bytes: n_header_bytes, max: MAX_HEADER_BYTES });
        }
        let (header, data) = rest.split_at_checked(n_header_bytes as usize).ok_or(ReadError::CutOff)?;
        let tensors: Metadata = serde_json::from_slice(header).map_err(|error| ReadError::Header(truncate(&error)))?;
        if tensors.data_len() != data.len() {
            return Err(ReadError::DataLength { described: tensors.data_len(), found: data.len() });
        }
        let entries = tensors.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let part = Part { entries, tensors, data };
        // The format and version come first: another version may give the rest another meaning.
        for (key, value) in [FORMAT, VERSION] {
            part.expect_entry(key, value)?;
        }
        part.verify_checksum(origin)?;
        Ok(part)
    }

    fn verify_checksum(&self, origin: Origin) -> Result<(), ReadError> {
        match self.entries.get(CHECKSUM) {
            None if origin == Origin::Elsewhere => Ok(()),
            None => Err(ReadError::NoEntry(CHECKSUM)),
            Some(stated) if *stated == checksum(&self.entries, std::iter::once(self.data))? => Ok(()),
            Some(_) => Err(ReadError::Checksum),
        }
    }

    /// The part's kind. Fails if the metadata has an entry that this kind does not have, such as a misspelt one.
    pub(super) fn kind(&self) -> Result<Kind, ReadError> {
        let found = self.entry(KIND)?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == found);
        let kind = kind.ok_or_else(|| self.wrong_entry(KIND, "content, item or known_items".to_owned()))?;
        let own = match kind {
            Kind::Content | Kind::Item => [DIGEST, DIM].as_slice(),
            Kind::KnownItems => [ID_HASH_KEY].as_slice(),
        };
        let known = |key: &str| [FORMAT.0, VERSION.0, KIND, N, MADE_BY, CHECKSUM].contains(&key) || own.contains(&key);
        match self.entries.keys().find(|key| !known(key)) {
            Some(unknown) => Err(ReadError::UnknownEntry(truncate(unknown))),
            None => Ok(kind),
        }
    }

    pub(super) fn entry(&self, key: &'static str) -> Result<&str, ReadError> {
        self.entries.get(key).map(String::as_str).ok_or(ReadError::NoEntry(key))
    }

    pub(super) fn expect_entry(&self, key: &'static str, value: &str) -> Result<(), ReadError> {
        if self.entry(key)? == value { Ok(()) } else { Err(self.wrong_entry(key, value.to_owned())) }
    }

    /// The error for an entry that has the wrong value.
    pub(super) fn wrong_entry(&self, key: &'static str, expected: String) -> ReadError {
        ReadError::Entry { key, found: self.entries.get(key).map(truncate).unwrap_or_default(), expected }
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.tensors.info(name).is_some()
    }

    /// Fails if there is a tensor with another name.
    pub(super) fn expect_only_tensors(&self, names: &[&str]) -> Result<(), ReadError> {
        let found = self.tensors.offset_keys();
        match found.iter().find(|name| !names.contains(&name.as_str())) {
            Some(unknown) => Err(ReadError::UnknownTensor(truncate(unknown))),
            None => Ok(()),
        }
    }

    pub(super) fn tensor(&self, name: &'static str) -> Result<TensorView<'_>, ReadError> {
        let info = self.tensors.info(name).ok_or(ReadError::NoTensor(name))?;
        let (start, end) = info.data_offsets;
        let data = self.data.get(start..end).ok_or(ReadError::CutOff)?;
        Ok(TensorView { dtype: info.dtype, shape: &info.shape, data })
    }

    /// The data of a tensor that must have this type and shape.
    pub(super) fn tensor_data(&self, name: &'static str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], ReadError> {
        let found = self.tensor(name)?;
        if found.dtype == dtype && found.shape == shape {
            return Ok(found.data);
        }
        Err(ReadError::Tensor { name, found: found.describe(), expected: format!("{dtype} {shape:?}") })
    }

    /// Fails unless the metadata says that there are `n` entries.
    pub(super) fn expect_n_entries(&self, n: usize) -> Result<(), ReadError> {
        self.expect_entry(N, &n.to_string())
    }
}

impl TensorView<'_> {
    pub(super) fn describe(&self) -> String {
        truncate(format!("{} {:?}", self.dtype, self.shape))
    }
}

/// Text from a file, shortened and without control characters, so that it fits into one line of an error message.
pub(super) fn truncate(text: impl ToString) -> String {
    const MAX_CHARS: usize = 120;
    let text = text.to_string();
    text.chars().take(MAX_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
