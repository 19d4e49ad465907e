//! Validated settings. Every error of a config is reported at once.

use super::{
    fault::{ConfigError, Fault},
    keys::{Bound, KEYS, Key, MODEL_KEYS, find},
    raw::Raw,
};
use crate::{
    inference::ProviderChoice,
    telemetry::logs::{self, LogFormat},
};
use config::{Value, ValueKind};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, HashSet},
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
    /// `[[models]]`, at least one.
    pub models: Vec<ModelSettings>,
    /// The SHA-256 of the settings in force, whatever file or variable they came from.
    pub digest: String,
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

/// One served model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSettings {
    /// The name it is served under.
    pub name: String,
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// Percent of the traffic.
    pub share: u8,
}

impl Settings {
    /// Reads and checks the file (if there is one) and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        Self::check(&Raw::read(file)?, file)
    }

    /// Checks what was written. Relative bundle folders start from the folder of `file`.
    pub fn check(raw: &Raw, file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut reader = Reader { raw, faults: unknown_keys(raw), written: BTreeMap::new() };
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
            models: reader.models(file.and_then(Path::parent).unwrap_or(Path::new(""))),
            digest: String::new(),
        };
        if !reader.faults.is_empty() {
            return Err(ConfigError::Invalid(reader.faults));
        }
        settings.digest = digest(&settings.to_toml(&reader.written));
        Ok(settings)
    }

    /// The settings in force as a TOML file that gives the same settings again.
    pub fn print(file: Option<&Path>) -> Result<String, ConfigError> {
        let raw = Raw::read(file)?;
        let settings = Self::check(&raw, file)?;
        let mut reader = Reader { raw: &raw, faults: Vec::new(), written: BTreeMap::new() };
        KEYS.iter().for_each(|key| drop(reader.text(key.name)));
        Ok(settings.to_toml(&reader.written))
    }

    fn to_toml(&self, written: &BTreeMap<&'static str, String>) -> String {
        let mut text = String::new();
        let mut section = "";
        for key in KEYS {
            let (table, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if table != section {
                text += &format!("{}[{table}]\n", if section.is_empty() { "" } else { "\n" });
                section = table;
            }
            let value = written.get(key.name).map_or(key.default, String::as_str);
            text += &match key.bound {
                Bound::Integer(..) => format!("{name} = {value}\n"),
                _ => format!("{name} = {}\n", toml::Value::from(value)),
            };
        }
        for ModelSettings { name, bundle, share } in &self.models {
            let bundle = std::path::absolute(bundle).unwrap_or_else(|_| bundle.clone());
            let (name, bundle) = (toml::Value::from(name.as_str()), toml::Value::from(bundle.display().to_string()));
            text += &format!("\n[[models]]\nname = {name}\nbundle = {bundle}\nshare = {share}\n");
        }
        text
    }
}

fn digest(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
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

    fn filter(&mut self, name: &'static str) -> String {
        let text = self.text(name);
        if logs::parse_filter(&text).is_err() {
            self.fault(name, &text);
        }
        text
    }

    fn models(&mut self, folder: &Path) -> Vec<ModelSettings> {
        let n_models = self.raw.models.len();
        if n_models == 0 {
            self.faults.push(Fault {
                key: "models".to_owned(),
                reason: "no model is configured, add at least one [[models]] with name and bundle".to_owned(),
            });
        }
        let mut models = Vec::with_capacity(n_models);
        for (i, entry) in self.raw.models.iter().enumerate() {
            let mut entry =
                ModelReader { prefix: format!("models[{i}]"), entry: entry.as_ref().ok(), faults: &mut self.faults };
            models.push(entry.read(folder, n_models));
        }
        let mut names = HashSet::new();
        for (i, model) in models.iter().enumerate().filter(|(_, model)| !model.name.is_empty()) {
            if !names.insert(&model.name) {
                self.faults.push(Fault {
                    key: format!("models[{i}].name"),
                    reason: format!("{:?} is taken by another model", model.name),
                });
            }
        }
        let total: u32 = models.iter().map(|model| u32::from(model.share)).sum();
        if self.faults.is_empty() && total != 100 {
            self.faults.push(Fault {
                key: "models.share".to_owned(),
                reason: format!("the shares add up to {total}, not to 100"),
            });
        }
        models
    }
}

/// Reads one `[[models]]` entry.
struct ModelReader<'a> {
    prefix: String,
    entry: Option<&'a BTreeMap<String, Value>>,
    faults: &'a mut Vec<Fault>,
}

impl ModelReader<'_> {
    fn read(&mut self, folder: &Path, n_models: usize) -> ModelSettings {
        for name in self.entry.iter().flat_map(|entry| entry.keys()) {
            if !MODEL_KEYS.iter().any(|(known, _)| known.strip_prefix("models.") == Some(name)) {
                self.faults.push(Fault { key: format!("{}.{name}", self.prefix), reason: "unknown key".to_owned() });
            }
        }
        let name = self.required("name");
        let bundle = self.required("bundle");
        ModelSettings { name, bundle: folder.join(bundle), share: self.share(n_models) }
    }

    fn text(&self, name: &str) -> Option<Result<String, String>> {
        self.entry?.get(name).map(scalar)
    }

    fn required(&mut self, name: &str) -> String {
        match self.text(name) {
            Some(Ok(text)) if !text.is_empty() => text,
            _ => {
                let reason = "is missing, it must be a text that is not empty".to_owned();
                self.faults.push(Fault { key: format!("{}.{name}", self.prefix), reason });
                String::new()
            }
        }
    }

    fn share(&mut self, n_models: usize) -> u8 {
        let text = match self.text("share") {
            None if n_models == 1 => return 100,
            None => "missing".to_owned(),
            Some(Ok(text) | Err(text)) => text,
        };
        text.parse().ok().filter(|share| *share <= 100).unwrap_or_else(|| {
            let reason = format!("{text:?} is not a whole number of percent from 0 to 100");
            self.faults.push(Fault { key: format!("{}.share", self.prefix), reason });
            0
        })
    }
}

/// The text of a single value; the error is a text, too, for the message.
fn scalar(value: &Value) -> Result<String, String> {
    match &value.kind {
        ValueKind::Table(_) | ValueKind::Array(_) | ValueKind::Nil => Err(value.to_string()),
        ValueKind::String(text) => Ok(text.clone()),
        _ => Ok(value.to_string()),
    }
}

#[cfg(test)]
mod tests;
