//! Every configuration key.

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// An IP address and a port.
    Address,
    /// A whole number within these bounds, both included.
    Integer(u64, u64),
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A path; empty where the default applies.
    Path,
    /// A tracing filter.
    Filter,
    /// Any text.
    Text,
}

/// One key.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its dotted name.
    pub name: &'static str,
    /// As it would stand in the file.
    pub default: &'static str,
    /// What it may be.
    pub bound: Bound,
    /// What it does and when an operator would change it.
    pub help: &'static str,
    /// Whether a push may change it, as it may `[[models]]`; what is not live needs a restart.
    pub is_live: bool,
}

const fn key(name: &'static str, default: &'static str, bound: Bound, help: &'static str) -> Key {
    Key { name, default, bound, help, is_live: false }
}

const fn live_key(name: &'static str, default: &'static str, bound: Bound, help: &'static str) -> Key {
    Key { name, default, bound, help, is_live: true }
}

const MB: Bound = Bound::Integer(1, 1 << 20);

/// Every key but the list `[[models]]`.
pub const KEYS: &[Key] = &[
    key(
        "server.listen",
        "127.0.0.1:50051",
        Bound::Address,
        "Where `MidEmbService` listens. Open it to your network; keep TLS and authentication to your mesh.",
    ),
    key(
        "server.drain_seconds",
        "30",
        Bound::Integer(0, 3600),
        "How long accepted requests may take after SIGTERM. Keep it under the orchestrator's grace period.",
    ),
    key(
        "admin.listen",
        "127.0.0.1:50052",
        Bound::Address,
        "Where `AdminService` listens. Anywhere but on loopback it needs `admin.token_file` or `admin.tls_client_ca`.",
    ),
    key(
        "admin.token_file",
        "",
        Bound::Path,
        "A file of bearer tokens, a line each: a name (for the log), a space, the token. Set, every admin call needs one. Read anew at every call: tokens change without a restart.",
    ),
    key(
        "admin.tls_cert",
        "",
        Bound::Path,
        "The admin listener's certificate chain (PEM). Set, it speaks TLS alone; needs `admin.tls_key`.",
    ),
    key("admin.tls_key", "", Bound::Path, "The private key of `admin.tls_cert` (PEM)."),
    key(
        "admin.tls_client_ca",
        "",
        Bound::Path,
        "Who signs operators' client certificates (PEM). Set, every admin call needs one (mTLS).",
    ),
    key(
        "telemetry.metrics_listen",
        "127.0.0.1:9464",
        Bound::Address,
        "Where `/metrics`, `/livez` and `/readyz` listen, over HTTP.",
    ),
    key(
        "telemetry.log_format",
        "auto",
        Bound::OneOf(&["auto", "json", "human"]),
        "`auto` is human on a terminal and JSON elsewhere.",
    ),
    key(
        "telemetry.log_filter",
        "info",
        Bound::Filter,
        "A tracing filter, for example `midemb=debug,info` while looking into a problem.",
    ),
    key(
        "inference.provider",
        "auto",
        Bound::OneOf(&["auto", "cpu", "cuda"]),
        "`auto` takes CUDA where ONNX Runtime has it; `cuda` fails where it does not.",
    ),
    key(
        "inference.threads",
        "0",
        Bound::Integer(0, 1024),
        "Threads that score, and as many that encode; 0 is one a core. Lower it where other processes share the machine.",
    ),
    key(
        "inference.batch_requests",
        "0",
        Bound::Integer(0, 1024),
        "Requests that one run of the towers scores together where they wait anyway; 0 is 1 on a CPU, where nothing is gained, and 32 on a GPU.",
    ),
    key(
        "inference.onnxruntime",
        "",
        Bound::Path,
        "The path of `libonnxruntime.so`; empty takes `ORT_DYLIB_PATH`, else looks beside the executable and where `make setup` puts it.",
    ),
    key(
        "cache.content_mb",
        "1024",
        MB,
        "Memory for content embeddings (about 1.7 KB an item at 384 dimensions). The costliest to lose: raise it first.",
    ),
    key("cache.item_mb", "256", MB, "Memory for item embeddings (about 0.4 KB an item at 64 dimensions)."),
    key(
        "cache.user_mb",
        "16",
        MB,
        "Memory for user embeddings of sessions under way (about 0.6 KB a history at 64 dimensions), so that their next pages skip the user tower.",
    ),
    key("cache.known_items_mb", "256", MB, "Memory for remembered text, so that requests may send ids alone."),
    key(
        "snapshot.folder",
        "",
        Bound::Path,
        "Where the caches are written on drain and every `snapshot.interval_seconds`, and read at a start; empty is nowhere. On a disk that outlives the process.",
    ),
    key(
        "snapshot.interval_seconds",
        "300",
        Bound::Integer(0, 86_400),
        "How much of the caches a crash may lose; 0 writes on drain alone.",
    ),
    key(
        "bundles.folder",
        "",
        Bound::Path,
        "Where bundles that come from an object store are kept; empty is `bundles` beside the config file. On a disk that outlives the process.",
    ),
    live_key(
        "reload.warm_seconds",
        "30",
        Bound::Integer(0, 3600),
        "How long a push may fill a new model's caches, hottest items first, before it serves. A new tower needs seconds; raise it for a new encoder, which does some hundred items a second and core.",
    ),
    live_key(
        "routing.salt",
        "",
        Bound::Text,
        "Who of the users falls into which share: another salt is another draw. Change it from experiment to experiment, never during one.",
    ),
    key("limits.max_candidates", "10000", Bound::Integer(1, 100_000), "Candidates of one request."),
    key(
        "limits.max_history",
        "1000",
        Bound::Integer(1, 100_000),
        "History items of one request. The model reads the newest `max_history` of its own manifest.",
    ),
    key(
        "limits.max_text_bytes",
        "8192",
        Bound::Integer(1, 1 << 20),
        "Bytes of one item's text, all fields together; more makes the row INVALID_ITEM.",
    ),
    key(
        "limits.max_message_mb",
        "16",
        Bound::Integer(1, 1024),
        "Bytes of one request on the wire; more is answered OUT_OF_RANGE before it is read.",
    ),
    key(
        "limits.max_in_flight",
        "256",
        Bound::Integer(1, 100_000),
        "Requests at once over all connections; more are shed with RESOURCE_EXHAUSTED.",
    ),
    key(
        "limits.default_deadline_ms",
        "1000",
        Bound::Integer(1, 3_600_000),
        "The deadline of calls that send no `grpc-timeout`.",
    ),
];

/// The keys of one `[[models]]` entry, with what they do.
pub const MODEL_KEYS: &[(&str, &str)] = &[
    ("models.name", "The name it is served under: in requests, answers and metrics. Unique."),
    (
        "models.bundle",
        "The bundle's folder (a relative one starts from the config file's folder), or the URL of one: `s3://bucket/path`, `gs://`, `az://`, `https://`.",
    ),
    ("models.digest", "The bundle's digest, as `midemb bundle inspect` prints it; any other is refused. Optional."),
    (
        "models.share",
        "Percent of the requests that name no model. All shares add up to 100; a single model has 100; a shadow has none.",
    ),
    (
        "models.shadow_of",
        "The model whose requests this one scores, too, to be compared and never answered: drift before it serves.",
    ),
    ("models.shadow_percent", "Percent of that model's requests that the shadow scores; 100 where it is absent."),
];

/// The key called `name`.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bound::Address => f.write_str("an IP address and a port, for example 127.0.0.1:50051"),
            Bound::Integer(low, high) => write!(f, "a whole number from {low} to {high}"),
            Bound::OneOf(words) => write!(f, "one of {}", words.join(", ")),
            Bound::Path => f.write_str("a path"),
            Bound::Filter => f.write_str("a tracing filter, for example info or midemb=debug,info"),
            Bound::Text => f.write_str("a text"),
        }
    }
}
