//! Reads keys from what was written, and collects what is wrong with them.

use super::{
    fault::{Fault, Faults},
    key::{Description, Key},
    keys::KEYS,
    raw::{Raw, scalar},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Above this Jaro similarity, an unknown key is assumed to be a misspelling.
const MIN_SIMILARITY: f64 = 0.85;

const MAX_TYPO_BYTES: usize = 64;

pub(super) struct Reader<'a> {
    raw: &'a Raw,
    /// All faults so far, those of unknown keys first.
    pub(super) faults: Faults,
    /// The texts of the keys that were read without a fault, by the keys' names.
    pub(super) texts: BTreeMap<&'static str, String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(raw: &'a Raw) -> Self {
        Reader { raw, faults: unknown_keys(raw), texts: BTreeMap::new() }
    }

    /// The value of `key`, or its default if none was written. A value outside the bound is recorded as a fault, and the default
    /// is returned.
    pub(super) fn get<T>(&mut self, key: &Key<T>) -> T {
        let Description { name, default, bound, .. } = &key.description;
        let Some(written) = self.raw.values.get(*name) else {
            self.texts.insert(name, (*default).to_owned());
            return key.default_value();
        };
        let Some(value) = scalar(written).and_then(|text| key.parse(&text)) else {
            self.faults.push(Fault::out_of_bound(*name, &written.to_string(), bound));
            return key.default_value();
        };
        self.texts.insert(name, written.to_string());
        value
    }

    /// The path that `key` holds, if any; a relative one starts from `folder`.
    pub(super) fn path_in(&mut self, folder: &Path, key: &Key<Option<PathBuf>>) -> Option<PathBuf> {
        self.get(key).map(|path| folder.join(path))
    }
}

fn unknown_keys(raw: &Raw) -> Faults {
    let mut faults = Faults::default();
    for name in raw.values.keys() {
        if KEYS.iter().any(|key| key.name == name) {
            continue;
        }
        // Comparing takes long for many keys or a long one, and nobody misspells a key so.
        let is_typo = !faults.is_full() && name.len() <= MAX_TYPO_BYTES;
        let hint = is_typo
            .then(|| most_similar(name))
            .flatten()
            .map_or_else(String::new, |key| format!(", did you mean {}?", key.name));
        faults.push(Fault::new(name, format!("unknown key{hint}")));
    }
    faults
}

/// The key that was probably meant. The right key in the wrong table counts as similar.
fn most_similar(name: &str) -> Option<&'static Description> {
    let last_part = name.rsplit('.').next().unwrap_or(name);
    let similarity = |key: &Description| {
        let whole = strsim::jaro(key.name, name);
        whole.max(strsim::jaro(key.last_part(), last_part))
    };
    let nearest = KEYS.iter().copied().max_by(|a, b| similarity(a).total_cmp(&similarity(b)))?;
    (similarity(nearest) > MIN_SIMILARITY).then_some(nearest)
}
