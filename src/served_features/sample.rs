//! One sampled request and its answer.

use crate::domain::{Item, MidEmbRequest, ModelRef, RowStatus};
use bytes::Bytes;
use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// What a row says of its request, copied from a message that is about to be dropped.
#[derive(Debug)]
pub struct SampledRequest {
    /// The caller's id of the request, or one that was made here. It joins an answer with what became of it.
    pub request_id: String,
    /// Empty for a visitor without an id.
    pub(super) user_id: String,
    /// Unix time in microseconds at which the request was decoded.
    pub(super) at_us: i64,
    /// The candidates' ids as Parquet's PLAIN encoding has them: length, then bytes.
    pub(super) item_ids: Vec<u8>,
}

impl SampledRequest {
    pub(super) fn new(request: &MidEmbRequest<'_>, request_id: String) -> Self {
        SampledRequest {
            request_id,
            user_id: request.user_id.to_owned(),
            at_us: unix_micros(SystemTime::now()),
            item_ids: plain_ids(&request.candidates),
        }
    }
}

/// Microseconds since 1970.
pub(super) fn unix_micros(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64
}

fn plain_ids(items: &[Item<'_>]) -> Vec<u8> {
    let n_bytes = items.iter().map(|item| size_of::<u32>() + item.id.len()).sum();
    let mut plain = Vec::with_capacity(n_bytes);
    for item in items {
        plain.extend_from_slice(&(item.id.len() as u32).to_le_bytes());
        plain.extend_from_slice(item.id.as_bytes());
    }
    plain
}

/// The part of an answer that is written. Vectors are single-precision numbers in little-endian bytes, row-major, and shared with
/// the answer where that is sent in single precision. An output that was not asked for is `None`.
#[derive(Debug, Clone)]
pub struct SampledAnswer {
    /// The model that computed all of it.
    pub model: Arc<ModelRef>,
    /// One per candidate, in order.
    pub statuses: Vec<RowStatus>,
    /// How many history items the user tower read.
    pub n_history_used: usize,
    /// `[n, mid_dim]`
    pub mid_emb: Option<Bytes>,
    /// `[n]`
    pub cvr: Option<Bytes>,
    /// `[user_dim]`
    pub user_emb: Option<Bytes>,
    /// `[n, item_dim]`
    pub item_emb: Option<Bytes>,
}

/// A sample that waits to be written.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) request: SampledRequest,
    pub(super) answer: SampledAnswer,
}

/// Neighbouring rows with the same status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StatusRun {
    pub(super) status: RowStatus,
    pub(super) first_row: usize,
    pub(super) n_rows: usize,
}

impl Sample {
    pub(super) fn n_rows(&self) -> usize {
        self.answer.statuses.len()
    }

    /// At least what it occupies in memory and, but for a few bytes per row, in a file.
    pub(super) fn n_bytes(&self) -> usize {
        let SampledRequest { request_id, user_id, item_ids, .. } = &self.request;
        let SampledAnswer { statuses, mid_emb, cvr, user_emb, item_emb, .. } = &self.answer;
        let vectors: usize = [mid_emb, cvr, user_emb, item_emb].into_iter().flatten().map(Bytes::len).sum();
        // Each of its values takes up to four bytes in every row of the file.
        let user_rows = user_emb.as_ref().map_or(0, Bytes::len) * statuses.len();
        let texts = request_id.len() + user_id.len() + item_ids.len();
        size_of::<Self>() + vectors + user_rows + texts + statuses.len() * size_of::<RowStatus>()
    }

    /// The statuses of all rows, in order.
    pub(super) fn status_runs(&self) -> Vec<StatusRun> {
        let mut runs: Vec<StatusRun> = Vec::new();
        for (row, status) in self.answer.statuses.iter().enumerate() {
            match runs.last_mut() {
                Some(run) if run.status == *status => run.n_rows += 1,
                _ => runs.push(StatusRun { status: *status, first_row: row, n_rows: 1 }),
            }
        }
        runs
    }
}

/// The name of a status in the files, which is its name in the contract without the prefix.
pub fn status_name(status: RowStatus) -> &'static str {
    match status {
        RowStatus::Ok => "OK",
        RowStatus::UnknownItem => "UNKNOWN_ITEM",
        RowStatus::NotInTime => "NOT_IN_TIME",
        RowStatus::InvalidItem => "INVALID_ITEM",
        // The contract has no status of its own for a row that was shed.
        RowStatus::Failed | RowStatus::Shed => "FAILED",
        RowStatus::NotUsed => "NOT_USED",
    }
}
