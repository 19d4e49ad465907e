//! From samples to one row group, the part of a file that is encoded and written at once.
//!
//! The pages are made here rather than by the library's column writers, which look at each of the 32,000 levels and values of a
//! page (docs/decisions.md has the figures). What repeats within a request is a run, ids are encoded as they are copied from the
//! message, and vectors are copied from the answer's buffer in as few pieces as there are runs of rows that are OK.
//! The library writes the headers of the pages and the metadata.
//!
//! Every chunk of a column has as many rows as the samples together, in their order. Nothing is compressed: single-precision
//! vectors hardly shrink, and not even the fastest compression is as cheap as writing them.

use super::{
    hybrid::{index_width, put_run, put_sequences},
    sample::{Sample, StatusRun, status_name},
    schema::Column,
};
use crate::domain::RowStatus;
use bytes::{BufMut, Bytes, BytesMut};
use parquet::{
    basic::{Compression, Encoding},
    column::page::{CompressedPage, Page, PageWriter},
    errors::ParquetError,
    file::{
        metadata::{ColumnChunkMetaData, RowGroupMetaData},
        writer::{SerializedPageWriter, TrackedWrite},
    },
    schema::types::SchemaDescPtr,
};
use std::{collections::HashMap, hash::Hash, mem};

/// A row group in memory. Its metadata has the offsets that it has in its file.
pub(super) struct RowGroup {
    pub(super) bytes: Vec<u8>,
    pub(super) metadata: RowGroupMetaData,
}

/// Samples with the runs of their statuses.
struct Rows<'a> {
    samples: &'a [Sample],
    status_runs: Vec<Vec<StatusRun>>,
}

impl<'a> Rows<'a> {
    fn each(&self) -> impl Iterator<Item = (&'a Sample, &[StatusRun])> {
        self.samples.iter().zip(self.status_runs.iter().map(Vec::as_slice))
    }

    /// One value per request.
    fn per_request<T>(&self, value: impl Fn(&'a Sample) -> T) -> Vec<(Option<T>, usize)> {
        self.samples.iter().map(|sample| (Some(value(sample)), sample.n_rows())).collect()
    }
}

/// Encodes `samples`, which will be at `offset` of their file. `buffer` is used for the bytes, so that its memory is used again.
pub(super) fn encode(
    samples: &[Sample],
    schema: &SchemaDescPtr,
    offset: u64,
    mut buffer: Vec<u8>,
) -> Result<RowGroup, ParquetError> {
    buffer.clear();
    let rows = Rows { samples, status_runs: samples.iter().map(Sample::status_runs).collect() };
    let sink = TrackedWrite::new(buffer);
    let mut encoder =
        Encoder { schema, offset, sink, page: BytesMut::new(), chunks: Vec::new(), chunk: Chunk::default() };
    encoder.columns(&rows)?;
    let Encoder { sink, chunks, .. } = encoder;
    let bytes = sink.into_inner()?;
    let metadata = RowGroupMetaData::builder(schema.clone())
        .set_num_rows(samples.iter().map(|sample| sample.n_rows() as i64).sum())
        .set_total_byte_size(bytes.len() as i64)
        .set_column_metadata(chunks)
        .build()?;
    Ok(RowGroup { bytes, metadata })
}

struct Encoder<'a> {
    schema: &'a SchemaDescPtr,
    /// Where the row group begins in its file.
    offset: u64,
    sink: TrackedWrite<Vec<u8>>,
    /// The page that is being made. Its memory is used again once the page is in the sink.
    page: BytesMut,
    chunks: Vec<ColumnChunkMetaData>,
    chunk: Chunk,
}

/// What the metadata says of the column that is being written.
#[derive(Default)]
struct Chunk {
    dictionary_offset: Option<i64>,
    data_offset: Option<i64>,
    n_bytes: i64,
    n_values: i64,
}

impl Encoder<'_> {
    fn columns<'a>(&mut self, rows: &Rows<'a>) -> Result<(), ParquetError> {
        self.dictionary(Column::RequestId, &rows.per_request(|s| s.request.request_id.as_str()), put_text)?;
        let user_id = |s: &'a Sample| Some(s.request.user_id.as_str()).filter(|id| !id.is_empty());
        let users: Vec<_> = rows.samples.iter().map(|s| (user_id(s), s.n_rows())).collect();
        self.dictionary(Column::UserId, &users, put_text)?;
        self.dictionary(Column::Time, &rows.per_request(|s| s.request.at_us), |page, at| page.put_i64_le(at))?;
        self.dictionary(Column::ModelName, &rows.per_request(|s| s.answer.model.name.as_str()), put_text)?;
        self.dictionary(Column::ModelVersion, &rows.per_request(|s| s.answer.model.version.as_str()), put_text)?;
        self.dictionary(Column::BundleDigest, &rows.per_request(|s| s.answer.model.digest.as_str()), put_text)?;
        self.positions(rows)?;
        self.item_ids(rows)?;
        let runs = rows.status_runs.iter().flatten();
        let statuses: Vec<_> = runs.map(|run| (Some(status_name(run.status)), run.n_rows)).collect();
        self.dictionary(Column::Status, &statuses, put_text)?;
        self.vectors(Column::MidEmb, rows, |s| s.answer.mid_emb.as_ref())?;
        self.cvr(rows)?;
        self.user_vectors(rows)?;
        self.vectors(Column::ItemEmb, rows, |s| s.answer.item_emb.as_ref())?;
        let lengths = rows.per_request(|s| s.answer.n_history_used as i32);
        self.dictionary(Column::HistoryLength, &lengths, |page, n| page.put_i32_le(n))
    }

    /// A column of few distinct values, each for a run of rows, or null for one where the schema permits that. `put` appends a
    /// value to the dictionary.
    fn dictionary<T: Copy + Eq + Hash>(
        &mut self,
        column: Column,
        runs: &[(Option<T>, usize)],
        put: impl Fn(&mut BytesMut, T),
    ) -> Result<(), ParquetError> {
        let mut places: HashMap<T, usize> = HashMap::new();
        let mut indexes = Vec::with_capacity(runs.len());
        for (value, n_rows) in runs.iter().filter_map(|(value, n_rows)| value.map(|value| (value, *n_rows))) {
            let n_known = places.len();
            let place = *places.entry(value).or_insert(n_known);
            if place == n_known {
                put(&mut self.page, value);
            }
            indexes.push((place, n_rows));
        }
        // The levels precede the indexes in the same page, and the dictionary is a page before it.
        let dictionary = self.page.split().freeze();
        let width = index_width(places.len());
        if self.schema.column(column as usize).max_def_level() > 0 {
            self.levels(|page| runs.iter().for_each(|(value, n)| put_run(page, *n, usize::from(value.is_some()), 1)));
        }
        let encoding = self.begin_indexes(places.len());
        for (place, n_rows) in indexes {
            put_run(&mut self.page, n_rows, place, width);
        }
        let indexes = self.page.split().freeze();
        self.write_dictionary(dictionary, places.len())?;
        let n_rows = runs.iter().map(|(_, n_rows)| n_rows).sum();
        self.write_data(indexes, n_rows, encoding)?;
        self.end_column(column)
    }

    fn positions(&mut self, rows: &Rows<'_>) -> Result<(), ParquetError> {
        for sample in rows.samples {
            for position in 0..sample.n_rows() {
                self.page.put_i32_le(position as i32);
            }
        }
        self.plain_column(Column::Position, rows)
    }

    fn item_ids(&mut self, rows: &Rows<'_>) -> Result<(), ParquetError> {
        for sample in rows.samples {
            self.page.put_slice(&sample.request.item_ids);
        }
        self.plain_column(Column::ItemId, rows)
    }

    fn plain_column(&mut self, column: Column, rows: &Rows<'_>) -> Result<(), ParquetError> {
        let values = self.page.split().freeze();
        self.write_data(values, rows.samples.iter().map(Sample::n_rows).sum(), Encoding::PLAIN)?;
        self.end_column(column)
    }

    fn cvr(&mut self, rows: &Rows<'_>) -> Result<(), ParquetError> {
        self.levels(|page| {
            for (sample, runs) in rows.each() {
                let is_known = |run: &StatusRun| sample.answer.cvr.is_some() && run.status == RowStatus::Ok;
                runs.iter().for_each(|run| put_run(page, run.n_rows, usize::from(is_known(run)), 1));
            }
        });
        for (sample, runs) in rows.each() {
            if let Some(cvr) = &sample.answer.cvr {
                put_ok_rows(&mut self.page, cvr, size_of::<f32>(), runs);
            }
        }
        self.plain_column(Column::Cvr, rows)
    }

    /// A column of vectors of which each row has its own, in a page for each request.
    fn vectors<'a>(
        &mut self,
        column: Column,
        rows: &Rows<'a>,
        vectors: impl Fn(&'a Sample) -> Option<&'a Bytes>,
    ) -> Result<(), ParquetError> {
        for (sample, runs) in rows.each() {
            let vectors = vectors(sample);
            let n_row_bytes = vectors.map_or(0, |vectors| vectors.len() / sample.n_rows().max(1));
            self.page.reserve(vectors.map_or(0, Bytes::len) + n_level_bytes(sample.n_rows()));
            let n_levels = self.list_levels(runs, n_row_bytes / size_of::<f32>());
            if let Some(vectors) = vectors {
                put_ok_rows(&mut self.page, vectors, n_row_bytes, runs);
            }
            let page = self.page.split().freeze();
            self.write_data(page, n_levels, Encoding::PLAIN)?;
        }
        self.end_column(column)
    }

    /// The column of the user embeddings: all rows of a request have the same one, so it is written once, in the dictionary.
    fn user_vectors(&mut self, rows: &Rows<'_>) -> Result<(), ParquetError> {
        let n_floats =
            |sample: &Sample| sample.answer.user_emb.as_ref().map_or(0, |user| user.len() / size_of::<f32>());
        rows.samples.iter().filter_map(|s| s.answer.user_emb.as_ref()).for_each(|user| self.page.put_slice(user));
        let dictionary = self.page.split().freeze();
        let n_entries = rows.samples.iter().map(n_floats).sum();
        self.write_dictionary(dictionary, n_entries)?;
        let (mut first, width) = (0, index_width(n_entries));
        for (sample, runs) in rows.each() {
            let n_dims = n_floats(sample);
            let n_levels = self.list_levels(runs, n_dims);
            let n_ok: usize = runs.iter().filter(|run| run.status == RowStatus::Ok).map(|run| run.n_rows).sum();
            let encoding = self.begin_indexes(n_entries);
            put_sequences(&mut self.page, first, n_dims, n_ok, width);
            first += n_dims;
            let page = self.page.split().freeze();
            self.write_data(page, n_levels, encoding)?;
        }
        self.end_column(Column::UserEmb)
    }

    /// The levels of a list of `n_dims` values for each row that is OK, and null for the others; null for all if it is 0. Returns how
    /// many levels there are.
    fn list_levels(&mut self, runs: &[StatusRun], n_dims: usize) -> usize {
        let has_list = |run: &StatusRun| n_dims > 0 && run.status == RowStatus::Ok;
        let mut n_levels = 0;
        self.levels(|page| {
            for run in runs {
                if has_list(run) {
                    for _row in 0..run.n_rows {
                        put_run(page, 1, 0, 1);
                        put_run(page, n_dims - 1, 1, 1);
                    }
                    n_levels += run.n_rows * n_dims;
                } else {
                    put_run(page, run.n_rows, 0, 1);
                    n_levels += run.n_rows;
                }
            }
        });
        self.levels(|page| {
            for run in runs {
                if has_list(run) {
                    put_run(page, run.n_rows * n_dims, 2, 2);
                } else {
                    put_run(page, run.n_rows, 0, 2);
                }
            }
        });
        n_levels
    }

    /// Appends levels to the page, after their size.
    fn levels(&mut self, put: impl FnOnce(&mut BytesMut)) {
        let at = self.page.len();
        self.page.put_u32_le(0);
        put(&mut self.page);
        let n_bytes = (self.page.len() - at - size_of::<u32>()) as u32;
        self.page[at..at + size_of::<u32>()].copy_from_slice(&n_bytes.to_le_bytes());
    }

    /// Appends what precedes indexes into a dictionary of `n_entries`, and returns the encoding of the page. Without entries all
    /// values are null; some readers know no empty dictionary.
    fn begin_indexes(&mut self, n_entries: usize) -> Encoding {
        if n_entries == 0 {
            return Encoding::PLAIN;
        }
        self.page.put_u8(index_width(n_entries) as u8);
        Encoding::RLE_DICTIONARY
    }

    /// Writes nothing for a dictionary without entries.
    fn write_dictionary(&mut self, buf: Bytes, n_entries: usize) -> Result<(), ParquetError> {
        if n_entries == 0 {
            return Ok(());
        }
        let (num_values, encoding) = (n_entries as u32, Encoding::PLAIN);
        let offset = self.write(Page::DictionaryPage { buf, num_values, encoding, is_sorted: false })?;
        self.chunk.dictionary_offset = Some(offset);
        Ok(())
    }

    fn write_data(&mut self, buf: Bytes, n_values: usize, encoding: Encoding) -> Result<(), ParquetError> {
        let levels = Encoding::RLE;
        let offset = self.write(Page::DataPage {
            buf,
            num_values: n_values as u32,
            encoding,
            def_level_encoding: levels,
            rep_level_encoding: levels,
            statistics: None,
        })?;
        self.chunk.data_offset.get_or_insert(offset);
        self.chunk.n_values += n_values as i64;
        Ok(())
    }

    /// Writes a page and returns its place in the file.
    fn write(&mut self, page: Page) -> Result<i64, ParquetError> {
        let n_bytes = page.buffer().len();
        let written = SerializedPageWriter::new(&mut self.sink).write_page(CompressedPage::new(page, n_bytes))?;
        self.chunk.n_bytes += written.bytes_written as i64;
        Ok((self.offset + written.offset) as i64)
    }

    fn end_column(&mut self, column: Column) -> Result<(), ParquetError> {
        debug_assert_eq!(column as usize, self.chunks.len(), "the columns are in the order of the schema");
        let Chunk { dictionary_offset, data_offset, n_bytes, n_values } = mem::take(&mut self.chunk);
        let data_encoding = if dictionary_offset.is_some() { Encoding::RLE_DICTIONARY } else { Encoding::PLAIN };
        let chunk = ColumnChunkMetaData::builder(self.schema.column(column as usize))
            .set_encodings(vec![Encoding::PLAIN, Encoding::RLE, data_encoding])
            .set_compression(Compression::UNCOMPRESSED)
            .set_num_values(n_values)
            .set_total_compressed_size(n_bytes)
            .set_total_uncompressed_size(n_bytes)
            .set_data_page_offset(data_offset.unwrap_or_default())
            .set_dictionary_page_offset(dictionary_offset)
            .build()?;
        self.chunks.push(chunk);
        Ok(())
    }
}

/// More than the levels of a request take: up to seven bytes per row, and their sizes.
fn n_level_bytes(n_rows: usize) -> usize {
    7 * n_rows + 32
}

fn put_text(page: &mut BytesMut, text: &str) {
    page.put_u32_le(text.len() as u32);
    page.put_slice(text.as_bytes());
}

/// Appends the rows that are OK, of `n_row_bytes` each.
fn put_ok_rows(page: &mut BytesMut, values: &[u8], n_row_bytes: usize, runs: &[StatusRun]) {
    for run in runs.iter().filter(|run| run.status == RowStatus::Ok) {
        let first = run.first_row * n_row_bytes;
        page.put_slice(values.get(first..first + run.n_rows * n_row_bytes).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests;
