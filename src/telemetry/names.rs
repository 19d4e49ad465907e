//! Every metric of the server: name, kind, labels and help text.
//!
//! The recorder describes the metrics from this table and takes the histograms' buckets from it; a test compares the documented
//! table with it. Names are `midemb_<noun>_<unit>[_total]`. Label values come from closed sets, or name a
//! model or a config (`series` bounds those).

/// The type of a metric.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Has these buckets: upper bounds in the metric's unit.
    Histogram(&'static [f64]),
}

impl Kind {
    /// The name that the documentation uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "the names say it all")]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    /// The label names, separated by commas.
    pub labels: &'static str,
    pub help: &'static str,
}

/// From 250 microseconds, a hot request, to 30 seconds, a cold request with a large page.
const SECONDS: &[f64] = &[
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];
const ITEMS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const TOKENS: &[f64] = &[16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0];

/// From a millisecond, a swap, to 15 minutes, the replay of a new encoder.
const LONG_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];
const COSINES: &[f64] = &[-0.5, 0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 0.99999, 1.0];
const DIFFERENCES: &[f64] = &[0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

macro_rules! metrics {
    ($($(#[doc = $doc:literal])* $ident:ident = $name:literal, $kind:expr, $labels:literal;)*) => {
        $($(#[doc = $doc])* pub const $ident: &str = $name;)*
        /// Every metric that the server defines itself; the `process_*` metrics are added to these.
        pub const METRICS: &[Metric] =
            &[$(Metric { name: $name, kind: $kind, labels: $labels, help: concat!($($doc),*).trim_ascii() }),*];
    };
}

metrics! {
    /// Calls answered, by gRPC code.
    REQUESTS = "midemb_requests_total", Kind::Counter, "method,code,model,version,digest";
    /// Time from a call's headers to its response, in seconds, including reading and decoding the message.
    REQUEST_DURATION = "midemb_request_duration_seconds", Kind::Histogram(SECONDS), "method,model,version,digest";
    /// Time in one stage of a request (resolve, items, content, item_tower, user_tower, cvr) or of a batch (tokenize, encode), in seconds.
    STAGE_DURATION = "midemb_stage_duration_seconds", Kind::Histogram(SECONDS), "stage";
    /// Cache look-ups by result: hit, miss, or coalesced (another call was already encoding the item). The results add up to all look-ups.
    CACHE_LOOKUPS = "midemb_cache_lookups_total", Kind::Counter, "cache,result";
    /// Entries in a cache.
    CACHE_ENTRIES = "midemb_cache_entries", Kind::Gauge, "cache";
    /// Bytes in a cache as its limit counts them: payload, key and bookkeeping.
    CACHE_BYTES = "midemb_cache_bytes", Kind::Gauge, "cache";
    /// Entries that a cache evicted to make room.
    CACHE_EVICTIONS = "midemb_cache_evictions_total", Kind::Counter, "cache";
    /// Candidate rows answered, by status.
    ROWS = "midemb_rows_total", Kind::Counter, "status";
    /// Items in one run of a graph. For the user tower: users.
    BATCH_ITEMS = "midemb_batch_items", Kind::Histogram(ITEMS), "stage";
    /// Tokens in one run of the encoder, including padding.
    BATCH_TOKENS = "midemb_batch_tokens", Kind::Histogram(TOKENS), "";
    /// Jobs waiting in a queue.
    QUEUE_DEPTH = "midemb_queue_depth", Kind::Gauge, "queue";
    /// Time that a job waited in a queue, in seconds.
    QUEUE_WAIT = "midemb_queue_wait_seconds", Kind::Histogram(SECONDS), "queue";
    /// Requests or rows refused because a limit was reached.
    SHED = "midemb_shed_total", Kind::Counter, "reason";
    /// GetMidEmb requests being worked on. Those whose message is still arriving and those that wait for the encoder are not among them.
    IN_FLIGHT = "midemb_in_flight_requests", Kind::Gauge, "";
    /// GetMidEmb requests that wait for the encoder, or did until they were scored.
    ENCODING_REQUESTS = "midemb_encoding_requests", Kind::Gauge, "";
    /// Bytes that calls hold of a budget: receiving (messages that are arriving; receiving_admin on that listener), decoded (requests that
    /// are being answered), unsent (answers that callers have not read).
    BUDGET_BYTES = "midemb_budget_bytes", Kind::Gauge, "budget";
    /// Calls that hold bytes of a budget.
    BUDGET_CALLS = "midemb_budget_calls", Kind::Gauge, "budget";
    /// Answers dropped because their callers did not read them within `limits.write_ms`.
    ANSWERS_DROPPED = "midemb_answers_dropped_total", Kind::Counter, "";
    /// Open connections of a listener (main, admin, metrics).
    CONNECTIONS = "midemb_connections", Kind::Gauge, "listener";
    /// Connections closed before their first request, by reason: too_many (`server.max_connections`), silent, left, not_http2, tls; and accept_failed, attempts to accept one.
    CONNECTIONS_REFUSED = "midemb_connections_refused_total", Kind::Counter, "listener,reason";
    /// Requests handed to the writer of the trace (`midemb serve --record-trace`), or left out because the writer was behind.
    TRACE_REQUESTS = "midemb_trace_requests_total", Kind::Counter, "result";
    /// Log lines that were lost: no_room, because standard error is not read, or not_written, because it is closed or its disk full.
    LOG_LINES_LOST = "midemb_log_lines_lost_total", Kind::Counter, "reason";
    /// 1 for every model that answers or shadows requests, 0 for one of the config before that no longer does.
    MODEL_INFO = "midemb_model_info", Kind::Gauge, "name,version,digest,provider";
    /// 1 for the config in force, 0 for the one before.
    CONFIG_INFO = "midemb_config_info", Kind::Gauge, "digest";
    /// Pushes by result: applied, unchanged, checked (a dry run), refused, rolled_back.
    RELOADS = "midemb_reloads_total", Kind::Counter, "result";
    /// Time that a step of a push took, in seconds. The start of the server counts as a push.
    RELOAD_DURATION = "midemb_reload_duration_seconds", Kind::Histogram(LONG_SECONDS), "step";
    /// Steps of pushes by result: ok, failed.
    RELOAD_STEPS = "midemb_reload_steps_total", Kind::Counter, "step,result";
    /// Requests by what a shadow did with them: compared, left_out because it was busy, failed.
    SHADOW_REQUESTS = "midemb_shadow_requests_total", Kind::Counter, "model,result";
    /// Cosine between a shadow's mid-emb and the one answered, per candidate.
    SHADOW_COSINE = "midemb_shadow_cosine", Kind::Histogram(COSINES), "model";
    /// Absolute difference between a shadow's cvr and the one answered, per candidate.
    SHADOW_CVR_DIFFERENCE = "midemb_shadow_cvr_difference", Kind::Histogram(DIFFERENCES), "model";
    /// Snapshots of the caches by result: written, restored, failed, refused (a part of a snapshot), or skipped because another process writes into the folder.
    SNAPSHOTS = "midemb_snapshots_total", Kind::Counter, "result";
    /// Unix time in seconds at which the last snapshot was written.
    SNAPSHOT_TIME = "midemb_snapshot_timestamp_seconds", Kind::Gauge, "";
    /// Requests that were sampled for served features, by what became of them: written (in a finished file), queue_full (the writer was behind), disk_budget (the folder holds `served_features.max_disk_mb`), failed (the disk refused them).
    SERVED_FEATURES_REQUESTS = "midemb_served_features_requests_total", Kind::Counter, "result";
    /// The candidate rows of those requests, by the same results.
    SERVED_FEATURES_ROWS = "midemb_served_features_rows_total", Kind::Counter, "result";
    /// Files of served features: written, uploaded, upload_failed (an attempt, which is repeated).
    SERVED_FEATURES_FILES = "midemb_served_features_files_total", Kind::Counter, "result";
    /// Bytes of all files of served features in the folder, when the server last wrote or removed one.
    SERVED_FEATURES_DISK = "midemb_served_features_disk_bytes", Kind::Gauge, "";
}
