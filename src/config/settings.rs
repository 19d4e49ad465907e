//! Validated settings, which the rest of the server takes as they are.

use super::{
    environment::library_from_environment,
    fault::{ConfigError, Fault, Faults, short},
    key::{Description, Key},
    keys::{self, KEYS},
    models::{self, ModelSettings},
    raw::Raw,
    reader::Reader,
    served_features,
};
use crate::{
    domain::digest::sha256_hex, inference::ProviderChoice, served_features::Options, telemetry::logs::LogFormat,
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

/// The settings of a server. A value of this type has passed all checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `server.listen`
    pub server_listen: SocketAddr,
    /// `server.drain_seconds`
    pub drain: Duration,
    /// `server.max_connections`
    pub max_connections: usize,
    /// `server.max_streams`
    pub max_streams: u32,
    /// `admin.listen`
    pub admin_listen: SocketAddr,
    /// `admin.token_file` and `admin.tls_*`
    pub admin_guard: AdminGuard,
    /// `telemetry.metrics_listen`
    pub metrics_listen: SocketAddr,
    /// `telemetry.log_format`
    pub log_format: LogFormat,
    /// `telemetry.log_filter`
    pub log_filter: String,
    /// `inference.provider`
    pub provider: ProviderChoice,
    /// `inference.threads`; where that is 0, the number of cores.
    pub n_threads: usize,
    /// `inference.batch_requests`; 0 leaves the choice to the provider.
    pub batch_requests: usize,
    /// `inference.onnxruntime`; where that is empty, `ORT_DYLIB_PATH`.
    pub onnxruntime: Option<PathBuf>,
    /// `cache.content_mb`
    pub content_cache_bytes: u64,
    /// `cache.item_mb`
    pub item_cache_bytes: u64,
    /// `cache.user_mb`
    pub user_cache_bytes: u64,
    /// `cache.known_items_mb`
    pub known_items_bytes: u64,
    /// `snapshot.folder`; none where the caches are not saved.
    pub snapshot_folder: Option<PathBuf>,
    /// `snapshot.interval_seconds`; none where snapshots are written on drain only.
    pub snapshot_every: Option<Duration>,
    /// `served_features.*`; none where nothing is sampled.
    pub served_features: Option<Options>,
    /// `bundles.folder`
    pub bundles_folder: PathBuf,
    /// `reload.warm_seconds`
    pub warm_for: Duration,
    /// `routing.salt`
    pub salt: String,
    /// `limits.*`
    pub limits: Limits,
    /// `[[models]]`, at least one.
    pub models: Vec<ModelSettings>,
    /// The value of every key outside `[[models]]`, as it was written or by default.
    texts: BTreeMap<&'static str, String>,
    /// The SHA-256 of the settings as TOML: it depends on the settings alone, whatever file or variable each came from.
    pub digest: String,
}

/// What a caller of the admin listener must present, and over what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdminGuard {
    /// `admin.token_file`
    pub token_file: Option<PathBuf>,
    /// `admin.allow_plaintext_tokens`
    pub allows_plaintext_tokens: bool,
    /// `admin.tls_cert` and `admin.tls_key`
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// `admin.tls_client_ca`
    pub client_ca: Option<PathBuf>,
}

/// Bounds that hold for every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `limits.max_candidates`
    pub max_candidates: usize,
    /// `limits.max_history`
    pub max_history: usize,
    /// `limits.max_text_bytes`
    pub max_text_bytes: usize,
    /// `limits.max_message_mb`, in bytes.
    pub max_message_bytes: usize,
    /// `limits.max_in_flight`
    pub max_in_flight: usize,
    /// `limits.max_encoding`
    pub max_encoding: usize,
    /// `limits.read_ms`
    pub read: Duration,
    /// `limits.write_ms`
    pub write: Duration,
    /// `limits.max_receiving_mb`, in bytes.
    pub max_receiving_bytes: u64,
    /// `limits.max_decoded_mb`, in bytes.
    pub max_decoded_bytes: u64,
    /// `limits.max_unsent_mb`, in bytes.
    pub max_unsent_bytes: u64,
    /// `limits.max_warm_up_mb`, in bytes.
    pub max_warm_up_bytes: u64,
    /// `limits.default_deadline_ms`
    pub default_deadline: Duration,
}

impl Settings {
    /// Reads and checks the file (if there is one) and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::check(&Raw::read(file)?, file)
    }

    /// Reads and checks `text`, as if it were the contents of `file`, and the environment.
    pub fn from_text(text: &str, file: &Path) -> Result<Self, ConfigError> {
        Self::check(&Raw::from_text(text, file)?, Some(file))
    }

    /// Checks what was written. Relative paths start from the folder of `file`.
    pub fn check(raw: &Raw, file: Option<&Path>) -> Result<Self, ConfigError> {
        let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
        let mut reader = Reader::new(raw);
        // Faults of known keys are reported in the order of these lines.
        let mut settings = Settings {
            server_listen: reader.get(&keys::SERVER_LISTEN),
            drain: reader.get(&keys::SERVER_DRAIN_SECONDS),
            max_connections: reader.get(&keys::SERVER_MAX_CONNECTIONS),
            max_streams: reader.get(&keys::SERVER_MAX_STREAMS) as u32,
            admin_listen: reader.get(&keys::ADMIN_LISTEN),
            admin_guard: AdminGuard::read(&mut reader, folder),
            metrics_listen: reader.get(&keys::TELEMETRY_METRICS_LISTEN),
            log_format: reader.get(&keys::TELEMETRY_LOG_FORMAT),
            log_filter: reader.get(&keys::TELEMETRY_LOG_FILTER),
            provider: reader.get(&keys::INFERENCE_PROVIDER),
            n_threads: threads_or_cores(reader.get(&keys::INFERENCE_THREADS)),
            batch_requests: reader.get(&keys::INFERENCE_BATCH_REQUESTS),
            onnxruntime: reader.get(&keys::INFERENCE_ONNXRUNTIME).or_else(library_from_environment),
            content_cache_bytes: reader.get(&keys::CACHE_CONTENT_MB),
            item_cache_bytes: reader.get(&keys::CACHE_ITEM_MB),
            user_cache_bytes: reader.get(&keys::CACHE_USER_MB),
            known_items_bytes: reader.get(&keys::CACHE_KNOWN_ITEMS_MB),
            snapshot_folder: reader.path_in(folder, &keys::SNAPSHOT_FOLDER),
            snapshot_every: Some(reader.get(&keys::SNAPSHOT_INTERVAL_SECONDS)).filter(|interval| !interval.is_zero()),
            served_features: served_features::read(&mut reader, folder),
            bundles_folder: reader.path_in(folder, &keys::BUNDLES_FOLDER).unwrap_or_else(|| folder.join("bundles")),
            warm_for: reader.get(&keys::RELOAD_WARM_SECONDS),
            salt: reader.get(&keys::ROUTING_SALT),
            limits: Limits::read(&mut reader),
            models: models::read(&raw.models, folder, &mut reader.faults),
            texts: BTreeMap::new(),
            digest: String::new(),
        };
        check_listeners(&settings, &mut reader.faults);
        check_admin_access(settings.admin_listen, &settings.admin_guard, &mut reader.faults);
        if !reader.faults.is_empty() {
            return Err(ConfigError::Invalid(reader.faults.into_vec()));
        }
        settings.texts = reader.texts;
        settings.digest = sha256_hex(settings.digested_form().as_bytes());
        Ok(settings)
    }

    /// The keys that need a restart and have another value in `new`.
    pub fn frozen_differences(&self, new: &Settings) -> Vec<Fault> {
        let mut faults = Vec::new();
        for key in KEYS.iter().filter(|key| !key.is_live) {
            let (old, new) = (self.text(key), new.text(key));
            if old != new {
                let (old, new) = (short(old), short(new));
                faults.push(Fault::new(key.name, format!("cannot change from {old:?} to {new:?} without a restart")));
            }
        }
        faults
    }

    /// The settings as a TOML file, every key included, that gives the same settings again.
    pub fn to_toml(&self) -> String {
        self.print(|_| true)
    }

    /// What the digest is computed over.
    fn digested_form(&self) -> String {
        self.print(|key| key.is_in_every_digest || self.text(key) != key.default)
    }

    fn print(&self, is_printed: impl Fn(&Description) -> bool) -> String {
        let mut text = String::new();
        let mut current_table = "";
        for key in KEYS.iter().filter(|key| is_printed(key)) {
            let table = key.table();
            if table != current_table {
                if !text.is_empty() {
                    text.push('\n');
                }
                text += &format!("[{table}]\n");
                current_table = table;
            }
            text += &key.toml_line(self.text(key));
        }
        for model in &self.models {
            text += &model.to_toml();
        }
        text
    }

    fn text(&self, key: &Description) -> &str {
        self.texts.get(key.name).map_or(key.default, String::as_str)
    }
}

impl AdminGuard {
    fn read(reader: &mut Reader<'_>, folder: &Path) -> Self {
        let certificate = reader.path_in(folder, &keys::ADMIN_TLS_CERT);
        let key = reader.path_in(folder, &keys::ADMIN_TLS_KEY);
        let client_ca = reader.path_in(folder, &keys::ADMIN_TLS_CLIENT_CA);
        if certificate.is_some() && key.is_none() {
            reader.faults.push(needs(&keys::ADMIN_TLS_CERT, &keys::ADMIN_TLS_KEY));
        }
        if key.is_some() && certificate.is_none() {
            reader.faults.push(needs(&keys::ADMIN_TLS_KEY, &keys::ADMIN_TLS_CERT));
        }
        if client_ca.is_some() && certificate.is_none() {
            reader.faults.push(needs(&keys::ADMIN_TLS_CLIENT_CA, &keys::ADMIN_TLS_CERT));
        }
        let token_file = reader.path_in(folder, &keys::ADMIN_TOKEN_FILE);
        let allows_plaintext_tokens = reader.get(&keys::ADMIN_ALLOW_PLAINTEXT_TOKENS);
        AdminGuard { token_file, allows_plaintext_tokens, certificate: certificate.zip(key), client_ca }
    }
}

impl Limits {
    fn read(reader: &mut Reader<'_>) -> Self {
        let limits = Limits {
            max_candidates: reader.get(&keys::LIMITS_MAX_CANDIDATES),
            max_history: reader.get(&keys::LIMITS_MAX_HISTORY),
            max_text_bytes: reader.get(&keys::LIMITS_MAX_TEXT_BYTES),
            max_message_bytes: reader.get(&keys::LIMITS_MAX_MESSAGE_MB) as usize,
            max_in_flight: reader.get(&keys::LIMITS_MAX_IN_FLIGHT),
            max_encoding: reader.get(&keys::LIMITS_MAX_ENCODING),
            read: reader.get(&keys::LIMITS_READ_MS),
            write: reader.get(&keys::LIMITS_WRITE_MS),
            max_receiving_bytes: reader.get(&keys::LIMITS_MAX_RECEIVING_MB),
            max_decoded_bytes: reader.get(&keys::LIMITS_MAX_DECODED_MB),
            max_unsent_bytes: reader.get(&keys::LIMITS_MAX_UNSENT_MB),
            max_warm_up_bytes: reader.get(&keys::LIMITS_MAX_WARM_UP_MB),
            default_deadline: reader.get(&keys::LIMITS_DEFAULT_DEADLINE_MS),
        };
        for (key, n_bytes) in [
            (&keys::LIMITS_MAX_RECEIVING_MB, limits.max_receiving_bytes),
            (&keys::LIMITS_MAX_WARM_UP_MB, limits.max_warm_up_bytes),
        ] {
            if n_bytes < limits.max_message_bytes as u64 {
                let reason = "is less than limits.max_message_mb, so the largest message would never be read";
                reader.faults.push(Fault::new(key.description.name, reason));
            }
        }
        limits
    }
}

fn needs(key: &Key<Option<PathBuf>>, other: &Key<Option<PathBuf>>) -> Fault {
    Fault::new(key.description.name, format!("needs {}, too", other.description.name))
}

fn threads_or_cores(n_threads: usize) -> usize {
    match n_threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

/// Two listeners on one port of one address cannot both be bound. Port 0 is a free port for each.
fn check_listeners(settings: &Settings, faults: &mut Faults) {
    let listeners = [
        (&keys::SERVER_LISTEN, settings.server_listen),
        (&keys::ADMIN_LISTEN, settings.admin_listen),
        (&keys::TELEMETRY_METRICS_LISTEN, settings.metrics_listen),
    ];
    for (i, (key, address)) in listeners.iter().enumerate() {
        if let Some((other, _)) = listeners[..i].iter().find(|(_, taken)| overlap(*taken, *address)) {
            let reason = format!("{address} is taken by {}, use another port", other.description.name);
            faults.push(Fault::new(key.description.name, reason));
        }
    }
}

fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // Unspecified is every address of the machine; in IPv6, those of IPv4 as well.
    let covers = |a: SocketAddr, b: SocketAddr| a.ip().is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

/// Every caller of the admin listener may change which models are served, so strangers must neither reach it nor read a token.
fn check_admin_access(listen: SocketAddr, guard: &AdminGuard, faults: &mut Faults) {
    if listen.ip().is_loopback() {
        return;
    }
    if guard.token_file.is_none() && guard.client_ca.is_none() {
        let reason = format!(
            "{listen} can be reached from other machines: set admin.token_file or admin.tls_client_ca, or listen on loopback"
        );
        faults.push(Fault::new(keys::ADMIN_LISTEN.description.name, reason));
    }
    if guard.token_file.is_some() && guard.certificate.is_none() && !guard.allows_plaintext_tokens {
        let reason = format!(
            "tokens for {listen} would cross the network in the clear: set admin.tls_cert and admin.tls_key, or \
             admin.allow_plaintext_tokens if something else encrypts the traffic"
        );
        faults.push(Fault::new(keys::ADMIN_TOKEN_FILE.description.name, reason));
    }
}

#[cfg(test)]
mod tests;
