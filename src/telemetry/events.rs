//! One function per event. It updates the metrics and, where an operator should know, writes a log line.

use super::{handles, names, recorder, series::Owner};
use crate::{
    domain::error::{Error, ShedReason},
    domain::{ModelRef, RowStatus},
};
use metrics::{Label, counter, gauge, histogram};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A call was answered. `model` is `None` if the call failed before a model was chosen.
pub fn request_finished(method: &'static str, code: &'static str, model: Option<&ModelRef>, duration: Duration) {
    let (name, version, digest) = match model {
        Some(model) => (model.name.as_str(), model.version.as_str(), model.short_digest()),
        None => ("", "", ""),
    };
    let mut labels = vec![
        Label::from_static_parts("method", method),
        Label::new("model", name.to_owned()),
        Label::new("version", version.to_owned()),
        Label::new("digest", digest.to_owned()),
    ];
    histogram!(names::REQUEST_DURATION, labels.clone()).record(duration);
    labels.push(Label::from_static_parts("code", code));
    counter!(names::REQUESTS, labels).increment(1);
}

/// A request failed. Only an internal error is logged as an error: the others are the caller's or the load's doing.
pub fn request_failed(method: &'static str, error: &Error) {
    match error {
        Error::Internal { stage, source } => tracing::error!(method, stage, cause = %source, "request failed"),
        other => tracing::debug!(method, error = %other, "request refused"),
    }
}

/// A stage that began at `start` ended.
pub fn stage_finished(stage: &'static str, start: Instant) {
    handles::record(names::STAGE_DURATION, ("stage", stage), start.elapsed().as_secs_f64());
}

/// The results of a request's look-ups in one cache. They add up to the number of look-ups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lookups {
    /// The vector was cached.
    pub n_hits: u64,
    /// It was not, and this request started computing it.
    pub n_misses: u64,
    /// It was not, but another request was already computing it.
    pub n_coalesced: u64,
}

/// A request looked vectors up.
pub fn cache_looked_up(cache: &'static str, lookups: Lookups) {
    let Lookups { n_hits, n_misses, n_coalesced } = lookups;
    for (result, n) in [("hit", n_hits), ("miss", n_misses), ("coalesced", n_coalesced)] {
        if n > 0 {
            handles::increment(names::CACHE_LOOKUPS, [("cache", cache), ("result", result)], n);
        }
    }
}

/// A cache evicted entries to make room.
pub fn cache_evicted(cache: &'static str, n_entries: u64) {
    counter!(names::CACHE_EVICTIONS, "cache" => cache).increment(n_entries);
}

/// A cache was measured, which happens before every scrape.
pub fn cache_measured(cache: &'static str, n_entries: u64, n_bytes: u64) {
    gauge!(names::CACHE_ENTRIES, "cache" => cache).set(n_entries as f64);
    gauge!(names::CACHE_BYTES, "cache" => cache).set(n_bytes as f64);
}

/// A response with these candidate rows is about to be sent.
pub fn rows_answered(statuses: &[RowStatus]) {
    let mut n_rows = [0; RowStatus::ALL.len()];
    for status in statuses {
        n_rows[*status as usize] += 1;
    }
    for (status, n) in RowStatus::ALL.into_iter().zip(n_rows) {
        if n > 0 {
            counter!(names::ROWS, "status" => status.as_str()).increment(n);
        }
    }
}

/// A graph ran over `n_items` items.
pub fn batch_ran(stage: &'static str, n_items: usize) {
    handles::record(names::BATCH_ITEMS, ("stage", stage), n_items as f64);
}

/// The encoder ran over `n_tokens` tokens, padding included.
pub fn encoder_batch_ran(n_items: usize, n_tokens: usize) {
    batch_ran("encode", n_items);
    histogram!(names::BATCH_TOKENS).record(n_tokens as f64);
}

/// One job's stay in a queue. Dropping it ends the stay, however the job left the queue, so the depth cannot leak.
#[derive(Debug)]
pub struct QueueStay {
    queue: &'static str,
    joined: Instant,
    refused: bool,
}

impl QueueStay {
    /// A job joins `queue`.
    pub fn begin(queue: &'static str) -> Self {
        handles::add(names::QUEUE_DEPTH, ("queue", queue), 1.0);
        QueueStay { queue, joined: Instant::now(), refused: false }
    }

    /// Ends the stay of a job that the queue refused. Its wait is not recorded: it would make waits look short.
    pub fn refuse(mut self) {
        self.refused = true;
    }
}

impl Drop for QueueStay {
    fn drop(&mut self) {
        handles::add(names::QUEUE_DEPTH, ("queue", self.queue), -1.0);
        if self.refused {
            return;
        }
        handles::record(names::QUEUE_WAIT, ("queue", self.queue), self.joined.elapsed().as_secs_f64());
    }
}

/// `n` requests were refused; rows, if the reason is the encoder's queue or the number of requests that wait for it.
pub fn shed(reason: ShedReason, n: u64) {
    counter!(names::SHED, "reason" => reason.as_str()).increment(n);
}

/// Counts one request as in flight until it is dropped.
#[derive(Debug)]
pub struct InFlight(());

impl InFlight {
    /// Counts one more request.
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

/// Counts one request as waiting for the encoder until it is dropped.
#[derive(Debug)]
pub struct Encoding(());

impl Encoding {
    /// Counts one more request.
    pub fn start() -> Self {
        gauge!(names::ENCODING_REQUESTS).increment(1.0);
        Encoding(())
    }
}

impl Drop for Encoding {
    fn drop(&mut self) {
        gauge!(names::ENCODING_REQUESTS).decrement(1.0);
    }
}

/// Counts one connection as open until it is dropped.
#[derive(Debug)]
pub struct OpenConnection(&'static str);

impl OpenConnection {
    /// `listener` has one more.
    pub fn start(listener: &'static str) -> Self {
        gauge!(names::CONNECTIONS, "listener" => listener).increment(1.0);
        OpenConnection(listener)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        gauge!(names::CONNECTIONS, "listener" => self.0).decrement(1.0);
    }
}

/// A listener begins. Makes its counters visible, so that a query sees their first increase.
pub fn listener_started(listener: &'static str) {
    counter!(names::CONNECTIONS_REFUSED, "listener" => listener, "reason" => "too_many").increment(0);
    gauge!(names::CONNECTIONS, "listener" => listener).increment(0.0);
    counter!(names::ANSWERS_DROPPED).increment(0);
}

/// A connection was closed before its first request, or could not be accepted.
pub fn connection_refused(listener: &'static str, reason: &'static str) {
    counter!(names::CONNECTIONS_REFUSED, "listener" => listener, "reason" => reason).increment(1);
}

/// A budget was measured, which happens before every scrape: what is held of it, and by how many calls.
pub fn budget_measured(budget: &'static str, n_bytes: u64, n_calls: u64) {
    gauge!(names::BUDGET_BYTES, "budget" => budget).set(n_bytes as f64);
    gauge!(names::BUDGET_CALLS, "budget" => budget).set(n_calls as f64);
}

/// An answer was dropped because its caller did not read it in time.
pub fn answer_dropped() {
    counter!(names::ANSWERS_DROPPED).increment(1);
}

/// A request was handed to the trace's writer.
pub fn trace_recorded() {
    counter!(names::TRACE_REQUESTS, "result" => "recorded").increment(1);
}

/// A request was left out of the trace because the writer is behind.
pub fn trace_left_out() {
    counter!(names::TRACE_REQUESTS, "result" => "left_out").increment(1);
}

/// What became of a sampled request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServedFeaturesResult {
    /// It is in a finished file.
    Written,
    /// Too much was waiting for the writer.
    QueueFull,
    /// The folder holds as much as it may.
    DiskBudget,
    /// It could not be written.
    Failed,
}

impl ServedFeaturesResult {
    const ALL: [Self; 4] = [Self::Written, Self::QueueFull, Self::DiskBudget, Self::Failed];

    fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::QueueFull => "queue_full",
            Self::DiskBudget => "disk_budget",
            Self::Failed => "failed",
        }
    }
}

/// Served features are on. Makes their counters visible, so that a query sees their first increase.
pub fn served_features_started() {
    for result in ServedFeaturesResult::ALL {
        served_features_sampled(result, 0, 0);
    }
    for result in ["written", "uploaded", "upload_failed"] {
        counter!(names::SERVED_FEATURES_FILES, "result" => result).increment(0);
    }
}

/// Sampled requests with these many rows were written or lost.
pub fn served_features_sampled(result: ServedFeaturesResult, n_requests: u64, n_rows: u64) {
    counter!(names::SERVED_FEATURES_REQUESTS, "result" => result.as_str()).increment(n_requests);
    counter!(names::SERVED_FEATURES_ROWS, "result" => result.as_str()).increment(n_rows);
}

/// A file of served features was `written` or `uploaded`, or an upload of it failed (`upload_failed`).
pub fn served_features_file(result: &'static str) {
    counter!(names::SERVED_FEATURES_FILES, "result" => result).increment(1);
}

/// The folder of the served features holds as many bytes.
pub fn served_features_measured(n_bytes: u64) {
    gauge!(names::SERVED_FEATURES_DISK).set(n_bytes as f64);
}

/// A model passed its checks, and its threads run.
pub fn model_loaded(model: &ModelRef, provider: &'static str, load_time: Duration) {
    let ModelRef { name, version, digest } = model;
    tracing::info!(name, version, digest, provider, load_ms = load_time.as_millis() as u64, "model loaded");
}

/// A config and its models, as the metrics name them.
#[derive(Debug)]
pub struct ConfigLabels<'a> {
    /// The digest of the config.
    pub digest: &'a str,
    /// The models, and the provider that runs each.
    pub models: Vec<(&'a ModelRef, &'static str)>,
}

/// `in_force` is in force from now on, in place of `former`. The series of all other configs and models are forgotten.
pub fn config_applied(in_force: &ConfigLabels<'_>, former: Option<&ConfigLabels<'_>>) {
    // What is in both is set last by the config in force.
    for (config, value) in former.map(|former| (former, 0.0)).into_iter().chain([(in_force, 1.0)]) {
        gauge!(names::CONFIG_INFO, "digest" => config.digest.to_owned()).set(value);
        for (model, provider) in &config.models {
            set_model_info(model, provider, value);
        }
    }
    let kept = former.into_iter().chain([in_force]);
    recorder::forget_all_but(&kept.flat_map(owners).collect());
}

/// The owners of the series that have labels of this config or its models.
fn owners(config: &ConfigLabels<'_>) -> Vec<Owner> {
    let mut owners = vec![Owner::new([config.digest])];
    for (model, _) in &config.models {
        let ModelRef { name, digest, .. } = model;
        owners.extend([
            Owner::new([name, digest].map(String::as_str)),
            Owner::new([name, model.short_digest()]),
            Owner::new([name.as_str()]),
        ]);
    }
    owners.into_iter().flatten().collect()
}

fn set_model_info(model: &ModelRef, provider: &'static str, value: f64) {
    let ModelRef { name, version, digest } = model.clone();
    gauge!(names::MODEL_INFO, "name" => name, "version" => version, "digest" => digest, "provider" => provider)
        .set(value);
}

/// A step of a push ended. `result` is `ok` or `failed`.
pub fn reload_step_finished(step: &'static str, result: &'static str, took: Duration) {
    histogram!(names::RELOAD_DURATION, "step" => step).record(took);
    counter!(names::RELOAD_STEPS, "step" => step, "result" => result).increment(1);
}

/// A push ended. `result` is `applied`, `unchanged`, `checked`, `refused` or `rolled_back`.
pub fn reload_finished(result: &'static str) {
    counter!(names::RELOADS, "result" => result).increment(1);
}

/// A snapshot of the caches was written.
pub fn snapshot_written() {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!(names::SNAPSHOT_TIME).set(since_epoch.as_secs_f64().floor());
    snapshot_finished("written");
}

/// A snapshot of the caches, or a part of one, was `written`, `restored`, `refused` or `skipped`, or it `failed`.
pub fn snapshot_finished(result: &'static str) {
    counter!(names::SNAPSHOTS, "result" => result).increment(1);
}

/// A shadow scored a candidate that was also answered. A value is `None` if that output was not asked for.
pub fn shadow_row_compared(model: &str, cosine: Option<f64>, cvr_difference: Option<f64>) {
    if let Some(cosine) = cosine {
        histogram!(names::SHADOW_COSINE, "model" => model.to_owned()).record(cosine);
    }
    if let Some(difference) = cvr_difference {
        histogram!(names::SHADOW_CVR_DIFFERENCE, "model" => model.to_owned()).record(difference);
    }
}

/// A shadow finished a request: `compared`, `left_out` because it was busy, or `failed`.
pub fn shadow_request_finished(model: &str, result: &'static str) {
    counter!(names::SHADOW_REQUESTS, "model" => model.to_owned(), "result" => result).increment(1);
}

/// A shadow failed on a request. The caller is not affected.
pub fn shadow_failed(model: &str, error: &Error) {
    tracing::debug!(model, error = %error, "shadow failed");
}

/// Encoding failed for these items. None of them is cached.
pub fn encode_failed(n_items: usize, error: &dyn std::fmt::Display) {
    tracing::error!(n_items, cause = %error, "encoding failed");
}

/// The item tower failed for a whole batch. All its items fail, and none of them is cached.
pub fn item_tower_failed(n_items: usize, error: &dyn std::fmt::Display) {
    tracing::error!(n_items, cause = %error, "item tower failed");
}

/// A graph returned a vector with infinite or NaN values for one item.
pub fn vector_not_finite(stage: &'static str) {
    tracing::error!(stage, "vector is not finite, not cached");
}

/// A log line could not be written: there was `no_room` for it in the queue, or it was `not_written` because writing failed.
pub fn log_line_lost(reason: &'static str) {
    counter!(names::LOG_LINES_LOST, "reason" => reason).increment(1);
}

/// A job panicked. Only that job, or its batch, fails.
pub fn job_panicked(pool: &str, message: &str) {
    tracing::error!(pool, panic = message, "job panicked");
}
