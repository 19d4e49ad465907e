//! Rows: what one list of items of a page becomes, a status and a vector per item.

use super::Resolved;
use crate::domain::{Matrix, RowStatus};
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
        let values = Matrix { n_cols: part.len(), data: Vec::with_capacity(items.len() * part.len()) };
        Rows { statuses: statuses(items, RowStatus::Failed), values, part }
    }

    /// Rows whose values nobody will read.
    pub(super) fn without_values(items: &Resolved) -> Self {
        Rows { statuses: statuses(items, RowStatus::Ok), values: Matrix::zeros(0, 0), part: 0..0 }
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
        let mut ready = Vec::with_capacity(self.values.data.len());
        for (row, status) in self.statuses.iter().enumerate() {
            if *status == RowStatus::Ok {
                ready.extend_from_slice(self.values.row(row));
            }
        }
        ready
    }

    /// The same, without a copy if all rows are OK. The values are gone afterwards.
    pub(super) fn take_ready(&mut self) -> Vec<f32> {
        let all_ready = self.statuses.iter().all(|status| *status == RowStatus::Ok);
        if all_ready { std::mem::take(&mut self.values.data) } else { self.ready() }
    }
}

/// The status of each item, which is `of_known` where the item is known.
fn statuses(items: &Resolved, of_known: RowStatus) -> Vec<RowStatus> {
    items.iter().map(|item| item.as_ref().err().copied().unwrap_or(of_known)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{IdKey, ItemText, KnownItem, TextDigest};

    fn items(statuses: [Option<RowStatus>; 4]) -> Resolved {
        let digest = TextDigest::of(&ItemText::titled("a"));
        let known = || KnownItem { id: IdKey::from_bytes([0; 16]), digest, text: None };
        statuses.into_iter().map(|status| status.map_or_else(|| Ok(known()), Err)).collect()
    }

    #[test]
    fn rows_hold_their_part_of_a_record_in_any_order_and_zeros_elsewhere() {
        let mut rows = Rows::new(&items([Some(RowStatus::UnknownItem), None, None, None]), 1..3);
        rows.set(1, &[0.0, 1.0, 2.0, 9.0]);
        rows.complete();
        // A record that was missing comes later, and the last item has none.
        rows.set(2, &[0.0, 3.0, 4.0, 9.0]);
        assert_eq!(rows.values.data, [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0]);
        assert_eq!(rows.statuses, [RowStatus::UnknownItem, RowStatus::Ok, RowStatus::Ok, RowStatus::Failed]);
        assert_eq!((rows.ready(), rows.take_ready()), (vec![1.0, 2.0, 3.0, 4.0], vec![1.0, 2.0, 3.0, 4.0]));
    }

    #[test]
    fn complete_rows_are_moved_out() {
        let mut rows = Rows::new(&items([None; 4]), 0..1);
        (0..4).for_each(|row| rows.set(row, &[row as f32]));
        rows.complete();
        assert_eq!((rows.ready(), rows.take_ready()), (vec![0.0, 1.0, 2.0, 3.0], vec![0.0, 1.0, 2.0, 3.0]));
        assert!(rows.values.data.is_empty(), "the values were copied");
    }
}
