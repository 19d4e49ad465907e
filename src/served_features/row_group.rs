//! From samples to one row group, the part of a file that is encoded and written at once.
//!
//! The library's column writers do the encoding. They get the columns in the order of the schema, and of each column the rows of one
//! sample after the other.

use super::sample::{Sample, status_name};
use crate::domain::RowStatus;
use bytes::Bytes;
use parquet::{
    column::writer::ColumnWriterImpl,
    data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int32Type, Int64Type},
    errors::ParquetError,
    file::writer::{SerializedFileWriter, SerializedRowGroupWriter},
};
use std::io::Write;

/// Encodes `samples` as the next row group of `file`.
pub(super) fn append<W: Write + Send>(
    samples: &[Sample],
    file: &mut SerializedFileWriter<W>,
) -> Result<(), ParquetError> {
    let mut encoder = Encoder { samples, row_group: file.next_row_group()? };
    encoder.texts(|s| s.request.request_id.as_str())?;
    encoder.user_ids()?;
    encoder.column::<Int64Type>(|s, out| put(out, &vec![s.request.at_us; s.n_rows()]))?;
    encoder.texts(|s| s.answer.model.name.as_str())?;
    encoder.texts(|s| s.answer.model.version.as_str())?;
    encoder.texts(|s| s.answer.model.digest.as_str())?;
    encoder.column::<Int32Type>(|s, out| put(out, &(0..s.n_rows() as i32).collect::<Vec<_>>()))?;
    encoder
        .column::<ByteArrayType>(|s, out| put(out, &s.request.item_ids().map(ByteArray::from).collect::<Vec<_>>()))?;
    encoder.column::<ByteArrayType>(|s, out| {
        put(out, &s.answer.statuses.iter().map(|status| ByteArray::from(status_name(*status))).collect::<Vec<_>>())
    })?;
    encoder.vectors(|s| s.answer.mid_emb.as_ref())?;
    encoder.cvr()?;
    encoder.user_vectors()?;
    encoder.vectors(|s| s.answer.item_emb.as_ref())?;
    encoder.column::<Int32Type>(|s, out| put(out, &vec![s.answer.n_history_used as i32; s.n_rows()]))?;
    encoder.row_group.close().map(drop)
}

/// A row group whose columns are written one after the other.
struct Encoder<'a, W: Write> {
    samples: &'a [Sample],
    row_group: SerializedRowGroupWriter<'a, W>,
}

impl<'a, W: Write + Send> Encoder<'a, W> {
    /// The next column. `put` writes the rows of a sample.
    fn column<T: DataType>(
        &mut self,
        put: impl Fn(&'a Sample, &mut ColumnWriterImpl<'_, T>) -> Result<(), ParquetError>,
    ) -> Result<(), ParquetError> {
        let next = self.row_group.next_column()?;
        let mut column = next.ok_or_else(|| ParquetError::General("more columns than the schema has".to_owned()))?;
        for sample in self.samples {
            put(sample, column.typed::<T>())?;
        }
        column.close()
    }

    /// A text that all rows of a request share.
    fn texts(&mut self, text: impl Fn(&'a Sample) -> &'a str) -> Result<(), ParquetError> {
        self.column::<ByteArrayType>(|sample, out| put(out, &vec![ByteArray::from(text(sample)); sample.n_rows()]))
    }

    fn user_ids(&mut self) -> Result<(), ParquetError> {
        self.column::<ByteArrayType>(|sample, out| {
            let (user_id, n_rows) = (sample.request.user_id.as_str(), sample.n_rows());
            let n_known = if user_id.is_empty() { 0 } else { n_rows };
            let levels = vec![i16::from(n_known > 0); n_rows];
            put_nullable(out, &vec![ByteArray::from(user_id); n_known], &levels)
        })
    }

    fn cvr(&mut self) -> Result<(), ParquetError> {
        self.column::<FloatType>(|sample, out| {
            let cvr = sample.answer.cvr.as_ref();
            let levels: Vec<_> =
                sample.answer.statuses.iter().map(|status| i16::from(cvr.is_some() && is_ok(status))).collect();
            put_nullable(out, &ok_rows(sample, cvr), &levels)
        })
    }

    /// A vector for each row that is OK.
    fn vectors(&mut self, vectors: impl Fn(&'a Sample) -> Option<&'a Bytes>) -> Result<(), ParquetError> {
        self.column::<FloatType>(|sample, out| {
            let vectors = vectors(sample);
            let n_dims = n_floats(vectors) / sample.n_rows().max(1);
            put_lists(out, sample, n_dims, &ok_rows(sample, vectors))
        })
    }

    /// The user's embedding in every row that is OK.
    fn user_vectors(&mut self) -> Result<(), ParquetError> {
        self.column::<FloatType>(|sample, out| {
            let user_emb: Vec<f32> = sample.answer.user_emb.as_deref().map(floats).unwrap_or_default();
            let n_ok = sample.answer.statuses.iter().filter(|status| is_ok(status)).count();
            put_lists(out, sample, user_emb.len(), &user_emb.repeat(n_ok))
        })
    }
}

fn put<T: DataType>(out: &mut ColumnWriterImpl<'_, T>, values: &[T::T]) -> Result<(), ParquetError> {
    out.write_batch(values, None, None).map(drop)
}

/// `levels` has a 1 for each row that has a value.
fn put_nullable<T: DataType>(
    out: &mut ColumnWriterImpl<'_, T>,
    values: &[T::T],
    levels: &[i16],
) -> Result<(), ParquetError> {
    out.write_batch(values, Some(levels), None).map(drop)
}

/// A list of `n_dims` for each row that is OK, and null for the others; null for all if `n_dims` is 0.
fn put_lists(
    out: &mut ColumnWriterImpl<'_, FloatType>,
    sample: &Sample,
    n_dims: usize,
    values: &[f32],
) -> Result<(), ParquetError> {
    // What is in a list has definition level 2, a list that is null has 0. The first of a row has repetition level 0.
    let n_levels = values.len() + sample.n_rows();
    let (mut definition, mut repetition) = (Vec::with_capacity(n_levels), Vec::with_capacity(n_levels));
    for status in &sample.answer.statuses {
        let has_list = n_dims > 0 && is_ok(status);
        let n_row_levels = if has_list { n_dims } else { 1 };
        repetition.push(0);
        repetition.resize(repetition.len() + n_row_levels - 1, 1);
        definition.resize(definition.len() + n_row_levels, if has_list { 2 } else { 0 });
    }
    out.write_batch(values, Some(&definition), Some(&repetition)).map(drop)
}

fn is_ok(status: &RowStatus) -> bool {
    *status == RowStatus::Ok
}

fn n_floats(bytes: Option<&Bytes>) -> usize {
    bytes.map_or(0, |bytes| bytes.len() / size_of::<f32>())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()
}

/// The numbers of the rows that are OK, of `values`, which has as many for each row.
fn ok_rows(sample: &Sample, values: Option<&Bytes>) -> Vec<f32> {
    let Some(values) = values else { return Vec::new() };
    let statuses = &sample.answer.statuses;
    if statuses.iter().all(is_ok) {
        return floats(values);
    }
    let n_row_bytes = (values.len() / statuses.len().max(1)).max(1);
    let rows = values.chunks_exact(n_row_bytes).zip(statuses);
    rows.filter(|(_, status)| is_ok(status)).flat_map(|(row, _)| floats(row)).collect()
}

#[cfg(test)]
mod tests;
