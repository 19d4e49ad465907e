//! Every configuration key, once.
//!
//! A new key is one entry here and one line in [`Settings`](super::Settings) that reads it. Everything else follows from
//! the entry: the documentation's table, `midemb config print`, the hints for unknown keys, and the check that a pushed
//! config changes no key that needs a restart.

use super::key::{
    Bound, Description, Key, address, choice, count, filter, flag, line, megabytes, milliseconds, path, percent,
    sample_rate, seconds, sha256, text,
};
use crate::{
    inference::ProviderChoice,
    served_features::{Rate, SampleBy},
    telemetry::logs::LogFormat,
};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Declares each key as a static, and lists the descriptions of all of them, in their order, under `$list`.
macro_rules! keys {
    ($(#[$doc:meta])* $list:ident: $($key:ident: $type:ty = $value:expr;)*) => {
        $(pub(super) static $key: $type = $value;)*

        $(#[$doc])*
        pub static $list: &[&Description] = &[$(&$key.description),*];
    };
}

keys! {
    /// Every key outside `[[models]]`, table by table.
    KEYS:

    SERVER_LISTEN: Key<SocketAddr> = address(
        "server.listen",
        "127.0.0.1:50051",
        "The address that `MidEmbService` listens on. Open it to your network, and leave TLS and authentication to your service mesh.",
    );
    SERVER_DRAIN_SECONDS: Key<Duration> = seconds(
        "server.drain_seconds",
        "30",
        0..=3600,
        "How long accepted requests may take to finish after SIGTERM. Keep it at least 10 seconds below the orchestrator's grace period: the caches may be written for 5 more.",
    );

    SERVER_MAX_CONNECTIONS: Key<usize> = count(
        "server.max_connections",
        "4096",
        1..=1_000_000,
        "The most open connections of the gRPC listeners together. Further ones are closed at once. The process raises its own limit of open files as far as it may.",
    ).later();
    SERVER_MAX_STREAMS: Key<usize> = count(
        "server.max_streams",
        "2048",
        1..=100_000,
        "The most calls that one connection may have open. A client holds further ones back until others have ended, hot ones as well, so keep it above `limits.max_in_flight` and `limits.max_encoding` together: then the server says at once what it cannot take.",
    ).later();

    ADMIN_LISTEN: Key<SocketAddr> = address(
        "admin.listen",
        "127.0.0.1:50052",
        "The address that `AdminService` listens on. Any address but a loopback one needs `admin.tls_client_ca`, or `admin.token_file` with `admin.tls_cert`.",
    );
    ADMIN_TOKEN_FILE: Key<Option<PathBuf>> = path(
        "admin.token_file",
        "A file of bearer tokens, one per line: a name (for the log), a space, the token. If set, every admin call must carry one of them. The file is read at every call, so tokens change without a restart.",
    );
    ADMIN_ALLOW_PLAINTEXT_TOKENS: Key<bool> = flag(
        "admin.allow_plaintext_tokens",
        "false",
        "Whether tokens may be used without `admin.tls_cert` on an address that is not loopback. Set it to `true` only if something else encrypts the traffic, for example a service mesh: whoever reads a token can operate the server.",
    ).later();
    ADMIN_TLS_CERT: Key<Option<PathBuf>> = path(
        "admin.tls_cert",
        "The certificate chain of the admin listener (PEM). If set, the listener accepts only TLS; needs `admin.tls_key`.",
    );
    ADMIN_TLS_KEY: Key<Option<PathBuf>> = path(
        "admin.tls_key",
        "The private key of `admin.tls_cert` (PEM).",
    );
    ADMIN_TLS_CLIENT_CA: Key<Option<PathBuf>> = path(
        "admin.tls_client_ca",
        "The authority that signs operators' client certificates (PEM). If set, every admin call must present such a certificate (mTLS); needs `admin.tls_cert`.",
    );

    TELEMETRY_METRICS_LISTEN: Key<SocketAddr> = address(
        "telemetry.metrics_listen",
        "127.0.0.1:9464",
        "The address that serves `/metrics`, `/livez` and `/readyz` over HTTP.",
    );
    TELEMETRY_LOG_FORMAT: Key<LogFormat> = choice(
        "telemetry.log_format",
        "auto",
        &["auto", "json", "human"],
        log_format,
        "The format of log lines. `auto` is `human` if standard error is a terminal, and `json` otherwise.",
    );
    TELEMETRY_LOG_FILTER: Key<String> = filter(
        "telemetry.log_filter",
        "info",
        "Which log lines are written, as a tracing filter. Set it to `midemb=debug,info`, for example, while you look into a problem. A field's value in it is compared as text; it is no regular expression.",
    );

    INFERENCE_PROVIDER: Key<ProviderChoice> = choice(
        "inference.provider",
        "auto",
        &["auto", "cpu", "cuda"],
        provider,
        "What runs the models. `auto` uses CUDA if ONNX Runtime and the machine have it, and the CPU otherwise; with `cuda`, the server does not start without it.",
    );
    INFERENCE_THREADS: Key<usize> = count(
        "inference.threads",
        "0",
        0..=1024,
        "The number of threads that score; as many again encode. 0 means one of each per core. Lower it if other processes share the machine.",
    );
    INFERENCE_BATCH_REQUESTS: Key<usize> = count(
        "inference.batch_requests",
        "0",
        0..=1024,
        "How many waiting requests one run of the towers may score together. 0 means 1 on a CPU, where batching gains nothing, and 32 on a GPU.",
    );
    INFERENCE_ONNXRUNTIME: Key<Option<PathBuf>> = path(
        "inference.onnxruntime",
        "The path of `libonnxruntime.so`. If empty, the path in `ORT_DYLIB_PATH` is used; if that is not set either, the server looks beside its executable and where `make setup` puts the library.",
    );

    CACHE_CONTENT_MB: Key<u64> = megabytes(
        "cache.content_mb",
        "1024",
        1..=1 << 20,
        "Memory for content embeddings (about 1.7 KB per item at 384 dimensions). They are read for items without a record, and for all items after a push of new towers: what is still cached then needs no run of the language model.",
    );
    CACHE_ITEM_MB: Key<u64> = megabytes(
        "cache.item_mb",
        "512",
        1..=1 << 20,
        "Memory for item records (about 0.7 KB per item at 64 + 64 dimensions). A request reads nothing else of an item that has one, so raise this first.",
    );
    CACHE_USER_MB: Key<u64> = megabytes(
        "cache.user_mb",
        "16",
        1..=1 << 20,
        "Memory for the user embeddings of sessions in progress (about 0.6 KB per history at 64 dimensions), so that the next pages of a session skip the user tower.",
    );
    CACHE_KNOWN_ITEMS_MB: Key<u64> = megabytes(
        "cache.known_items_mb",
        "256",
        1..=1 << 20,
        "Memory for the texts of items sent before, so that requests may send their ids alone.",
    );

    SNAPSHOT_FOLDER: Key<Option<PathBuf>> = path(
        "snapshot.folder",
        "The folder that the caches are written to, on drain and every `snapshot.interval_seconds`, and read from at start-up. If empty, they are not saved. Choose a disk that outlives the process, and a folder for each replica: only one process writes into a folder.",
    );
    SNAPSHOT_INTERVAL_SECONDS: Key<Duration> = seconds(
        "snapshot.interval_seconds",
        "300",
        0..=86_400,
        "The time between two snapshots: a crash loses what the caches gained since the last one. 0 means that a snapshot is written on drain only.",
    );

    SERVED_FEATURES_FOLDER: Key<Option<PathBuf>> = path(
        "served_features.folder",
        "The folder that a sample of the answers is written to, as Parquet files to train a ranking model on. If empty, nothing is sampled. The files say which user was shown what, so choose a disk for such data.",
    ).later();
    SERVED_FEATURES_UPLOAD_TO: Key<String> = text(
        "served_features.upload_to",
        "",
        "The URL that finished files are uploaded to, after which they are removed here: `s3://bucket/path`, `gs://`, `az://` or `https://`, with the credentials of bundles. If empty, files stay in the folder, and removing them is up to their reader.",
    ).later();
    SERVED_FEATURES_PERCENT: Key<Rate> = sample_rate(
        "served_features.percent",
        "1",
        "The percentage of requests, or of users, that are sampled, such as 0.5; 0 stops sampling. At 100 a hot request costs about a tenth more CPU time.",
    ).live().later();
    SERVED_FEATURES_SAMPLE_BY: Key<SampleBy> = choice(
        "served_features.sample_by",
        "request",
        &["request", "user"],
        sample_by,
        "What is sampled: single requests, or users with all of their requests, always the same ones. Users are drawn independently of the models that they are routed to. A visitor without an id is sampled by request.",
    ).later();
    SERVED_FEATURES_ROTATE_MB: Key<u64> = megabytes(
        "served_features.rotate_mb",
        "64",
        1..=4096,
        "The size at which a file is finished and the next one begun. Lower it if readers should see samples sooner under heavy traffic, or if files are uploaded to a plain http server, which gets each file in one piece, from memory, within 10 minutes.",
    ).later();
    SERVED_FEATURES_ROTATE_SECONDS: Key<Duration> = seconds(
        "served_features.rotate_seconds",
        "300",
        1..=86_400,
        "How long a sample waits at most until the file that holds it is finished. A crash loses what is not in a finished file.",
    ).later();
    SERVED_FEATURES_MAX_DISK_MB: Key<u64> = megabytes(
        "served_features.max_disk_mb",
        "1024",
        1..=1 << 20,
        "What the files in the folder may take together. When they do, samples are dropped and counted until there is room again.",
    ).later();
    SERVED_FEATURES_QUEUE_MB: Key<u64> = megabytes(
        "served_features.queue_mb",
        "32",
        1..=1024,
        "Memory for samples that wait for the disk. When it is full, samples are dropped and counted, and so is each sample that is larger by itself. Raise it if the disk stalls now and then, or if you sample pages of many candidates with wide vectors.",
    ).later();

    BUNDLES_FOLDER: Key<Option<PathBuf>> = path(
        "bundles.folder",
        "The folder for bundles that were fetched from an object store. If empty, it is `bundles` beside the config file. Choose a disk that outlives the process.",
    );

    RELOAD_WARM_SECONDS: Key<Duration> = seconds(
        "reload.warm_seconds",
        "30",
        0..=3600,
        "How long a push may fill a new model's caches, hottest items first, before the model serves. A new tower needs seconds; raise it for a new encoder, which encodes about a hundred items per second and core.",
    ).live();

    ROUTING_SALT: Key<String> = text(
        "routing.salt",
        "",
        "Decides which users fall into which model's share: with another salt, the shares are drawn anew. Change it between experiments, never during one.",
    ).live();

    LIMITS_MAX_CANDIDATES: Key<usize> = count(
        "limits.max_candidates",
        "10000",
        1..=100_000,
        "The most candidates that one request may have.",
    );
    LIMITS_MAX_HISTORY: Key<usize> = count(
        "limits.max_history",
        "1000",
        1..=100_000,
        "The most history items that one request may have. The model reads only the newest of them, up to the `max_history` of its own manifest.",
    );
    LIMITS_MAX_TEXT_BYTES: Key<usize> = count(
        "limits.max_text_bytes",
        "8192",
        1..=1 << 20,
        "The most bytes that the text of one item may have, all fields together. The row of a longer one is answered INVALID_ITEM.",
    );
    LIMITS_MAX_MESSAGE_MB: Key<u64> = megabytes(
        "limits.max_message_mb",
        "16",
        1..=1024,
        "The most megabytes that one request may have on the wire. A larger one is answered OUT_OF_RANGE before it is read.",
    );
    LIMITS_MAX_IN_FLIGHT: Key<usize> = count(
        "limits.max_in_flight",
        "256",
        1..=100_000,
        "The most requests in progress at once, over all connections. Further ones are shed with RESOURCE_EXHAUSTED.",
    );
    LIMITS_MAX_ENCODING: Key<usize> = count(
        "limits.max_encoding",
        "1024",
        1..=100_000,
        "The most requests that wait for the encoder at once. They do not count as in flight, so cold requests do not crowd out hot ones. Of a further one, only the rows that need no encoder are answered.",
    ).later();
    LIMITS_READ_MS: Key<Duration> = milliseconds(
        "limits.read_ms",
        "5000",
        1..=3_600_000,
        "How long the message of a call may take to arrive, whatever the call's deadline. Lower it to give up sooner on callers that stall.",
    ).later();
    LIMITS_WRITE_MS: Key<Duration> = milliseconds(
        "limits.write_ms",
        "5000",
        1..=3_600_000,
        "How long a caller may take to read its answer, which stays in memory until then. After that it is dropped, and the call is reset.",
    ).later();
    LIMITS_MAX_RECEIVING_MB: Key<u64> = megabytes(
        "limits.max_receiving_mb",
        "256",
        1..=1 << 20,
        "Memory for messages that are arriving, over all connections; one connection gets at most a quarter. At least `limits.max_message_mb`.",
    ).later();
    LIMITS_MAX_DECODED_MB: Key<u64> = megabytes(
        "limits.max_decoded_mb",
        "512",
        1..=1 << 20,
        "Memory for requests that are being answered, texts and ids, over all connections; one connection gets at most a quarter. Never less than two of the largest messages.",
    ).later();
    LIMITS_MAX_UNSENT_MB: Key<u64> = megabytes(
        "limits.max_unsent_mb",
        "256",
        1..=1 << 20,
        "Memory for answers that their callers have not read yet, over all connections; one connection gets at most a quarter, or 64 MB if that is more.",
    ).later();
    LIMITS_MAX_WARM_UP_MB: Key<u64> = megabytes(
        "limits.max_warm_up_mb",
        "256",
        1..=1 << 20,
        "Memory for the messages of all `WarmItems` streams that are being encoded. A stream is not read while there is no room. At least `limits.max_message_mb`.",
    ).later();
    LIMITS_DEFAULT_DEADLINE_MS: Key<Duration> = milliseconds(
        "limits.default_deadline_ms",
        "1000",
        1..=3_600_000,
        "The deadline of calls that send no `grpc-timeout`, in milliseconds.",
    );
}

/// A name is a label of metrics and is part of log lines.
const MAX_NAME_BYTES: usize = 128;
const MAX_LOCATION_BYTES: usize = 4096;

keys! {
    /// The keys of one `[[models]]` entry. A push may change all of them.
    MODEL_KEYS:

    MODEL_NAME: Key<String> = line(
        "models.name",
        MAX_NAME_BYTES,
        "The name that the model is served under, in requests, answers and metrics. It must be unique. At most 64 models can be configured.",
    ).live();
    MODEL_BUNDLE: Key<String> = line(
        "models.bundle",
        MAX_LOCATION_BYTES,
        "The folder of the bundle (a relative path starts at the config file's folder), or its URL: `s3://bucket/path`, `gs://`, `az://` or `https://`.",
    ).live();
    MODEL_DIGEST: Key<String> = sha256(
        "models.digest",
        "Optional: the digest of the bundle, as `midemb bundle inspect` prints it. A bundle with another digest is refused.",
    ).live();
    MODEL_SHARE: Key<u8> = percent(
        "models.share",
        0..=100,
        "The percentage that this model answers of the requests that name no model. All shares must add up to 100. A single model has 100 by default; a shadow has no share.",
    ).live();
    MODEL_SHADOW_OF: Key<String> = line(
        "models.shadow_of",
        MAX_NAME_BYTES,
        "Makes this model the shadow of the one named here: it scores that model's requests, too, and the results are compared but never sent to a caller. Use it to see drift before a model serves.",
    ).live();
    MODEL_SHADOW_PERCENT: Key<u8> = percent(
        "models.shadow_percent",
        1..=100,
        "The percentage of that model's users whose requests the shadow scores; 100 by default.",
    ).live();
}

fn log_format(word: &str, _: &Bound) -> Option<LogFormat> {
    match word {
        "auto" => Some(LogFormat::Auto),
        "json" => Some(LogFormat::Json),
        "human" => Some(LogFormat::Human),
        _ => None,
    }
}

fn sample_by(word: &str, _: &Bound) -> Option<SampleBy> {
    match word {
        "request" => Some(SampleBy::Request),
        "user" => Some(SampleBy::User),
        _ => None,
    }
}

fn provider(word: &str, _: &Bound) -> Option<ProviderChoice> {
    match word {
        "auto" => Some(ProviderChoice::Auto),
        "cpu" => Some(ProviderChoice::Cpu),
        "cuda" => Some(ProviderChoice::Cuda),
        _ => None,
    }
}
