//! The list `[[models]]`: which models are loaded, from where, and which requests each one gets.

use super::{
    fault::{Fault, Faults, short},
    key::{Description, Key},
    keys::{MODEL_BUNDLE, MODEL_DIGEST, MODEL_KEYS, MODEL_NAME, MODEL_SHADOW_OF, MODEL_SHADOW_PERCENT, MODEL_SHARE},
    raw::{ModelEntry, scalar},
};
use crate::bundle::store::Source;
use std::{collections::HashSet, path::Path};

/// Each model has threads of its own, and steps in the report of a push.
const MAX_MODELS: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the name says what it is")]
pub struct ModelSettings {
    /// The name that requests, answers and metrics give the model.
    pub name: String,
    pub bundle: Source,
    /// The digest that the bundle must have, in lower-case hex.
    pub digest: Option<String>,
    pub role: Role,
}

/// Which requests a model gets, and whether it answers them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It answers.
    Live {
        /// Its percentage of the requests that name no model.
        share: u8,
    },
    /// It scores requests of a live model; the results are compared and never sent to a caller.
    Shadow {
        /// The name of the live model.
        of: String,
        /// The percentage of the live model's requests.
        percent: u8,
    },
}

impl ModelSettings {
    /// The entry as TOML. It means the same in any file, because a relative path of a bundle becomes absolute.
    pub(super) fn to_toml(&self) -> String {
        let line = |key: &Description, value: &str| key.toml_line(value);
        let mut text = "\n[[models]]\n".to_owned();
        text += &line(&MODEL_NAME.description, &self.name);
        text += &line(&MODEL_BUNDLE.description, &self.bundle.absolute().to_string());
        if let Some(digest) = &self.digest {
            text += &line(&MODEL_DIGEST.description, digest);
        }
        match &self.role {
            Role::Live { share } => text += &line(&MODEL_SHARE.description, &share.to_string()),
            Role::Shadow { of, percent } => {
                text += &line(&MODEL_SHADOW_OF.description, of);
                text += &line(&MODEL_SHADOW_PERCENT.description, &percent.to_string());
            }
        }
        text
    }

    fn share(&self) -> Option<u8> {
        match self.role {
            Role::Live { share } => Some(share),
            Role::Shadow { .. } => None,
        }
    }
}

/// Reads and checks all entries. Relative bundle folders start from `folder`.
pub(super) fn read(entries: &[ModelEntry], folder: &Path, faults: &mut Faults) -> Vec<ModelSettings> {
    if entries.is_empty() {
        faults.push(Fault::new("models", "no model is configured, add at least one [[models]] with name and bundle"));
    }
    if entries.len() > MAX_MODELS {
        faults.push(Fault::new(
            "models",
            format!("{} models are configured, at most {MAX_MODELS} can be", entries.len()),
        ));
        return Vec::new();
    }
    let is_live = |entry: &&ModelEntry| !entry.contains_key(MODEL_SHADOW_OF.description.last_part());
    let n_live = entries.iter().filter(is_live).count();
    let mut models = Vec::with_capacity(entries.len());
    for (i, entry) in entries.iter().enumerate() {
        let mut reader = EntryReader { path: format!("models[{i}]"), entry, faults };
        models.push(reader.read(folder, n_live));
    }
    check_names(&models, faults);
    check_shadows(&models, faults);
    // After another fault, a share may be a placeholder, so the sum would mean nothing.
    if faults.is_empty() {
        check_shares(&models, faults);
    }
    models
}

fn check_names(models: &[ModelSettings], faults: &mut Faults) {
    let mut names = HashSet::new();
    for (i, model) in models.iter().enumerate() {
        // A missing name was reported already.
        if !model.name.is_empty() && !names.insert(&model.name) {
            let reason = format!("{:?} is taken by another model", short(&model.name));
            faults.push(Fault::new(format!("models[{i}].name"), reason));
        }
    }
}

fn check_shadows(models: &[ModelSettings], faults: &mut Faults) {
    let is_live = |name: &str| models.iter().any(|model| model.name == name && model.share().is_some());
    for (i, model) in models.iter().enumerate() {
        if let Role::Shadow { of, .. } = &model.role
            && !of.is_empty()
            && !is_live(of)
        {
            let reason = format!("{:?} is not the name of a model that answers", short(of));
            faults.push(Fault::new(format!("models[{i}].shadow_of"), reason));
        }
    }
}

fn check_shares(models: &[ModelSettings], faults: &mut Faults) {
    let total: u32 = models.iter().filter_map(ModelSettings::share).map(u32::from).sum();
    if total != 100 {
        faults.push(Fault::new(MODEL_SHARE.description.name, format!("the shares add up to {total}, not to 100")));
    }
}

/// Reads one entry.
struct EntryReader<'a> {
    /// What stands before the key in a fault: `models[0]`.
    path: String,
    entry: &'a ModelEntry,
    faults: &'a mut Faults,
}

impl EntryReader<'_> {
    fn read(&mut self, folder: &Path, n_live: usize) -> ModelSettings {
        self.check_keys();
        ModelSettings {
            name: self.required(&MODEL_NAME).unwrap_or_default(),
            bundle: self.bundle(folder),
            digest: self.optional(&MODEL_DIGEST),
            role: self.role(n_live),
        }
    }

    fn check_keys(&mut self) {
        for name in self.entry.keys() {
            if !MODEL_KEYS.iter().any(|key| key.last_part() == name) {
                self.faults.push(Fault::new(format!("{}.{name}", self.path), "unknown key"));
            }
        }
    }

    fn bundle(&mut self, folder: &Path) -> Source {
        let unknown = Source::Folder(folder.to_path_buf());
        let Some(text) = self.required(&MODEL_BUNDLE) else { return unknown };
        match Source::parse(&text, folder) {
            Ok(source) => source,
            Err(reason) => {
                self.fault(&MODEL_BUNDLE.description, reason.to_string());
                unknown
            }
        }
    }

    fn role(&mut self, n_live: usize) -> Role {
        if !self.has(&MODEL_SHADOW_OF) {
            if self.has(&MODEL_SHADOW_PERCENT) {
                self.fault(&MODEL_SHADOW_PERCENT.description, "needs shadow_of");
            }
            return Role::Live { share: self.share(n_live) };
        }
        if self.has(&MODEL_SHARE) {
            self.fault(&MODEL_SHARE.description, "a shadow answers no request, so it has no share");
        }
        let percent = self.optional(&MODEL_SHADOW_PERCENT).unwrap_or(100);
        Role::Shadow { of: self.optional(&MODEL_SHADOW_OF).unwrap_or_default(), percent }
    }

    fn share(&mut self, n_live: usize) -> u8 {
        if self.has(&MODEL_SHARE) {
            return self.optional(&MODEL_SHARE).unwrap_or_default();
        }
        if n_live > 1 {
            self.missing(&MODEL_SHARE.description);
        }
        100
    }

    fn has<T>(&self, key: &Key<T>) -> bool {
        self.entry.contains_key(key.description.last_part())
    }

    /// None if the key is absent. A value outside the bound is recorded as a fault and also gives none.
    fn optional<T>(&mut self, key: &Key<T>) -> Option<T> {
        let written = self.entry.get(key.description.last_part())?;
        let value = scalar(written).and_then(|text| key.parse(&text));
        if value.is_none() {
            let name = self.full_name(&key.description);
            self.faults.push(Fault::out_of_bound(name, &written.to_string(), &key.description.bound));
        }
        value
    }

    /// None if the key is absent or its value is outside the bound; both are recorded as faults. The fault does not repeat
    /// the value, because the URL of a bundle may contain a password.
    fn required(&mut self, key: &Key<String>) -> Option<String> {
        let Some(written) = self.entry.get(key.description.last_part()) else {
            self.missing(&key.description);
            return None;
        };
        let value = scalar(written).and_then(|text| key.parse(&text));
        if value.is_none() {
            self.fault(&key.description, format!("must be {}", key.description.bound));
        }
        value
    }

    fn missing(&mut self, key: &Description) {
        self.fault(key, format!("is missing, it must be {}", key.bound));
    }

    fn fault(&mut self, key: &Description, reason: impl Into<String>) {
        self.faults.push(Fault::new(self.full_name(key), reason));
    }

    /// `models[0].share` for `models.share`.
    fn full_name(&self, key: &Description) -> String {
        format!("{}.{}", self.path, key.last_part())
    }
}
