//! The list `[[models]]`: what is served, from where, and to whom.

use super::{fault::Fault, keys::MODEL_KEYS, settings::scalar};
use crate::bundle::store::Source;
use config::Value;
use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

/// One model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSettings {
    /// The name it is served under.
    pub name: String,
    /// Where its bundle is.
    pub bundle: Source,
    /// The digest that the bundle must have, in lower-case hex.
    pub digest: Option<String>,
    /// What it does.
    pub role: Role,
}

/// What a model does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It answers.
    Live {
        /// Percent of the requests that name no model.
        share: u8,
    },
    /// It is computed and compared, and never answers.
    Shadow {
        /// The live model that it is compared with.
        of: String,
        /// Percent of that model's requests.
        percent: u8,
    },
}

impl ModelSettings {
    /// The entry as it would stand in a file that lies anywhere.
    pub(super) fn to_toml(&self) -> String {
        let value = |text: &str| toml::Value::from(text);
        let mut text = format!("\n[[models]]\nname = {}\n", value(&self.name));
        text += &format!("bundle = {}\n", value(&self.bundle.absolute().to_string()));
        if let Some(digest) = &self.digest {
            text += &format!("digest = {}\n", value(digest));
        }
        text + &match &self.role {
            Role::Live { share } => format!("share = {share}\n"),
            Role::Shadow { of, percent } => format!("shadow_of = {}\nshadow_percent = {percent}\n", value(of)),
        }
    }

    fn share(&self) -> Option<u8> {
        match self.role {
            Role::Live { share } => Some(share),
            Role::Shadow { .. } => None,
        }
    }
}

type Entry = Result<BTreeMap<String, Value>, Value>;

/// Reads and checks all entries. Relative bundle folders start from `folder`.
pub(super) fn read(entries: &[Entry], folder: &Path, faults: &mut Vec<Fault>) -> Vec<ModelSettings> {
    if entries.is_empty() {
        let reason = "no model is configured, add at least one [[models]] with name and bundle".to_owned();
        faults.push(Fault { key: "models".to_owned(), reason });
    }
    let is_live = |entry: &&Entry| !entry.as_ref().is_ok_and(|entry| entry.contains_key("shadow_of"));
    let n_live = entries.iter().filter(is_live).count();
    let mut models = Vec::with_capacity(entries.len());
    for (i, entry) in entries.iter().enumerate() {
        let mut reader = ModelReader { prefix: format!("models[{i}]"), entry: entry.as_ref().ok(), faults };
        models.push(reader.read(folder, n_live));
    }
    check_together(&models, faults);
    models
}

fn check_together(models: &[ModelSettings], faults: &mut Vec<Fault>) {
    let mut names = HashSet::new();
    for (i, model) in models.iter().enumerate().filter(|(_, model)| !model.name.is_empty()) {
        if !names.insert(&model.name) {
            let reason = format!("{:?} is taken by another model", model.name);
            faults.push(Fault { key: format!("models[{i}].name"), reason });
        }
    }
    let answers = |name: &String| models.iter().any(|model| model.name == *name && model.share().is_some());
    for (i, model) in models.iter().enumerate() {
        if let Role::Shadow { of, .. } = &model.role
            && !answers(of)
        {
            let reason = format!("{of:?} is no model that answers");
            faults.push(Fault { key: format!("models[{i}].shadow_of"), reason });
        }
    }
    let total: u32 = models.iter().filter_map(ModelSettings::share).map(u32::from).sum();
    if faults.is_empty() && total != 100 {
        faults.push(Fault {
            key: "models.share".to_owned(),
            reason: format!("the shares add up to {total}, not to 100"),
        });
    }
}

/// Reads one entry.
struct ModelReader<'a> {
    prefix: String,
    entry: Option<&'a BTreeMap<String, Value>>,
    faults: &'a mut Vec<Fault>,
}

impl ModelReader<'_> {
    fn read(&mut self, folder: &Path, n_live: usize) -> ModelSettings {
        let is_unknown =
            |name: &&String| !MODEL_KEYS.iter().any(|(known, _)| known.strip_prefix("models.") == Some(name));
        let names = self.entry.into_iter().flat_map(BTreeMap::keys);
        names.filter(is_unknown).for_each(|name| self.fault(name, "unknown key"));
        let name = self.required("name");
        let bundle = self.required("bundle");
        let bundle = Source::parse(&bundle, folder).unwrap_or_else(|error| {
            self.fault("bundle", &error.to_string());
            Source::Folder(folder.to_path_buf())
        });
        ModelSettings { name, bundle, digest: self.digest(), role: self.role(n_live) }
    }

    fn fault(&mut self, name: &str, reason: &str) {
        self.faults.push(Fault { key: format!("{}.{name}", self.prefix), reason: reason.to_owned() });
    }

    fn text(&self, name: &str) -> Option<Result<String, String>> {
        self.entry?.get(name).map(scalar)
    }

    fn required(&mut self, name: &str) -> String {
        match self.text(name) {
            Some(Ok(text)) if !text.is_empty() => text,
            _ => {
                self.fault(name, "is missing, it must be a text that is not empty");
                String::new()
            }
        }
    }

    fn digest(&mut self) -> Option<String> {
        let text = match self.text("digest")? {
            Ok(text) | Err(text) => text.to_lowercase(),
        };
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            self.fault("digest", &format!("{text:?} is not a SHA-256 of 64 hex digits"));
        }
        Some(text)
    }

    fn role(&mut self, n_live: usize) -> Role {
        let Some(of) = self.text("shadow_of") else {
            if self.text("shadow_percent").is_some() {
                self.fault("shadow_percent", "needs shadow_of");
            }
            return Role::Live { share: self.share(n_live) };
        };
        if self.text("share").is_some() {
            self.fault("share", "a shadow answers nobody, so it has no share");
        }
        let (Ok(of) | Err(of)) = of;
        Role::Shadow { of, percent: self.percent("shadow_percent", 1).unwrap_or(100) }
    }

    fn share(&mut self, n_live: usize) -> u8 {
        match self.percent("share", 0) {
            Some(share) => share,
            None if n_live == 1 => 100,
            None => {
                self.fault("share", "\"missing\" is not a whole number of percent from 0 to 100");
                0
            }
        }
    }

    /// None where it is absent.
    fn percent(&mut self, name: &str, low: u8) -> Option<u8> {
        let (Ok(text) | Err(text)) = self.text(name)?;
        Some(text.parse().ok().filter(|percent| (low..=100).contains(percent)).unwrap_or_else(|| {
            self.fault(name, &format!("{text:?} is not a whole number of percent from {low} to 100"));
            0
        }))
    }
}
