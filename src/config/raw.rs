//! A config as it was written, before any check: the file, and the environment over it.

use super::fault::ConfigError;
use crate::domain::bounded_text::cut;
use config::{Config, Environment, File, FileFormat, Value, ValueKind};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// `MIDEMB__SERVER__LISTEN` is `server.listen`.
const PREFIX: &str = "MIDEMB";
const SEPARATOR: &str = "__";

/// A syntax error repeats its line, which may have any length.
const MAX_REASON_BYTES: usize = 768;

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
        let mut builder = Config::builder();
        if let Some(text) = text {
            builder = builder.add_source(File::from_str(text, FileFormat::Toml));
        }
        let environment =
            Environment::with_prefix(PREFIX).prefix_separator(SEPARATOR).separator(SEPARATOR).source(variables);
        let syntax = |error: config::ConfigError| ConfigError::Syntax {
            path: file.map(Path::to_path_buf).unwrap_or_default(),
            reason: cut(error.to_string().trim(), MAX_REASON_BYTES).replace('\n', " "),
        };
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
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })
}
