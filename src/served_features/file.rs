//! One Parquet file: row groups are appended until it is closed, and only then does it appear to readers.
//!
//! If a row group cannot be written, the file is cut off after the one before it and closed: that frees what the failed one took,
//! so on a full disk there is usually room for the few kilobytes that close the file.

use super::{
    folder::{self, NewFile, UtcTime},
    row_group::{self, RowGroup},
    sample::Sample,
    schema::schema,
};
use parquet::{
    errors::ParquetError,
    file::metadata::{FileMetaData, ParquetMetaDataBuilder, ParquetMetaDataWriter, RowGroupMetaData},
    schema::types::SchemaDescPtr,
};
use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};
use thiserror::Error;

/// Why a file cannot be written. The messages of both libraries say what happened.
#[derive(Debug, Error)]
pub(super) enum WriteError {
    #[error(transparent)]
    Disk(#[from] io::Error),
    #[error(transparent)]
    Parquet(#[from] ParquetError),
}

/// What a file begins and ends with.
const MAGIC: &[u8; 4] = b"PAR1";
/// The version of the format that knows dictionaries as they are used here.
const FORMAT_VERSION: i32 = 2;

/// How many requests and rows something holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) n_requests: u64,
    pub(super) n_rows: u64,
}

impl Counts {
    pub(super) fn of(samples: &[Sample]) -> Self {
        let n_rows = samples.iter().map(|sample| sample.n_rows() as u64).sum();
        Counts { n_requests: samples.len() as u64, n_rows }
    }
}

/// A file that is open.
#[derive(Debug)]
pub(super) struct OpenFile {
    new: NewFile,
    schema: SchemaDescPtr,
    row_groups: Vec<RowGroupMetaData>,
    /// Up to the end of the last row group.
    pub(super) n_bytes: u64,
    pub(super) counts: Counts,
    pub(super) close_at: Instant,
}

impl OpenFile {
    pub(super) fn create(
        folder: &Path,
        time: &UtcTime,
        bundle_digest: &str,
        close_at: Instant,
    ) -> Result<Self, WriteError> {
        let (schema, new) = (schema()?, folder::create(folder, time, bundle_digest)?);
        let n_bytes = MAGIC.len() as u64;
        let file = OpenFile { new, schema, row_groups: Vec::new(), n_bytes, counts: Counts::default(), close_at };
        if let Err(error) = file.new.file.write_all_at(MAGIC, 0) {
            file.remove();
            return Err(error.into());
        }
        Ok(file)
    }

    /// Appends the samples as one row group. Uses the memory of `buffer`.
    pub(super) fn append(&mut self, samples: &[Sample], buffer: &mut Vec<u8>) -> Result<(), WriteError> {
        let RowGroup { bytes, metadata } =
            row_group::encode(samples, &self.schema, self.n_bytes, std::mem::take(buffer))?;
        let written = self.new.file.write_all_at(&bytes, self.n_bytes);
        if written.is_ok() {
            self.n_bytes += bytes.len() as u64;
            self.row_groups.push(metadata);
            let Counts { n_requests, n_rows } = Counts::of(samples);
            self.counts.n_requests += n_requests;
            self.counts.n_rows += n_rows;
        }
        *buffer = bytes;
        Ok(written?)
    }

    /// Completes the file with the row groups that were written. If that fails, the file is removed.
    pub(super) fn close(mut self) -> Result<PathBuf, WriteError> {
        if let Err(error) = self.write_footer() {
            self.remove();
            return Err(error);
        }
        let unfinished = self.new.unfinished_path().to_owned();
        self.new.publish().map_err(|error| {
            // It would be a left-over of a process that still runs.
            let _ = fs::remove_file(unfinished);
            error.into()
        })
    }

    fn write_footer(&mut self) -> Result<(), WriteError> {
        // A row group that failed may have left a part of itself.
        self.new.file.set_len(self.n_bytes)?;
        let created_by = Some(format!("midemb {}", env!("CARGO_PKG_VERSION")));
        let n_rows = self.counts.n_rows as i64;
        let metadata = FileMetaData::new(FORMAT_VERSION, n_rows, created_by, None, self.schema.clone(), None);
        let row_groups = std::mem::take(&mut self.row_groups);
        let metadata = ParquetMetaDataBuilder::new(metadata).set_row_groups(row_groups).build();
        let mut footer = Vec::new();
        ParquetMetaDataWriter::new(&mut footer, &metadata).finish()?;
        Ok(self.new.file.write_all_at(&footer, self.n_bytes)?)
    }

    #[cfg(test)]
    pub(super) fn unfinished_path(&self) -> &Path {
        self.new.unfinished_path()
    }

    /// Appends what is no row group, as a write does that fails half-way.
    #[cfg(test)]
    pub(super) fn damage(&self) {
        self.new.file.write_all_at(&[0xff; 5000], self.n_bytes).unwrap();
    }

    /// Gives the file up.
    pub(super) fn remove(self) {
        // If this fails, the next process removes it.
        let _ = fs::remove_file(self.new.unfinished_path());
    }
}
