//! What was written, before anything is checked: file first, environment over it.

use super::fault::ConfigError;
use config::{Config, Environment, File, FileFormat, Value};
use std::{collections::BTreeMap, ffi::OsString, path::Path};

/// The environment's prefix: `MIDEMB__SERVER__LISTEN` is `server.listen`.
const PREFIX: &str = "MIDEMB";
const SEPARATOR: &str = "__";

/// Every leaf that was written, by its dotted key; and the models' entries, in order.
#[derive(Debug, Default)]
pub struct Raw {
    /// Leaves outside `[[models]]`.
    pub leaves: BTreeMap<String, Value>,
    /// One table a model; `Err` where the entry is no table.
    pub models: Vec<Result<BTreeMap<String, Value>, Value>>,
}

impl Raw {
    /// Reads the file, if there is one, and the environment.
    pub fn read(file: Option<&Path>) -> Result<Self, ConfigError> {
        let text = file.map(read_file).transpose()?;
        Self::build(text.as_deref(), file, None)
    }

    /// Takes `text` as what stands in `file`, and reads the environment.
    pub fn of_text(text: &str, file: &Path) -> Result<Self, ConfigError> {
        Self::build(Some(text), Some(file), None)
    }

    /// Reads the file and these variables in place of the environment's.
    pub fn read_with(file: Option<&Path>, variables: &[(&str, &str)]) -> Result<Self, ConfigError> {
        let text = file.map(read_file).transpose()?;
        let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Self::build(text.as_deref(), file, Some(variables))
    }

    fn build(
        text: Option<&str>,
        file: Option<&Path>,
        variables: Option<std::collections::HashMap<String, String>>,
    ) -> Result<Self, ConfigError> {
        let mut builder = Config::builder();
        if let Some(text) = text {
            builder = builder.add_source(File::from_str(text, FileFormat::Toml));
        }
        let environment =
            Environment::with_prefix(PREFIX).prefix_separator(SEPARATOR).separator(SEPARATOR).source(variables);
        let syntax = |error: config::ConfigError| ConfigError::Syntax {
            path: file.map(Path::to_path_buf).unwrap_or_default(),
            reason: error.to_string().trim().replace('\n', " "),
        };
        let root: BTreeMap<String, Value> =
            builder.add_source(environment).build().and_then(Config::try_deserialize).map_err(syntax)?;
        let mut raw = Raw::default();
        for (key, value) in root {
            match (key.as_str(), value.clone().into_array()) {
                ("models", Ok(entries)) => raw.models = entries.into_iter().map(table).collect(),
                _ => raw.flatten(key, value),
            }
        }
        Ok(raw)
    }

    fn flatten(&mut self, key: String, value: Value) {
        match table(value) {
            Ok(entries) => entries.into_iter().for_each(|(name, value)| self.flatten(format!("{key}.{name}"), value)),
            Err(value) => {
                self.leaves.insert(key, value);
            }
        }
    }
}

fn table(value: Value) -> Result<BTreeMap<String, Value>, Value> {
    match value.clone().into_table() {
        Ok(entries) => Ok(entries.into_iter().collect()),
        Err(_) => Err(value),
    }
}

/// The text of a config file.
pub fn read_file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })
}

/// The environment's settings of the object stores' clients, as their own tools read them.
pub fn store_options() -> Vec<(String, String)> {
    const PREFIXES: [&str; 4] = ["AWS_", "AZURE_", "GOOGLE_", "HTTP_AUTHORIZATION"];
    let is_theirs = |name: &OsString| PREFIXES.iter().any(|prefix| name.to_string_lossy().starts_with(prefix));
    let variables = std::env::vars_os().filter(|(name, _)| is_theirs(name));
    variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))).collect()
}
