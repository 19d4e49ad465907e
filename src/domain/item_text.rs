//! Item text: computes its digest and, where it has to be encoded, renders the encoder's prompt. No I/O, no state.
//!
//! The digest covers the fields, not the rendered prompt: on the hot path, where the vector is cached, no template runs. The
//! template is part of the encoder's digest, so a new template still changes the cache key. Each field is hashed with its
//! length, so that two different texts never feed the same bytes to the hash.

use super::{Digest, ItemText, TextDigest};
use minijinja::{Environment, UndefinedBehavior, value::Serde};
use thiserror::Error;

impl TextDigest {
    /// The digest of `text`.
    pub fn of(text: &ItemText) -> Self {
        let mut hasher = blake3::Hasher::new();
        for field in [&text.title, &text.category, &text.brand, &text.price] {
            hash_str(&mut hasher, field);
        }
        for list in [&text.keywords, &text.attributes] {
            hasher.update(&(list.len() as u64).to_le_bytes());
            for entry in list {
                hash_str(&mut hasher, entry);
            }
        }
        Digest::from_blake3(&hasher)
    }
}

fn hash_str(hasher: &mut blake3::Hasher, field: &str) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field.as_bytes());
}

/// Why a text cannot be used. It costs only its own row, as `RowStatus::InvalidItem`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TextFault {
    /// All six fields are empty.
    #[error("all text fields are empty")]
    Empty,
    /// The fields together exceed `limits.max_text_bytes`.
    #[error("{n_bytes} bytes of text, the limit is {max}")]
    TooLong {
        /// Bytes of all fields together, as [`ItemText::n_bytes`] counts them.
        n_bytes: usize,
        /// The configured limit.
        max: usize,
    },
}

/// Checks that `text` is not empty and has at most `max_bytes`, as [`ItemText::n_bytes`] counts them.
pub fn check(text: &ItemText, max_bytes: usize) -> Result<(), TextFault> {
    let n_separators = text.keywords.len() + text.attributes.len();
    let n_bytes = text.n_bytes();
    if n_bytes == n_separators {
        return Err(TextFault::Empty);
    }
    if n_bytes > max_bytes {
        return Err(TextFault::TooLong { n_bytes, max: max_bytes });
    }
    Ok(())
}

/// A bundle's Jinja template, compiled once.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
}

/// The template does not compile or does not render.
#[derive(Debug, Error)]
#[error("item text template: {0:#}")]
pub struct TemplateError(#[from] minijinja::Error);

const NAME: &str = "item_text";

impl Template {
    /// Compiles `source`. A variable that is not a field of [`ItemText`] is an error in [`Template::render`], not here.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Template { environment })
    }

    /// The prompt that the encoder reads, byte for byte what Jinja2 rendered in training.
    pub fn render(&self, text: &ItemText) -> Result<String, TemplateError> {
        Ok(self.environment.get_template(NAME)?.render(Serde(text))?)
    }
}

#[cfg(test)]
mod tests;
