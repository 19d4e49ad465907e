//! One part as bytes: a safetensors header, and the tensors behind it. What the tensors mean is not known here.
//!
//! The header is read and written through the crate's own description of it; the bytes are not, because its functions copy
//! a whole file where this copies nothing, and add up sizes from the header before they compare them with the file's.
//! Headers are tiny here, so a large one is refused before it is parsed.

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

/// Ours have some hundred bytes.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// The first bytes say how long the header is.
const N_LENGTH_BYTES: usize = size_of::<u64>();
/// BLAKE3 is several times as fast on long input as on many short pieces.
const HASHED_AT_ONCE: usize = 256 << 10;

/// The metadata of a part, in the order of its keys.
pub(super) type Entries = BTreeMap<String, String>;

/// A tensor to be written.
pub(super) struct Tensor<'a> {
    pub(super) name: &'static str,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes, in order.
    pub(super) pieces: Vec<&'a [u8]>,
}

/// Writes a part of `n` entries. Tensors of larger numbers stand first: so each begins at a multiple of its numbers' size.
pub(super) fn write(
    out: &mut dyn Write,
    (kind, n): (Kind, usize),
    own_entries: Vec<(&str, String)>,
    tensors: &[Tensor<'_>],
) -> io::Result<Exported> {
    let made_by = concat!("midemb ", env!("CARGO_PKG_VERSION")).to_owned();
    let common = [(FORMAT.0, FORMAT.1.to_owned()), (VERSION.0, VERSION.1.to_owned()), (MADE_BY, made_by)];
    let entries = common.into_iter().chain([(KIND, kind.as_str().to_owned()), (N, n.to_string())]).chain(own_entries);
    let mut entries: Entries = entries.map(|(key, value)| (key.to_owned(), value)).collect();
    let pieces = || tensors.iter().flat_map(|tensor| tensor.pieces.iter().copied());
    entries.insert(CHECKSUM.to_owned(), checksum(&entries, pieces())?);

    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        (tensor.name.to_owned(), info)
    });
    let infos = infos.collect();
    let metadata = Metadata::new(Some(entries.into_iter().collect()), infos).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(N_LENGTH_BYTES), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    pieces().try_for_each(|piece| out.write_all(piece))?;
    Ok(Exported { n_entries: n as u64, n_bytes: (N_LENGTH_BYTES + header.len() + end) as u64 })
}

/// Over all entries but the checksum itself, and all bytes of the tensors.
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

/// Whether a part may come without a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// We wrote it.
    Own,
    /// It need not have one.
    Elsewhere,
}

/// A part whose header was checked against its bytes, and whose bytes against the checksum.
pub(super) struct Part<'a> {
    entries: Entries,
    tensors: Metadata,
    data: &'a [u8],
}

/// A tensor that was read: as many bytes as its shape says.
#[derive(Debug)]
pub(super) struct Found<'a> {
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
        let tensors: Metadata = serde_json::from_slice(header).map_err(|error| ReadError::Header(short(&error)))?;
        if tensors.data_len() != data.len() {
            return Err(ReadError::DataLength { said: tensors.data_len(), found: data.len() });
        }
        let entries = tensors.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let part = Part { entries, tensors, data };
        // What a version that is not known means by the rest is not known either.
        for (key, value) in [FORMAT, VERSION] {
            part.expect(key, value)?;
        }
        part.check_sum(origin)?;
        Ok(part)
    }

    fn check_sum(&self, origin: Origin) -> Result<(), ReadError> {
        match self.entries.get(CHECKSUM) {
            None if origin == Origin::Elsewhere => Ok(()),
            None => Err(ReadError::NoEntry(CHECKSUM)),
            Some(said) if *said == checksum(&self.entries, std::iter::once(self.data))? => Ok(()),
            Some(_) => Err(ReadError::Checksum),
        }
    }

    /// What it holds. Refused where the metadata has an entry that such a part does not have, for example a misspelt one.
    pub(super) fn kind(&self) -> Result<Kind, ReadError> {
        let found = self.entry(KIND)?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.as_str() == found);
        let kind = kind.ok_or_else(|| self.other(KIND, Kind::ALL.map(Kind::as_str).join(", ")))?;
        let own = match kind {
            Kind::Content | Kind::Item => [DIGEST, DIM].as_slice(),
            Kind::KnownItems => [ID_HASH_KEY].as_slice(),
        };
        let known = |key: &str| [FORMAT.0, VERSION.0, KIND, N, MADE_BY, CHECKSUM].contains(&key) || own.contains(&key);
        match self.entries.keys().find(|key| !known(key)) {
            Some(unknown) => Err(ReadError::UnknownEntry(short(unknown))),
            None => Ok(kind),
        }
    }

    pub(super) fn entry(&self, key: &'static str) -> Result<&str, ReadError> {
        self.entries.get(key).map(String::as_str).ok_or(ReadError::NoEntry(key))
    }

    pub(super) fn expect(&self, key: &'static str, value: &str) -> Result<(), ReadError> {
        if self.entry(key)? == value { Ok(()) } else { Err(self.other(key, value.to_owned())) }
    }

    /// The error that says what an entry should have been.
    pub(super) fn other(&self, key: &'static str, expected: String) -> ReadError {
        ReadError::Entry { key, found: self.entries.get(key).map(short).unwrap_or_default(), expected }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.info(name).is_some()
    }

    /// Refused where it has a tensor of another name.
    pub(super) fn has_only(&self, names: &[&str]) -> Result<(), ReadError> {
        let found = self.tensors.offset_keys();
        match found.iter().find(|name| !names.contains(&name.as_str())) {
            Some(unknown) => Err(ReadError::UnknownTensor(short(unknown))),
            None => Ok(()),
        }
    }

    pub(super) fn tensor(&self, name: &'static str) -> Result<Found<'_>, ReadError> {
        let info = self.tensors.info(name).ok_or(ReadError::NoTensor(name))?;
        let (start, end) = info.data_offsets;
        let data = self.data.get(start..end).ok_or(ReadError::CutOff)?;
        Ok(Found { dtype: info.dtype, shape: &info.shape, data })
    }

    /// A tensor that can be of one type and shape only.
    pub(super) fn tensor_of(&self, name: &'static str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], ReadError> {
        let found = self.tensor(name)?;
        if found.dtype == dtype && found.shape == shape {
            return Ok(found.data);
        }
        Err(ReadError::Tensor { name, found: found.described(), expected: format!("{dtype} {shape:?}") })
    }

    /// Checks that the metadata says `n` entries, too.
    pub(super) fn has_entries(&self, n: usize) -> Result<(), ReadError> {
        self.expect(N, &n.to_string())
    }
}

impl Found<'_> {
    pub(super) fn described(&self) -> String {
        short(format!("{} {:?}", self.dtype, self.shape))
    }
}

/// What a file says, as far as an error's one line has room for it.
pub(super) fn short(said: impl ToString) -> String {
    const MAX_CHARS: usize = 120;
    let said = said.to_string();
    said.chars().take(MAX_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
