//! One function for each thing that happens: it counts it and, where a person should know, logs it.

use super::names;
use crate::{
    domain::{ModelRef, RowStatus},
    error::{Error, ShedReason},
};
use metrics::{counter, gauge, histogram};
use std::time::{Duration, Instant};

/// A call was answered. `model` is empty where the call never got as far as a model.
pub fn request_finished(method: &'static str, code: &'static str, model: &str, duration: Duration) {
    counter!(names::REQUESTS, "method" => method, "code" => code, "model" => model.to_owned()).increment(1);
    histogram!(names::REQUEST_DURATION, "method" => method, "model" => model.to_owned()).record(duration);
}

/// A request failed. Only a fault of ours is worth a line that wakes somebody up.
pub fn request_failed(method: &'static str, error: &Error) {
    match error {
        Error::Internal { stage, source } => tracing::error!(method, stage, cause = %source, "request failed"),
        other => tracing::debug!(method, error = %other, "request refused"),
    }
}

/// A stage ended that began at `start`.
pub fn stage_finished(stage: &'static str, start: Instant) {
    histogram!(names::STAGE_DURATION, "stage" => stage).record(start.elapsed());
}

/// How look-ups of one cache ended. Their sum is the number of look-ups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lookups {
    /// The vector was there.
    pub n_hits: u64,
    /// It was not, and the caller started the work.
    pub n_misses: u64,
    /// It was not, but somebody else was at it already.
    pub n_coalesced: u64,
}

/// A request looked vectors up.
pub fn cache_looked_up(cache: &'static str, lookups: Lookups) {
    let Lookups { n_hits, n_misses, n_coalesced } = lookups;
    for (result, n) in [("hit", n_hits), ("miss", n_misses), ("coalesced", n_coalesced)] {
        if n > 0 {
            counter!(names::CACHE_LOOKUPS, "cache" => cache, "result" => result).increment(n);
        }
    }
}

/// A cache dropped entries for want of room.
pub fn cache_evicted(cache: &'static str, n_entries: u64) {
    counter!(names::CACHE_EVICTIONS, "cache" => cache).increment(n_entries);
}

/// What a cache holds now; read before every scrape.
pub fn cache_measured(cache: &'static str, n_entries: u64, n_bytes: u64) {
    gauge!(names::CACHE_ENTRIES, "cache" => cache).set(n_entries as f64);
    gauge!(names::CACHE_BYTES, "cache" => cache).set(n_bytes as f64);
}

/// Candidate rows are on their way to the caller.
pub fn rows_answered(statuses: &[RowStatus]) {
    for status in RowStatus::ALL {
        let n = statuses.iter().filter(|s| **s == status).count();
        if n > 0 {
            counter!(names::ROWS, "status" => status.as_str()).increment(n as u64);
        }
    }
}

/// A graph ran over `n_items` items.
pub fn batch_ran(stage: &'static str, n_items: usize) {
    histogram!(names::BATCH_ITEMS, "stage" => stage).record(n_items as f64);
}

/// The encoder ran over `n_tokens` tokens, padding included.
pub fn encoder_batch_ran(n_items: usize, n_tokens: usize) {
    batch_ran("encode", n_items);
    histogram!(names::BATCH_TOKENS).record(n_tokens as f64);
}

/// One job's stay in a queue. It ends when this is dropped, by whatever way the job left: the depth cannot leak.
#[derive(Debug)]
pub struct QueueStay {
    queue: &'static str,
    joined: Instant,
    refused: bool,
}

impl QueueStay {
    /// A job joins `queue`.
    pub fn begin(queue: &'static str) -> Self {
        gauge!(names::QUEUE_DEPTH, "queue" => queue).increment(1.0);
        QueueStay { queue, joined: Instant::now(), refused: false }
    }

    /// The queue was full after all: a job that never waited must not make waits look short.
    pub fn refuse(mut self) {
        self.refused = true;
    }
}

impl Drop for QueueStay {
    fn drop(&mut self) {
        gauge!(names::QUEUE_DEPTH, "queue" => self.queue).decrement(1.0);
        if self.refused {
            return;
        }
        histogram!(names::QUEUE_WAIT, "queue" => self.queue).record(self.joined.elapsed());
    }
}

/// `n` requests (or rows, where the reason is the encoder's queue) were turned away.
pub fn shed(reason: ShedReason, n: u64) {
    counter!(names::SHED, "reason" => reason.as_str()).increment(n);
}

/// Counts a request as in flight for as long as it lives.
#[derive(Debug)]
pub struct InFlight(());

impl InFlight {
    /// One more.
    pub fn start() -> Self {
        gauge!(names::IN_FLIGHT).increment(1.0);
        InFlight(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!(names::IN_FLIGHT).decrement(1.0);
    }
}

/// A request was handed to the trace's writer, or was left out because the writer is behind.
pub fn trace_recorded(is_written: bool) {
    let result = if is_written { "recorded" } else { "left_out" };
    counter!(names::TRACE_REQUESTS, "result" => result).increment(1);
}

/// A model passed its checks and is served.
pub fn model_served(model: &ModelRef, provider: &'static str, load_time: Duration) {
    let ModelRef { name, version, digest } = model.clone();
    tracing::info!(name, version, digest, provider, load_ms = load_time.as_millis() as u64, "model loaded");
    gauge!(names::MODEL_INFO, "name" => name, "version" => version, "digest" => digest, "provider" => provider)
        .set(1.0);
}

/// The config in force, by its digest.
pub fn config_applied(digest: &str) {
    gauge!(names::CONFIG_INFO, "digest" => digest.to_owned()).set(1.0);
}

/// Encoding failed for these items; none of them is cached.
pub fn encode_failed(n_items: usize, error: &dyn std::fmt::Display) {
    tracing::error!(n_items, cause = %error, "encoding failed");
}

/// The item tower failed for a whole batch; every item of it fails, none is cached.
pub fn item_tower_failed(n_items: usize, error: &dyn std::fmt::Display) {
    tracing::error!(n_items, cause = %error, "item tower failed");
}

/// A graph gave values that are not finite for one item.
pub fn vector_not_finite(stage: &'static str) {
    tracing::error!(stage, "vector is not finite, not cached");
}

/// A job panicked. Only that job fails.
pub fn job_panicked(pool: &str, message: &str) {
    tracing::error!(pool, message, "job panicked");
}
