//! The plain types of a request: what the wire decodes into and the pipeline works on.
//!
//! Nothing here depends on protobuf, ONNX or a cache. Invariant: a [`MidEmbRequest`] was validated by `wire::decode`, so its
//! ids are not empty and its sizes are within the configured limits.

pub mod action;
pub mod bounded_text;
pub mod digest;
pub mod error;
pub mod ids;
pub mod item_text;
pub mod tolerance;

pub use action::{Action, ActionCodes};
pub use digest::Digest;
pub use ids::{
    ContentKey, EmbeddingKey, EncoderDigest, IdKey, ItemKey, KnownItem, Priority, TextDigest, TowerDigest, UserKey,
};
pub use item_text::{ItemText, TextFault, TextFields};
pub use tolerance::Tolerance;

use std::{fmt, sync::Arc, time::Instant};

/// One embedding or record, shared by the caches and the requests that read it.
pub type Vector = Arc<[f32]>;

/// The widths of the two parts of an item record, which is everything that a request reads of an item: its item embedding, then
/// what the user tower reads of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordDims {
    /// `E`, the width of an item embedding.
    pub item: usize,
    /// `D`, the width of an adapted content embedding, the user tower's input.
    pub adapted: usize,
}

impl RecordDims {
    /// The number of values in a record.
    pub fn width(self) -> usize {
        self.item + self.adapted
    }
}

/// One history item or candidate: an id and, if the caller sent it, the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<'a> {
    /// The caller's stable id, never empty.
    pub id: &'a str,
    /// The text, or why it cannot be used; `None` if the caller expects the server to know the id.
    pub text: Option<Result<ItemText, TextFault>>,
}

/// Which outputs the caller asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outputs {
    /// `[n, mid_dim]`
    pub mid_emb: bool,
    /// `[n]`
    pub cvr: bool,
    /// `[user_dim]`
    pub user_emb: bool,
    /// `[n, item_dim]`
    pub item_emb: bool,
}

impl Outputs {
    /// Whether any output needs the CVR graph.
    pub fn needs_fusion(self) -> bool {
        self.mid_emb || self.cvr
    }
}

/// The element type of the response's tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DType {
    /// IEEE 754 single precision.
    #[default]
    F32,
    /// IEEE 754 half precision.
    F16,
    /// Brain floating point.
    Bf16,
}

/// The outcome of one row. An item that fails costs its row, not the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowStatus {
    /// The row holds its vector.
    Ok,
    /// No text was sent, and the id is not known.
    UnknownItem,
    /// Still being encoded at the deadline.
    NotInTime,
    /// The text cannot be used.
    InvalidItem,
    /// The server failed on this item.
    Failed,
    /// A history item older than the model's window.
    NotUsed,
    /// The encoder had no room for it. The wire has no status of its own for it and says FAILED.
    Shed,
}

impl RowStatus {
    /// Every status, in the order of the enum.
    pub const ALL: [RowStatus; 7] = [
        RowStatus::Ok,
        RowStatus::UnknownItem,
        RowStatus::NotInTime,
        RowStatus::InvalidItem,
        RowStatus::Failed,
        RowStatus::NotUsed,
        RowStatus::Shed,
    ];

    /// The name that metrics and tables use.
    pub fn as_str(self) -> &'static str {
        match self {
            RowStatus::Ok => "ok",
            RowStatus::UnknownItem => "unknown_item",
            RowStatus::NotInTime => "not_in_time",
            RowStatus::InvalidItem => "invalid_item",
            RowStatus::Failed => "failed",
            RowStatus::NotUsed => "not_used",
            RowStatus::Shed => "shed",
        }
    }
}

impl fmt::Display for RowStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One validated `GetMidEmb` request. It borrows from its message.
#[derive(Debug, Clone)]
pub struct MidEmbRequest<'a> {
    /// Decides which model answers if `model` is `None`. Empty for a visitor without an id.
    pub user_id: &'a str,
    /// Oldest first.
    pub history: Vec<Item<'a>>,
    /// What the user did with each history item; empty if the caller did not say.
    pub history_actions: Vec<Action>,
    /// At least one.
    pub candidates: Vec<Item<'a>>,
    /// The model's name; `None` lets the router choose by user.
    pub model: Option<&'a str>,
    /// What to return.
    pub outputs: Outputs,
    /// When the response must be ready to send.
    pub deadline: Instant,
}

/// A dense row-major matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// The length of a row.
    pub n_cols: usize,
    /// `n_rows * n_cols` values.
    pub data: Vec<f32>,
}

impl Matrix {
    /// A matrix of zeros. Rows whose status is not OK keep them.
    pub fn zeros(n_rows: usize, n_cols: usize) -> Self {
        Matrix { n_cols, data: vec![0.0; n_rows * n_cols] }
    }

    /// The number of rows; 0 if rows have no columns.
    pub fn n_rows(&self) -> usize {
        self.data.len().checked_div(self.n_cols).unwrap_or(0)
    }

    /// Row `i`, a slice of `n_cols` values.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.n_cols..(i + 1) * self.n_cols]
    }

    /// Row `i` as a mutable slice.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.n_cols..(i + 1) * self.n_cols]
    }
}

/// Whether no value is infinite or NaN.
///
/// Always reads the whole slice: without an early exit the compiler vectorises the loop, which is three times as fast on a
/// whole response (`benches/micro/hot_path.rs`).
pub fn all_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    values.iter().fold(true, |finite, x| finite & (x.to_bits() & EXPONENT != EXPONENT))
}

/// The cosine of two vectors of the same length; NaN if one of them is all zeros.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(p, q)| f64::from(*p) * f64::from(*q)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Identifies the model that produced a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRef {
    /// The name it is served under.
    pub name: String,
    /// The bundle's version.
    pub version: String,
    /// The SHA-256 of the bundle's manifest, in hex.
    pub digest: String,
}

impl ModelRef {
    /// The first 12 digits, for people to compare.
    pub fn short_digest(&self) -> &str {
        self.digest.get(..12).unwrap_or(&self.digest)
    }
}

/// One response. An output that was not asked for is `None`.
#[derive(Debug, Clone)]
pub struct MidEmbResponse {
    /// The model that computed all of it.
    pub model: Arc<ModelRef>,
    /// One per candidate, in order.
    pub statuses: Vec<RowStatus>,
    /// One per history item that was sent, in order.
    pub history_statuses: Vec<RowStatus>,
    /// How many history items the user tower read.
    pub n_history_used: usize,
    /// `[n, mid_dim]`
    pub mid_emb: Option<Matrix>,
    /// `[n]`
    pub cvr: Option<Vec<f32>>,
    /// `[user_dim]`
    pub user_emb: Option<Vec<f32>>,
    /// `[n, item_dim]`
    pub item_emb: Option<Matrix>,
}

/// The result of a stream of items to warm. The four outcomes add up to `n_items`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WarmSummary {
    /// Items received.
    pub n_items: u64,
    /// Encoded for at least one served model.
    pub n_encoded: u64,
    /// Already cached for every served model.
    pub n_cached: u64,
    /// Without an id, without text, or with text that cannot be used.
    pub n_invalid: u64,
    /// Failed in the server.
    pub n_failed: u64,
}

impl std::ops::AddAssign for WarmSummary {
    fn add_assign(&mut self, other: Self) {
        self.n_items += other.n_items;
        self.n_encoded += other.n_encoded;
        self.n_cached += other.n_cached;
        self.n_invalid += other.n_invalid;
        self.n_failed += other.n_failed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_value_that_is_not_finite_is_found_at_any_position() {
        let mut values = vec![f32::MAX; 1000];
        values[..4].copy_from_slice(&[f32::MIN, 0.0, -0.0, f32::MIN_POSITIVE / 2.0]);
        assert!(all_finite(&values) && all_finite(&[]));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for i in [0, 3, 511, 999] {
                let good = std::mem::replace(&mut values[i], bad);
                assert!(!all_finite(&values), "{bad} at {i}");
                values[i] = good;
            }
        }
    }
}
