//! Validated settings. Every error of a config is reported at once.

use super::{
    fault::{ConfigError, Fault},
    keys::{Bound, KEYS, Key, find},
    models::{self, ModelSettings},
    raw::Raw,
};
use crate::{
    domain::digest::sha256_hex,
    inference::ProviderChoice,
    telemetry::logs::{self, LogFormat},
};
use config::{Value, ValueKind};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// Settings that were checked: nothing behind them has to look again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `server.listen`
    pub server_listen: SocketAddr,
    /// `server.drain_seconds`
    pub drain: Duration,
    /// `admin.listen`
    pub admin_listen: SocketAddr,
    /// `telemetry.metrics_listen`
    pub metrics_listen: SocketAddr,
    /// `telemetry.log_format`
    pub log_format: LogFormat,
    /// `telemetry.log_filter`
    pub log_filter: String,
    /// `inference.provider`
    pub provider: ProviderChoice,
    /// `inference.threads`, with 0 resolved to the cores there are.
    pub n_threads: usize,
    /// `inference.batch_requests`; 0 leaves it to the provider.
    pub batch_requests: usize,
    /// `inference.onnxruntime`, or `ORT_DYLIB_PATH` where that is empty.
    pub onnxruntime: Option<PathBuf>,
    /// `cache.content_mb`
    pub content_cache_bytes: u64,
    /// `cache.item_mb`
    pub item_cache_bytes: u64,
    /// `cache.user_mb`
    pub user_cache_bytes: u64,
    /// `cache.known_items_mb`
    pub known_items_bytes: u64,
    /// `limits.*`
    pub limits: Limits,
    /// `admin.token_file`, `admin.tls_*`
    pub admin_guard: AdminGuard,
    /// `snapshot.folder`; none where nothing is to be kept.
    pub snapshot_folder: Option<PathBuf>,
    /// `snapshot.interval_seconds`; none where only a drain writes.
    pub snapshot_every: Option<Duration>,
    /// `bundles.folder`
    pub bundles_folder: PathBuf,
    /// `reload.warm_seconds`
    pub warm_for: Duration,
    /// `routing.salt`
    pub salt: String,
    /// `[[models]]`, at least one.
    pub models: Vec<ModelSettings>,
    /// The text of every key, as written or by default.
    written: BTreeMap<&'static str, String>,
    /// The SHA-256 of the settings in force, whatever file or variable they came from.
    pub digest: String,
}

/// Who may call the admin listener, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdminGuard {
    /// `admin.token_file`
    pub token_file: Option<PathBuf>,
    /// `admin.tls_cert` and `admin.tls_key`
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// `admin.tls_client_ca`
    pub client_ca: Option<PathBuf>,
}

/// What one request may hold.
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
    /// `limits.default_deadline_ms`
    pub default_deadline: Duration,
}

impl Settings {
    /// Reads and checks the file (if there is one) and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::check(&Raw::read(file)?, file)
    }

    /// Checks `text` as if it stood in `file`, and the environment.
    pub fn of_text(text: &str, file: &Path) -> Result<Self, ConfigError> {
        Self::check(&Raw::of_text(text, file)?, Some(file))
    }

    /// Checks what was written. Relative folders start from the folder of `file`.
    pub fn check(raw: &Raw, file: Option<&Path>) -> Result<Self, ConfigError> {
        let folder = file.and_then(Path::parent).unwrap_or(Path::new(""));
        let mut reader = Reader { raw, folder, faults: unknown_keys(raw), written: BTreeMap::new() };
        let mb = |n: u64| n << 20;
        let mut settings = Settings {
            server_listen: reader.address("server.listen"),
            drain: Duration::from_secs(reader.integer("server.drain_seconds")),
            admin_listen: reader.address("admin.listen"),
            metrics_listen: reader.address("telemetry.metrics_listen"),
            log_format: reader.word("telemetry.log_format", &[LogFormat::Auto, LogFormat::Json, LogFormat::Human]),
            log_filter: reader.filter("telemetry.log_filter"),
            provider: reader
                .word("inference.provider", &[ProviderChoice::Auto, ProviderChoice::Cpu, ProviderChoice::Cuda]),
            n_threads: threads(reader.integer("inference.threads")),
            batch_requests: reader.integer("inference.batch_requests") as usize,
            onnxruntime: library(&reader.text("inference.onnxruntime")),
            content_cache_bytes: mb(reader.integer("cache.content_mb")),
            item_cache_bytes: mb(reader.integer("cache.item_mb")),
            user_cache_bytes: mb(reader.integer("cache.user_mb")),
            known_items_bytes: mb(reader.integer("cache.known_items_mb")),
            limits: Limits {
                max_candidates: reader.integer("limits.max_candidates") as usize,
                max_history: reader.integer("limits.max_history") as usize,
                max_text_bytes: reader.integer("limits.max_text_bytes") as usize,
                max_message_bytes: mb(reader.integer("limits.max_message_mb")) as usize,
                max_in_flight: reader.integer("limits.max_in_flight") as usize,
                default_deadline: Duration::from_millis(reader.integer("limits.default_deadline_ms")),
            },
            admin_guard: reader.admin_guard(),
            snapshot_folder: reader.path("snapshot.folder"),
            snapshot_every: Some(reader.integer("snapshot.interval_seconds"))
                .filter(|s| *s > 0)
                .map(Duration::from_secs),
            bundles_folder: reader.path("bundles.folder").unwrap_or_else(|| folder.join("bundles")),
            warm_for: Duration::from_secs(reader.integer("reload.warm_seconds")),
            salt: reader.text("routing.salt"),
            models: models::read(&raw.models, folder, &mut reader.faults),
            written: BTreeMap::new(),
            digest: String::new(),
        };
        reader.check_admin(settings.admin_listen, &settings.admin_guard);
        if !reader.faults.is_empty() {
            return Err(ConfigError::Invalid(reader.faults));
        }
        settings.written = reader.written;
        settings.digest = sha256_hex(settings.to_toml().as_bytes());
        Ok(settings)
    }

    /// The keys whose value differs from that in `other` and that cannot change without a restart.
    pub fn frozen_differences(&self, other: &Settings) -> Vec<Fault> {
        let text = |settings: &Settings, key: &Key| settings.written.get(key.name).cloned().unwrap_or_default();
        let frozen = KEYS.iter().filter(|key| !key.is_live);
        let differs =
            frozen.map(|key| (key, text(self, key), text(other, key))).filter(|(_, here, there)| here != there);
        let fault = |(key, here, there): (&Key, String, String)| Fault {
            key: key.name.to_owned(),
            reason: format!("cannot change from {here:?} to {there:?} without a restart"),
        };
        differs.map(fault).collect()
    }

    /// The settings in force as a TOML file that gives the same settings again.
    pub fn print(file: Option<&Path>) -> Result<String, ConfigError> {
        Ok(Self::load(file)?.to_toml())
    }

    /// The settings as a TOML file that gives the same settings again.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for key in KEYS {
            let (table, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if table != section {
                text += &format!("{}[{table}]\n", if section.is_empty() { "" } else { "\n" });
                section = table;
            }
            let value = self.written.get(key.name).map_or(key.default, String::as_str);
            text += &match key.bound {
                Bound::Integer(..) => format!("{name} = {value}\n"),
                _ => format!("{name} = {}\n", toml::Value::from(value)),
            };
        }
        self.models.iter().for_each(|model| text += &model.to_toml());
        text
    }
}

fn threads(n: u64) -> usize {
    match n {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n as usize,
    }
}

fn library(path: &str) -> Option<PathBuf> {
    if path.is_empty() { library_from_environment() } else { Some(path.into()) }
}

/// The library that `ORT_DYLIB_PATH` names, as other programs of ONNX Runtime read it.
pub fn library_from_environment() -> Option<PathBuf> {
    std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn unknown_keys(raw: &Raw) -> Vec<Fault> {
    let nearest = |name: &str| {
        let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
        let likeness = |key: &&Key| {
            let (whole, end) = (strsim::jaro(key.name, name), strsim::jaro(&last(key.name), &last(name)));
            whole.max(end)
        };
        let near = KEYS.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).filter(|key| likeness(key) > 0.85);
        near.map_or_else(String::new, |key| format!(", did you mean {}?", key.name))
    };
    let unknown = raw.leaves.keys().filter(|name| find(name).is_none());
    unknown.map(|name| Fault { key: name.clone(), reason: format!("unknown key{}", nearest(name)) }).collect()
}

/// Reads keys one by one and collects what is wrong with them.
struct Reader<'a> {
    raw: &'a Raw,
    /// Where relative paths start from.
    folder: &'a Path,
    faults: Vec<Fault>,
    /// The text of every key read so far, defaults included.
    written: BTreeMap<&'static str, String>,
}

impl Reader<'_> {
    /// The text of a key of [`KEYS`], as written or by default.
    fn text(&mut self, name: &'static str) -> String {
        let default = find(name).map_or("", |key| key.default);
        let text = match self.raw.leaves.get(name).map(scalar) {
            None => default.to_owned(),
            Some(Ok(text)) => text,
            Some(Err(value)) => {
                self.fault(name, &value);
                default.to_owned()
            }
        };
        self.written.insert(name, text.clone());
        text
    }

    fn fault(&mut self, name: &str, value: &str) {
        let bound = find(name).map_or_else(String::new, |key| key.bound.to_string());
        self.faults.push(Fault { key: name.to_owned(), reason: format!("{value:?} is not {bound}") });
    }

    fn integer(&mut self, name: &'static str) -> u64 {
        let text = self.text(name);
        let bounds = find(name).map(|key| key.bound);
        match (text.parse::<u64>(), bounds) {
            (Ok(n), Some(Bound::Integer(low, high))) if (low..=high).contains(&n) => n,
            _ => {
                self.fault(name, &text);
                0
            }
        }
    }

    fn address(&mut self, name: &'static str) -> SocketAddr {
        let text = self.text(name);
        text.parse().unwrap_or_else(|_| {
            self.fault(name, &text);
            SocketAddr::from(([127, 0, 0, 1], 0))
        })
    }

    /// The value of `values` that stands where the word stands in the key's list.
    fn word<T: Copy>(&mut self, name: &'static str, values: &[T]) -> T {
        let text = self.text(name);
        let words = match find(name).map(|key| key.bound) {
            Some(Bound::OneOf(words)) => words,
            _ => &[],
        };
        let place = words.iter().position(|word| *word == text).unwrap_or_else(|| {
            self.fault(name, &text);
            0
        });
        values[place]
    }

    /// None where the key is empty.
    fn path(&mut self, name: &'static str) -> Option<PathBuf> {
        let text = self.text(name);
        (!text.is_empty()).then(|| self.folder.join(text))
    }

    fn admin_guard(&mut self) -> AdminGuard {
        let (certificate, key) = (self.path("admin.tls_cert"), self.path("admin.tls_key"));
        let client_ca = self.path("admin.tls_client_ca");
        let mut needs = |is_missing: bool, key: &str, other: &str| {
            if is_missing {
                self.faults.push(Fault { key: key.to_owned(), reason: format!("needs {other}, too") });
            }
        };
        needs(certificate.is_some() && key.is_none(), "admin.tls_cert", "admin.tls_key");
        needs(key.is_some() && certificate.is_none(), "admin.tls_key", "admin.tls_cert");
        needs(client_ca.is_some() && certificate.is_none(), "admin.tls_client_ca", "admin.tls_cert");
        AdminGuard { token_file: self.path("admin.token_file"), certificate: certificate.zip(key), client_ca }
    }

    /// Whoever reaches the admin listener may change what is served.
    fn check_admin(&mut self, listen: SocketAddr, guard: &AdminGuard) {
        if !listen.ip().is_loopback() && guard.token_file.is_none() && guard.client_ca.is_none() {
            let reason = format!(
                "{listen} can be reached from elsewhere: set admin.token_file or admin.tls_client_ca, or listen on loopback"
            );
            self.faults.push(Fault { key: "admin.listen".to_owned(), reason });
        }
    }

    fn filter(&mut self, name: &'static str) -> String {
        let text = self.text(name);
        if logs::parse_filter(&text).is_err() {
            self.fault(name, &text);
        }
        text
    }
}

/// The text of a single value; the error is a text, too, for the message.
pub(super) fn scalar(value: &Value) -> Result<String, String> {
    match &value.kind {
        ValueKind::Table(_) | ValueKind::Array(_) | ValueKind::Nil => Err(value.to_string()),
        ValueKind::String(text) => Ok(text.clone()),
        _ => Ok(value.to_string()),
    }
}

#[cfg(test)]
mod tests;
