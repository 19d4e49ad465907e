//! Every metric of the server: name, kind, labels, unit and what it tells.
//!
//! The recorder describes them from this table, the histograms take their buckets from it, and a test holds the README's
//! table to it. Names are `midemb_<noun>_<unit>[_total]`; label values come from closed sets.

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Explicit buckets, upper bounds in the metric's unit.
    Histogram(&'static [f64]),
}

impl Kind {
    /// As the README's table calls it.
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
pub struct Metric {
    /// As Prometheus sees it.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Its label names, comma-separated.
    pub labels: &'static str,
    /// What it tells.
    pub help: &'static str,
}

/// 250 microseconds to 30 seconds: a hot request is at the left end, a cold one of a big page at the right.
const SECONDS: &[f64] = &[
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0,
];
const ITEMS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const TOKENS: &[f64] = &[16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0];

/// A millisecond, as a swap takes, to the quarter of an hour of a new encoder.
const LONG_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];
const COSINES: &[f64] = &[-0.5, 0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 0.99999, 1.0];
const DIFFERENCES: &[f64] = &[0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

macro_rules! metrics {
    ($($(#[doc = $doc:literal])* $ident:ident = $name:literal, $kind:expr, $labels:literal;)*) => {
        $($(#[doc = $doc])* pub const $ident: &str = $name;)*
        /// Every metric that is the server's own (`process_*` comes on top).
        pub const METRICS: &[Metric] =
            &[$(Metric { name: $name, kind: $kind, labels: $labels, help: concat!($($doc),*).trim_ascii() }),*];
    };
}

metrics! {
    /// Calls answered, by gRPC code.
    REQUESTS = "midemb_requests_total", Kind::Counter, "method,code,model,version,digest";
    /// From a call's headers to its answer, in seconds: reading and decoding the message included.
    REQUEST_DURATION = "midemb_request_duration_seconds", Kind::Histogram(SECONDS), "method,model,version,digest";
    /// Time in one stage of a request (resolve, history, content, item_tower, user_tower, cvr) or of a batch (tokenize, encode), in seconds.
    STAGE_DURATION = "midemb_stage_duration_seconds", Kind::Histogram(SECONDS), "stage";
    /// Cache look-ups; hit, miss and coalesced (another call was encoding it already) add up to all of them.
    CACHE_LOOKUPS = "midemb_cache_lookups_total", Kind::Counter, "cache,result";
    /// Entries in a cache.
    CACHE_ENTRIES = "midemb_cache_entries", Kind::Gauge, "cache";
    /// Bytes in a cache, as its bound counts them: payload, key and bookkeeping.
    CACHE_BYTES = "midemb_cache_bytes", Kind::Gauge, "cache";
    /// Entries that a cache dropped for want of room.
    CACHE_EVICTIONS = "midemb_cache_evictions_total", Kind::Counter, "cache";
    /// Candidate rows answered, by their status.
    ROWS = "midemb_rows_total", Kind::Counter, "status";
    /// Items in one run of a graph; for the user tower, users.
    BATCH_ITEMS = "midemb_batch_items", Kind::Histogram(ITEMS), "stage";
    /// Tokens in one run of the encoder, padding included.
    BATCH_TOKENS = "midemb_batch_tokens", Kind::Histogram(TOKENS), "";
    /// Jobs that wait in a queue.
    QUEUE_DEPTH = "midemb_queue_depth", Kind::Gauge, "queue";
    /// How long a job waited in a queue, in seconds.
    QUEUE_WAIT = "midemb_queue_wait_seconds", Kind::Histogram(SECONDS), "queue";
    /// Requests or rows turned away because a bound was reached.
    SHED = "midemb_shed_total", Kind::Counter, "reason";
    /// GetMidEmb requests under way.
    IN_FLIGHT = "midemb_in_flight_requests", Kind::Gauge, "";
    /// Requests handed to the writer of a trace (`midemb serve --record-trace`), or left out because it was behind.
    TRACE_REQUESTS = "midemb_trace_requests_total", Kind::Counter, "result";
    /// 1 for every model that answers or shadows, 0 for one that no longer does.
    MODEL_INFO = "midemb_model_info", Kind::Gauge, "name,version,digest,provider";
    /// 1 for the config in force, 0 for one that was.
    CONFIG_INFO = "midemb_config_info", Kind::Gauge, "digest";
    /// Pushes by how they ended: applied, unchanged, checked (a dry run), refused, rolled_back.
    RELOADS = "midemb_reloads_total", Kind::Counter, "result";
    /// How long a step of a push took, in seconds; the start of the server is one, too.
    RELOAD_DURATION = "midemb_reload_duration_seconds", Kind::Histogram(LONG_SECONDS), "step";
    /// Steps of pushes by how they ended: ok, failed.
    RELOAD_STEPS = "midemb_reload_steps_total", Kind::Counter, "step,result";
    /// Requests that a shadow scored (compared), left out because it had enough to do, or failed on.
    SHADOW_REQUESTS = "midemb_shadow_requests_total", Kind::Counter, "model,result";
    /// Cosine between a shadow's mid-emb and the one that was answered, a candidate.
    SHADOW_COSINE = "midemb_shadow_cosine", Kind::Histogram(COSINES), "model";
    /// How far a shadow's cvr is from the one that was answered, a candidate.
    SHADOW_CVR_DIFFERENCE = "midemb_shadow_cvr_difference", Kind::Histogram(DIFFERENCES), "model";
    /// Snapshots of the caches by what became of them: written, restored, refused (a part of one), failed.
    SNAPSHOTS = "midemb_snapshots_total", Kind::Counter, "result";
    /// When a snapshot was written last, as Unix time in seconds.
    SNAPSHOT_TIME = "midemb_snapshot_timestamp_seconds", Kind::Gauge, "";
}
