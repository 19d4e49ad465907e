//! `manifest.toml`: the files, dimensions and limits of a bundle.

mod specs;

pub use specs::{
    EncoderSpec, FileSpec, GoldenSpec, GraphSpec, HistorySpec, ItemTextSpec, ItemTowerSpec, Keeps, Order, Part,
    Precision, UserTowerSpec,
};

use crate::{
    domain::{Action, Tolerance},
    towers::user_tower::UserDims,
};
use serde::{Deserialize, de::DeserializeOwned};
use std::path::{Component, Path};
use thiserror::Error;

/// The only manifest format that this server reads.
pub const FORMAT: u32 = 2;
/// The manifest's file name. The manifest lists a digest for every other file; its own SHA-256 is the bundle's digest.
pub const FILE: &str = "manifest.toml";

/// The most tokens that a text may have; no longer one is tokenized.
const MAX_TOKENS: usize = 1 << 20;
/// The widest vector.
const MAX_DIM: usize = 1 << 14;
/// As many history items as `limits.max_history` may allow a request.
const MAX_HISTORY: usize = 100_000;
/// The most values of a history, 256 MB. The warm-up of each thread and each request hold as many.
const MAX_HISTORY_VALUES: usize = 1 << 26;

/// The widest tolerance of an encoder's vectors. A vector further away is another vector.
const MAX_ABSOLUTE: f64 = 0.1;
const MIN_COSINE: f64 = 0.98;

/// Why a manifest is invalid; each message is one line.
#[derive(Debug, Clone, PartialEq, Error)]
#[expect(missing_docs, reason = "the messages say it all")]
pub enum ManifestError {
    #[error("line {line}: {message}")]
    Syntax { line: usize, message: String },
    #[error(
        "format is {0}, this server reads format {FORMAT}: `python -m learn upgrade BUNDLE --out NEW` in models/ turns format 1 into it"
    )]
    Format(u32),
    #[error("{0:?} is used but not listed under [[files]]")]
    NotListed(String),
    #[error("{path:?} is listed as part {listed}, it is used as {used}")]
    WrongPart { path: String, listed: Part, used: Part },
    #[error("file path {0:?} leaves the bundle's folder")]
    OutsideFolder(String),
    #[error("{path:?} has the sha256 {sha256:?}, which is not 64 characters of lower-case hex")]
    FileDigest { path: String, sha256: String },
    #[error("{0:?} is listed twice, or is the manifest itself")]
    ListedTwice(String),
    #[error("{name} is {n}, it must be from 1 to {max}")]
    OutOfBound { name: &'static str, n: usize, max: usize },
    #[error(
        "user_tower.max_history times item_tower.adapted_dim is {0}, it must be at most {MAX_HISTORY_VALUES}: the history of one \
         request would be too large"
    )]
    HistorySize(usize),
    #[error("history.actions names {0} twice, or it is no action that a user tower can be trained with")]
    Action(Action),
    #[error(
        "history.liked_from and history.disliked_to must be numbers, the second less than the first and not without it"
    )]
    Thresholds,
    #[error("encoder.tolerance.{name} is {value}, it must be from {min} and below {max}")]
    Tolerance { name: &'static str, value: f64, min: f64, max: f64 },
    #[error(
        "{graph} has {n_inputs} inputs and {n_outputs} outputs, it must have {expected_inputs} and {expected_outputs}"
    )]
    PortCount {
        graph: &'static str,
        n_inputs: usize,
        n_outputs: usize,
        expected_inputs: usize,
        expected_outputs: usize,
    },
}

/// A parsed manifest.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Must be [`FORMAT`].
    pub format: u32,
    /// The bundle's own name; it may be served under another one.
    pub name: String,
    /// Any string.
    pub version: String,
    /// How an item's text becomes token ids.
    pub item_text: ItemTextSpec,
    /// CEG.
    pub encoder: EncoderSpec,
    /// PCH over a history.
    pub user_tower: UserTowerSpec,
    /// PCH over one item.
    pub item_tower: ItemTowerSpec,
    /// Which histories the model was trained on; serving must send the same.
    pub history: HistorySpec,
    /// The CVR MLP; `dim` is the mid-emb's.
    pub cvr: GraphSpec,
    /// The golden vectors.
    pub golden: GoldenSpec,
    /// Every file but the manifest.
    pub files: Vec<FileSpec>,
    /// The bundle's origin (data, commit, metrics), for people to read.
    #[serde(default)]
    pub provenance: toml::Table,
}

impl Manifest {
    /// Parses and validates a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        // First of all, as other formats have other keys.
        let AnyManifest { format } = parse_toml(text)?;
        if format != FORMAT {
            return Err(ManifestError::Format(format));
        }
        let manifest: Manifest = parse_toml(text)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The widths of the user tower's tensors.
    pub fn user_dims(&self) -> UserDims {
        UserDims {
            adapted: self.item_tower.adapted_dim,
            user: self.user_tower.dim,
            reads_actions: !self.history.actions.is_empty(),
        }
    }

    /// The file with this path, if the manifest lists it.
    pub fn file(&self, path: &str) -> Option<&FileSpec> {
        self.files.iter().find(|file| file.path == path)
    }

    fn validate(&self) -> Result<(), ManifestError> {
        self.validate_files()?;
        self.validate_counts()?;
        self.validate_actions()?;
        self.validate_tolerance()
    }

    fn validate_files(&self) -> Result<(), ManifestError> {
        let used_files = [
            (&self.encoder.file, Part::Encoder),
            (&self.encoder.tokenizer, Part::Encoder),
            (&self.user_tower.file, Part::UserTower),
            (&self.item_tower.file, Part::ItemTower),
            (&self.cvr.file, Part::Cvr),
            (&self.golden.file, Part::Golden),
        ];
        for (path, used) in used_files {
            let file = self.file(path).ok_or_else(|| ManifestError::NotListed(path.clone()))?;
            // Cache keys depend on the files of a part: changing a file in the wrong part would not change the key.
            if file.part != used {
                return Err(ManifestError::WrongPart { path: path.clone(), listed: file.part, used });
            }
        }
        match self.files.iter().find(|file| !is_plain(&file.path)) {
            Some(file) => Err(ManifestError::OutsideFolder(file.path.clone())),
            None => Ok(()),
        }
    }

    fn validate_counts(&self) -> Result<(), ManifestError> {
        let counts = [
            ("item_text.max_tokens", self.item_text.max_tokens, MAX_TOKENS),
            ("encoder.dim", self.encoder.dim, MAX_DIM),
            ("user_tower.dim", self.user_tower.dim, MAX_DIM),
            ("user_tower.max_history", self.user_tower.max_history, MAX_HISTORY),
            ("item_tower.dim", self.item_tower.dim, MAX_DIM),
            ("item_tower.adapted_dim", self.item_tower.adapted_dim, MAX_DIM),
            ("cvr.dim", self.cvr.dim, MAX_DIM),
        ];
        if let Some((name, n, max)) = counts.into_iter().find(|(_, n, max)| !(1..=*max).contains(n)) {
            return Err(ManifestError::OutOfBound { name, n, max });
        }
        // Both are bounded, so the product does not overflow.
        let n_history_values = self.user_tower.max_history * self.item_tower.adapted_dim;
        if n_history_values > MAX_HISTORY_VALUES {
            return Err(ManifestError::HistorySize(n_history_values));
        }
        let n_user_tower_inputs = if self.history.actions.is_empty() { 2 } else { 3 };
        let port_counts = [
            ("encoder", &self.encoder.inputs, 2, &self.encoder.outputs, 1),
            ("user_tower", &self.user_tower.inputs, n_user_tower_inputs, &self.user_tower.outputs, 1),
            ("item_tower", &self.item_tower.inputs, 1, &self.item_tower.outputs, 2),
            ("cvr", &self.cvr.inputs, 3, &self.cvr.outputs, 2),
        ];
        for (graph, inputs, expected_inputs, outputs, expected_outputs) in port_counts {
            let (n_inputs, n_outputs) = (inputs.len(), outputs.len());
            if n_inputs != expected_inputs || n_outputs != expected_outputs {
                return Err(ManifestError::PortCount { graph, n_inputs, n_outputs, expected_inputs, expected_outputs });
            }
        }
        Ok(())
    }

    fn validate_tolerance(&self) -> Result<(), ManifestError> {
        let Tolerance { absolute, cosine } = self.encoder.tolerance;
        let bounds = [("absolute", absolute, 0.0, MAX_ABSOLUTE), ("cosine", cosine, MIN_COSINE, 1.0)];
        match bounds.into_iter().find(|(_name, value, min, max)| !(*min..*max).contains(value)) {
            Some((name, value, min, max)) => Err(ManifestError::Tolerance { name, value, min, max }),
            None => Ok(()),
        }
    }

    fn validate_actions(&self) -> Result<(), ManifestError> {
        let actions = &self.history.actions;
        for (i, action) in actions.iter().enumerate() {
            if *action == Action::Unspecified || actions[..i].contains(action) {
                return Err(ManifestError::Action(*action));
            }
        }
        match (self.history.liked_from, self.history.disliked_to) {
            (None, None) => Ok(()),
            (Some(liked_from), None) if liked_from.is_finite() => Ok(()),
            (Some(liked_from), Some(disliked_to))
                if liked_from.is_finite() && disliked_to.is_finite() && disliked_to < liked_from =>
            {
                Ok(())
            }
            _ => Err(ManifestError::Thresholds),
        }
    }
}

/// What every format has.
#[derive(Deserialize)]
struct AnyManifest {
    format: u32,
}

fn parse_toml<T: DeserializeOwned>(text: &str) -> Result<T, ManifestError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(0, |span| line_number(text, span.start));
        ManifestError::Syntax { line, message: error.message().replace('\n', " ") }
    })
}

/// The number of the line, counted from 1, that has the byte at `offset`.
fn line_number(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// Whether the path is relative and stays inside its folder.
fn is_plain(path: &str) -> bool {
    let mut components = Path::new(path).components().peekable();
    components.peek().is_some() && components.all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `max_history` of ten million made the warm-up of a push allocate 15 GB.
    #[test]
    fn sizes_have_bounds() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundle/manifest.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let with = |table: &str, key: &str, value: usize| {
            let (before, rest) = text.split_once(&format!("[{table}]\n")).unwrap();
            let (own, after) = rest.split_once(&format!("{key} = ")).unwrap();
            let (_old, after) = after.split_once('\n').unwrap();
            format!("{before}[{table}]\n{own}{key} = {value}\n{after}")
        };
        for (table, key, max) in [
            ("item_text", "max_tokens", MAX_TOKENS),
            ("encoder", "dim", MAX_DIM),
            ("user_tower", "dim", MAX_DIM),
            ("user_tower", "max_history", MAX_HISTORY),
            ("item_tower", "dim", MAX_DIM),
            ("item_tower", "adapted_dim", MAX_DIM),
            ("cvr", "dim", MAX_DIM),
        ] {
            Manifest::parse(&with(table, key, max)).unwrap();
            for n in [0, max + 1] {
                let error = Manifest::parse(&with(table, key, n)).unwrap_err().to_string();
                assert_eq!(error, format!("{table}.{key} is {n}, it must be from 1 to {max}"));
            }
        }
        let wide = with("item_tower", "adapted_dim", 4096);
        let both = wide.replace("max_history = 8\n", "max_history = 100000\n");
        let error = Manifest::parse(&both).unwrap_err();
        assert_eq!(error, ManifestError::HistorySize(409_600_000));
    }

    #[test]
    fn thresholds_of_values_fit_together() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundle/manifest.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let with =
            |thresholds: &str| Manifest::parse(&text.replace("[history]\n", &format!("[history]\n{thresholds}\n")));
        let history = with("liked_from = 4.0\ndisliked_to = 2.5").unwrap().history;
        assert_eq!((history.liked_from, history.disliked_to), (Some(4.0), Some(2.5)));
        assert_eq!(with("liked_from = 1").unwrap().history.disliked_to, None);
        for wrong in
            ["disliked_to = 2.5", "liked_from = nan", "liked_from = 3.0\ndisliked_to = 3.0", "liked_from = inf"]
        {
            assert_eq!(with(wrong).unwrap_err(), ManifestError::Thresholds, "{wrong}");
        }
        for disliked_to in ["nan", "-inf"] {
            let error = with(&format!("liked_from = 3.0\ndisliked_to = {disliked_to}")).unwrap_err();
            assert_eq!(error, ManifestError::Thresholds);
        }
    }

    /// A key at the start of a line was reported with the number of the line before it.
    #[test]
    fn an_error_names_its_own_line() {
        for (text, expected) in [
            ("format = 2\nname = \"a\"\nnmae = \"b\"\n", "line 3: unknown field `nmae`"),
            ("format = 2\n\n[encoder]\ndims = 3\n", "line 4: unknown field `dims`"),
            ("format = 2\nversion = 1\n", "line 2: invalid type"),
            ("nmae = 1\n", "line 1: missing field `format`"),
            ("format = 2\nname = \"a\n", "line 2: "),
            ("format = 1\nname = \"a\"\n", "format is 1, this server reads format 2: `python -m learn upgrade BUNDLE"),
            ("format = 3\nnew = 1\n", "format is 3, this server reads format 2"),
        ] {
            let message = Manifest::parse(text).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{text:?}: {message}");
        }
    }
}
