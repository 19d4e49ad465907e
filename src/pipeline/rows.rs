//! Rows: what one list of items of a page becomes, a status and a vector per item.

use super::Resolved;
use crate::domain::{KnownItem, Matrix, RowStatus};
use std::ops::Range;

/// One row per item of a list: a part of its record, or the status that says why there is none.
pub(super) struct Rows {
    /// One per item, in order.
    pub(super) statuses: Vec<RowStatus>,
    /// A row that is not OK is all zeros. Complete after [`Rows::complete`].
    pub(super) values: Matrix,
    /// The part of a record that a row holds.
    part: Range<usize>,
}

impl Rows {
    pub(super) fn new(items: &Resolved, part: Range<usize>) -> Self {
        let status = |item: &Result<KnownItem, RowStatus>| item.as_ref().err().copied().unwrap_or(RowStatus::Failed);
        let values = Matrix { n_cols: part.len(), data: Vec::with_capacity(items.len() * part.len()) };
        Rows { statuses: items.iter().map(status).collect(), values, part }
    }

    /// Rows whose values nobody will read.
    pub(super) fn without_values(items: &Resolved) -> Self {
        let status = |item: &Result<KnownItem, RowStatus>| item.as_ref().err().copied().unwrap_or(RowStatus::Ok);
        Rows { statuses: items.iter().map(status).collect(), values: Matrix::zeros(0, 0), part: 0..0 }
    }

    pub(super) fn set(&mut self, row: usize, record: &[f32]) {
        let values = &record[self.part.clone()];
        let start = row * self.values.n_cols;
        // Most rows are set in their order, and then none is filled with zeros first.
        if start >= self.values.data.len() {
            self.values.data.resize(start, 0.0);
            self.values.data.extend_from_slice(values);
        } else {
            self.values.row_mut(row).copy_from_slice(values);
        }
        self.statuses[row] = RowStatus::Ok;
    }

    /// Fills the rows that were not set with zeros.
    pub(super) fn complete(&mut self) {
        self.values.data.resize(self.statuses.len() * self.values.n_cols, 0.0);
    }

    /// The rows that are OK, back to back.
    pub(super) fn ready(&self) -> Vec<f32> {
        let ready = self.statuses.iter().enumerate().filter(|(_row, status)| **status == RowStatus::Ok);
        ready.flat_map(|(row, _status)| self.values.row(row)).copied().collect()
    }

    /// The same, without a copy if all rows are OK. The values are gone afterwards.
    pub(super) fn take_ready(&mut self) -> Vec<f32> {
        let all_ready = self.statuses.iter().all(|status| *status == RowStatus::Ok);
        if all_ready { std::mem::take(&mut self.values.data) } else { self.ready() }
    }
}
