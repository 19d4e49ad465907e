//! One Parquet file: row groups are appended until it is closed, and only then does it appear to readers.
//!
//! If a row group cannot be written, the file is cut off after the one before it and closed: that frees what the failed one took,
//! so on a full disk there is usually room for the few kilobytes that close the file.

use super::{
    folder::{self, NewFile, UtcTime},
    row_group,
    sample::Sample,
    schema::{properties, schema},
};
use parquet::{
    errors::ParquetError,
    file::{
        metadata::{FileMetaData, ParquetMetaDataBuilder, ParquetMetaDataWriter},
        writer::SerializedFileWriter,
    },
};
use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
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
pub(super) struct OpenFile {
    new: NewFile,
    /// Encodes a row group in memory, so that it is on the disk as a whole or not at all.
    encoder: SerializedFileWriter<Vec<u8>>,
    /// How many row groups are on the disk.
    n_row_groups: usize,
    /// What they take, with all before them.
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
        let schema = schema()?;
        let properties = Arc::new(properties(&schema));
        let encoder = SerializedFileWriter::new(Vec::new(), schema, properties)?;
        let new = folder::create(folder, time, bundle_digest)?;
        Ok(OpenFile { new, encoder, n_row_groups: 0, n_bytes: 0, counts: Counts::default(), close_at })
    }

    /// Appends the samples as one row group. After an error, the file can only be closed.
    pub(super) fn append(&mut self, samples: &[Sample]) -> Result<(), WriteError> {
        row_group::append(samples, &mut self.encoder)?;
        self.encoder.flush()?;
        let encoded = self.encoder.inner_mut();
        self.new.file.write_all_at(encoded, self.n_bytes)?;
        self.n_bytes += encoded.len() as u64;
        encoded.clear();
        self.n_row_groups += 1;
        let Counts { n_requests, n_rows } = Counts::of(samples);
        self.counts.n_requests += n_requests;
        self.counts.n_rows += n_rows;
        Ok(())
    }

    /// Completes the file with the row groups that were written. If that fails, the file is removed.
    pub(super) fn close(self) -> Result<PathBuf, WriteError> {
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

    /// Not by the library's writer, whose footer would list a row group that could not be written.
    fn write_footer(&self) -> Result<(), WriteError> {
        self.new.file.set_len(self.n_bytes)?;
        let created_by = Some(format!("midemb {}", env!("CARGO_PKG_VERSION")));
        let version = self.encoder.properties().writer_version().as_num();
        let schema = Arc::new(self.encoder.schema_descr().clone());
        let metadata = FileMetaData::new(version, self.counts.n_rows as i64, created_by, None, schema, None);
        let row_groups = self.encoder.flushed_row_groups().iter().take(self.n_row_groups).cloned().collect();
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
