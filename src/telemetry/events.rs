//! One function for each thing that happens: it counts it and, where a person should know, logs it.

use super::names;
use crate::{
    domain::error::{Error, ShedReason},
    domain::{ModelRef, RowStatus},
};
use metrics::{Label, counter, gauge, histogram};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A call was answered; by `model`, where it got as far as that.
pub fn request_finished(method: &'static str, code: &'static str, model: Option<&ModelRef>, duration: Duration) {
    let (name, version, digest) =
        model.map_or(("", "", ""), |model| (model.name.as_str(), model.version.as_str(), model.short_digest()));
    let model = [("model", name.to_owned()), ("version", version.to_owned()), ("digest", digest.to_owned())];
    let labels = [("method", method.to_owned())].into_iter().chain(model);
    let labels: Vec<Label> = labels.map(|(name, value)| Label::new(name, value)).collect();
    histogram!(names::REQUEST_DURATION, labels.clone()).record(duration);
    let labels = labels.into_iter().chain([Label::from_static_parts("code", code)]).collect::<Vec<_>>();
    counter!(names::REQUESTS, labels).increment(1);
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

/// A model passed its checks and its threads run.
pub fn model_loaded(model: &ModelRef, provider: &'static str, load_time: Duration) {
    let ModelRef { name, version, digest } = model;
    tracing::info!(name, version, digest, provider, load_ms = load_time.as_millis() as u64, "model loaded");
}

/// A model is served from now on, or no longer.
pub fn model_served(model: &ModelRef, provider: &'static str, is_served: bool) {
    let ModelRef { name, version, digest } = model.clone();
    gauge!(names::MODEL_INFO, "name" => name, "version" => version, "digest" => digest, "provider" => provider)
        .set(f64::from(u8::from(is_served)));
}

/// A config is in force from now on, or no longer.
pub fn config_applied(digest: &str, is_in_force: bool) {
    gauge!(names::CONFIG_INFO, "digest" => digest.to_owned()).set(f64::from(u8::from(is_in_force)));
}

/// A step of a push ended.
pub fn reload_step_finished(step: &'static str, is_ok: bool, took: Duration) {
    histogram!(names::RELOAD_DURATION, "step" => step).record(took);
    counter!(names::RELOAD_STEPS, "step" => step, "result" => if is_ok { "ok" } else { "failed" }).increment(1);
}

/// A push ended.
pub fn reload_finished(result: &'static str) {
    counter!(names::RELOADS, "result" => result).increment(1);
}

/// A snapshot of the caches was written.
pub fn snapshot_written() {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!(names::SNAPSHOT_TIME).set(since_epoch.as_secs_f64().floor());
    snapshot_finished("written");
}

/// A snapshot of the caches, or a part of one, was written, restored, refused, or failed.
pub fn snapshot_finished(result: &'static str) {
    counter!(names::SNAPSHOTS, "result" => result).increment(1);
}

/// A candidate that a shadow scored, too.
pub fn shadow_row_compared(model: &str, cosine: Option<f64>, cvr_difference: Option<f64>) {
    if let Some(cosine) = cosine {
        histogram!(names::SHADOW_COSINE, "model" => model.to_owned()).record(cosine);
    }
    if let Some(difference) = cvr_difference {
        histogram!(names::SHADOW_CVR_DIFFERENCE, "model" => model.to_owned()).record(difference);
    }
}

/// A request was scored by a shadow, or left out because it had enough to do, or failed there.
pub fn shadow_request_finished(model: &str, result: &'static str) {
    counter!(names::SHADOW_REQUESTS, "model" => model.to_owned(), "result" => result).increment(1);
}

/// What a shadow says of a request that failed there; nobody waited for it.
pub fn shadow_failed(model: &str, error: &Error) {
    tracing::debug!(model, error = %error, "shadow failed");
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
