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
    /// The caller's id of the request, or one that was made here.
    pub request_id: RequestId,
    /// Empty for a visitor without an id.
    pub(super) user_id: String,
    /// Unix time in microseconds at which the request was decoded.
    pub(super) at_us: i64,
    item_ids: ItemIds,
}

/// The id that joins an answer with what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RequestId {
    /// The caller sent it.
    Sent(String),
    /// The caller sent none, and must be told.
    Made(String),
}

impl RequestId {
    #[expect(missing_docs, reason = "name and type say it all")]
    pub fn as_str(&self) -> &str {
        let (RequestId::Sent(id) | RequestId::Made(id)) = self;
        id
    }
}

impl SampledRequest {
    pub(super) fn new(request: &MidEmbRequest<'_>, request_id: RequestId) -> Self {
        SampledRequest {
            request_id,
            user_id: request.user_id.to_owned(),
            at_us: unix_micros(SystemTime::now()),
            item_ids: ItemIds::new(&request.candidates),
        }
    }

    /// The candidates' ids in order.
    pub(super) fn item_ids(&self) -> impl Iterator<Item = Bytes> {
        let ItemIds { bytes, ends } = &self.item_ids;
        let starts = std::iter::once(&0).chain(ends);
        starts.zip(ends).map(|(start, end)| bytes.slice(*start..*end))
    }
}

/// Microseconds since 1970.
pub(super) fn unix_micros(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as i64
}

/// The candidates' ids in one allocation, because there are hundreds.
#[derive(Debug)]
struct ItemIds {
    bytes: Bytes,
    /// Where each id ends.
    ends: Vec<usize>,
}

impl ItemIds {
    fn new(items: &[Item<'_>]) -> Self {
        let mut bytes = Vec::with_capacity(items.iter().map(|item| item.id.len()).sum());
        let mut ends = Vec::with_capacity(items.len());
        for item in items {
            bytes.extend_from_slice(item.id.as_bytes());
            ends.push(bytes.len());
        }
        ItemIds { bytes: bytes.into(), ends }
    }

    fn n_bytes(&self) -> usize {
        self.bytes.len() + self.ends.len() * size_of::<usize>()
    }
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

impl Sample {
    pub(super) fn n_rows(&self) -> usize {
        self.answer.statuses.len()
    }

    /// What it occupies in memory, as far as its size depends on the request.
    pub(super) fn n_bytes(&self) -> usize {
        let SampledRequest { request_id, user_id, item_ids, .. } = &self.request;
        let SampledAnswer { statuses, mid_emb, cvr, user_emb, item_emb, .. } = &self.answer;
        let vectors: usize = [mid_emb, cvr, user_emb, item_emb].into_iter().flatten().map(Bytes::len).sum();
        let texts = request_id.as_str().len() + user_id.len() + item_ids.n_bytes();
        size_of::<Self>() + vectors + texts + statuses.len() * size_of::<RowStatus>()
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
