//! The encoder's own tokenizer: a prompt in, token ids out.

use std::path::{Path, PathBuf};
use thiserror::Error;
use tokenizers::{TruncationDirection, TruncationParams, TruncationStrategy};

/// Why a tokenizer cannot be loaded, or a text cannot be tokenized.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file is missing or not a tokenizer.
    #[error("{} cannot be loaded: {source}", path.display())]
    Load {
        /// The path of `tokenizer.json`.
        path: PathBuf,
        /// The cause.
        source: tokenizers::Error,
    },
    /// The tokenizer failed on a text.
    #[error("a text cannot be tokenized: {0}")]
    Encode(tokenizers::Error),
    /// The text has no tokens. The mean over no tokens would not be a number.
    #[error("a text has no tokens")]
    Empty,
}

/// A Hugging Face tokenizer that truncates at the bundle's token limit and does not pad: the encoder does.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    max_tokens: usize,
}

impl Tokenizer {
    /// Reads the contents of `tokenizer.json`, whose path is for messages. Its own settings for truncation and padding are
    /// replaced. Special tokens come only from its post-processor, never from a prompt.
    pub fn parse(json: &[u8], path: &Path, max_tokens: usize) -> Result<Self, TokenizerError> {
        let failed = |source| TokenizerError::Load { path: path.to_path_buf(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(failed)?;
        let truncation = TruncationParams {
            direction: TruncationDirection::Right,
            max_length: max_tokens,
            strategy: TruncationStrategy::LongestFirst,
            stride: 0,
        };
        inner.with_truncation(Some(truncation)).map_err(failed)?;
        inner.with_padding(None);
        // A special token's name in an item's text, such as "[SEP]" in a title, is text like any other.
        inner.set_encode_special_tokens(true);
        Ok(Tokenizer { inner, max_tokens })
    }

    /// The token limit at which texts are truncated.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Returns between 1 and `max_tokens` token ids, including special tokens.
    pub fn encode(&self, prompt: &str) -> Result<Vec<i64>, TokenizerError> {
        let encoding = self.inner.encode_fast(prompt, true).map_err(TokenizerError::Encode)?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|id| i64::from(*id)).collect();
        if ids.is_empty() { Err(TokenizerError::Empty) } else { Ok(ids) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_special_token_in_a_text_is_text() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bundle/tokenizer.json");
        let tokenizer = Tokenizer::parse(&std::fs::read(&path).unwrap(), &path, 48).unwrap();
        let special = ["<pad>", "<s>"].map(|name| i64::from(tokenizer.inner.token_to_id(name).unwrap()));
        let ids = tokenizer.encode("<s> a film <pad>").unwrap();
        assert_eq!(ids[0], special[1], "the post-processor's own token is missing");
        assert!(ids[1..].iter().all(|id| !special.contains(id)), "{ids:?}");
        assert_eq!(tokenizer.inner.decode(&[ids[1] as u32, ids[2] as u32, ids[3] as u32], true).unwrap(), "<s>");
    }
}
