//! The encoder's own tokenizer: a prompt in, token ids out.

use std::path::{Path, PathBuf};
use thiserror::Error;
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

/// `tokenizer.json` cannot be used, or a text cannot be tokenized.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file.
    #[error("{} cannot be loaded: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        source: tokenizers::Error,
    },
    /// The text.
    #[error("tokenizer: {0}")]
    Encode(tokenizers::Error),
    /// A mean over no token is not a number.
    #[error("tokenizer gave no token")]
    Empty,
}

/// A Hugging Face tokenizer that cuts at the bundle's token limit and never pads (the batcher does).
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    max_tokens: usize,
}

impl Tokenizer {
    /// Loads `tokenizer.json`. What the file says of truncation and padding is replaced.
    pub fn load(path: &Path, max_tokens: usize) -> Result<Self, TokenizerError> {
        let failed = |source| TokenizerError::Load { path: path.to_path_buf(), source };
        let mut inner = tokenizers::Tokenizer::from_file(path).map_err(failed)?;
        let truncation = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: max_tokens,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        inner.with_truncation(Some(truncation)).map_err(failed)?;
        inner.with_padding(None);
        Ok(Tokenizer { inner, max_tokens })
    }

    /// Where texts are cut.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Between 1 and `max_tokens` ids, special tokens included.
    pub fn encode(&self, prompt: &str) -> Result<Vec<i64>, TokenizerError> {
        let encoding = self.inner.encode_fast(prompt, true).map_err(TokenizerError::Encode)?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|id| i64::from(*id)).collect();
        if ids.is_empty() { Err(TokenizerError::Empty) } else { Ok(ids) }
    }
}
