//! A config as it was written, before any check of its values: the file, and the environment over it.
//!
//! `config` reads each key at the top of a source as a path: `a[9]` makes a list of ten, and every dot opens a table. So a key of
//! a few bytes could ask for any amount of memory, or for tables nested too deep for the stack. Keys that are more than names
//! are refused before `config` merges them. Keys of inner tables are not read as paths, and TOML's parser limits their depth.

use super::fault::{ConfigError, short};
use crate::domain::bounded_text::cut;
use config::{Config, Environment, File, FileFormat, Source, Value, ValueKind};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
    path::Path,
};

/// `MIDEMB__SERVER__LISTEN` is `server.listen`.
const PREFIX: &str = "MIDEMB";
const SEPARATOR: &str = "__";

/// A syntax error repeats its line, which may have any length.
const MAX_REASON_BYTES: usize = 768;

/// The most bytes of a config. Its parsers take a thousand times as much for the shortest keys; one with 64 models has a tenth.
pub const MAX_TEXT_BYTES: usize = 256 << 10;
/// A saved one has a line more.
const MAX_FILE_BYTES: u64 = MAX_TEXT_BYTES as u64 + (4 << 10);

/// The most tables that a variable may name, one within the other: as many as TOML's parser accepts in a file.
const MAX_DEPTH: usize = 80;

/// One `[[models]]` entry: its values by their key, without `models.`.
pub(super) type ModelEntry = BTreeMap<String, Value>;

/// All values that were written.
#[derive(Debug, Default)]
pub struct Raw {
    /// The values outside `[[models]]`, by their dotted key.
    pub(super) values: BTreeMap<String, Value>,
    /// The entries of `[[models]]` in their order. One that is not a table is empty here, and lacks every required key.
    pub(super) models: Vec<ModelEntry>,
}

impl Raw {
    /// Reads the file, if there is one, and the environment.
    pub fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let text = file.map(read_file).transpose()?;
        Self::build(text.as_deref(), file, None)
    }

    /// Reads `text` in place of what `file` holds, and the environment.
    pub fn from_text(text: &str, file: &Path) -> Result<Self, ConfigError> {
        Self::build(Some(text), Some(file), None)
    }

    /// Reads the file, if there is one, and `variables` in place of the environment.
    pub fn read_with(file: Option<&Path>, variables: &[(&str, &str)]) -> Result<Self, ConfigError> {
        let text = file.map(read_file).transpose()?;
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self::build(text.as_deref(), file, Some(variables))
    }

    fn build(
        text: Option<&str>,
        file: Option<&Path>,
        variables: Option<HashMap<String, String>>,
    ) -> Result<Self, ConfigError> {
        let refused = |reason: String| ConfigError::Syntax {
            path: file.map(Path::to_path_buf).unwrap_or_default(),
            reason: cut(reason.trim(), MAX_REASON_BYTES).replace('\n', " "),
        };
        let syntax = |error: config::ConfigError| refused(error.to_string());
        let mut builder = Config::builder();
        if let Some(text) = text {
            if text.len() > MAX_TEXT_BYTES {
                return Err(refused(too_long(text.len())));
            }
            let source = File::from_str(text, FileFormat::Toml);
            let written = source.collect().map_err(syntax)?;
            if let Some(key) = written.keys().filter(|key| !is_name(key)).min() {
                return Err(refused(unusable_key(text, key)));
            }
            builder = builder.add_source(source);
        }
        let environment =
            Environment::with_prefix(PREFIX).prefix_separator(SEPARATOR).separator(SEPARATOR).source(variables);
        let written = environment.collect().map_err(syntax)?;
        if let Some(key) = written.keys().filter(|key| !is_dotted_name(key)).min() {
            return Err(refused(unusable_variable(key)));
        }
        let root: BTreeMap<String, Value> =
            builder.add_source(environment).build().and_then(Config::try_deserialize).map_err(syntax)?;
        let mut raw = Raw::default();
        for (key, value) in root {
            match (key.as_str(), value.clone().into_array()) {
                ("models", Ok(entries)) => {
                    raw.models = entries.iter().map(|entry| table(entry).unwrap_or_default()).collect();
                }
                _ => raw.insert(key, value),
            }
        }
        Ok(raw)
    }

    /// Adds a value; in place of a table, the values in it.
    fn insert(&mut self, key: String, value: Value) {
        let Some(entries) = table(&value) else {
            self.values.insert(key, value);
            return;
        };
        for (name, value) in entries {
            self.insert(format!("{key}.{name}"), value);
        }
    }
}

/// Whether `config` reads the key as one name and nothing else.
fn is_name(key: &str) -> bool {
    !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// Whether the key of a variable is made of names with dots between them.
fn is_dotted_name(key: &str) -> bool {
    key.split('.').all(is_name) && key.split('.').count() <= MAX_DEPTH
}

fn too_long(n_bytes: usize) -> String {
    format!("a config of {n_bytes} bytes or more, at most {MAX_TEXT_BYTES} are allowed")
}

fn unusable_key(text: &str, key: &str) -> String {
    let line = line_of(text, key).map_or_else(String::new, |line| format!("line {line}: "));
    format!("{line}the key {:?} is not a name, use only letters, digits, _ and -", short(key))
}

fn unusable_variable(key: &str) -> String {
    format!(
        "the key {:?} of a variable {PREFIX}{SEPARATOR}... is not a name, use only letters, digits, _ and -, as in \
         {PREFIX}{SEPARATOR}SERVER{SEPARATOR}LISTEN",
        short(key)
    )
}

/// The line, counted from 1, where `key` is first written at the top of a TOML text.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let root = toml::de::DeTable::parse(text).ok()?.into_inner();
    let (written, _value) = root.iter().find(|(written, _value)| written.get_ref() == key)?;
    let before = text.get(..written.span().start)?;
    Some(before.matches('\n').count() + 1)
}

fn table(value: &Value) -> Option<BTreeMap<String, Value>> {
    Some(value.clone().into_table().ok()?.into_iter().collect())
}

/// The text of a string, number or boolean; none for tables, arrays and nil, which no key accepts.
pub(super) fn scalar(value: &Value) -> Option<String> {
    match &value.kind {
        ValueKind::Table(_) | ValueKind::Array(_) | ValueKind::Nil => None,
        _ => Some(value.to_string()),
    }
}

/// The text of a config file.
pub fn read_file(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_path_buf(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(ConfigError::Syntax { path: path.to_path_buf(), reason: too_long(bytes.len()) });
    }
    String::from_utf8(bytes).map_err(|_| failed(io::Error::new(io::ErrorKind::InvalidData, "is not UTF-8")))
}
