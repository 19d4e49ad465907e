//! Item text: six fields in, a digest and (where it has to be encoded) a prompt out. Pure.
//!
//! The digest is taken over the fields, not over the rendered prompt: on the hot path, where the vector is cached, no
//! template runs. The template belongs to the encoder's digest, so a new template still is a new cache key. Fields
//! are hashed with their lengths, so that no two different texts share the bytes that are hashed.

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
        Digest::of_blake3(&hasher)
    }
}

fn hash_str(hasher: &mut blake3::Hasher, field: &str) {
    hasher.update(&(field.len() as u64).to_le_bytes());
    hasher.update(field.as_bytes());
}

/// Why a text cannot be used. Costs its own row: `RowStatus::InvalidItem`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum TextFault {
    /// All six fields are empty.
    #[error("all text fields are empty")]
    Empty,
    /// The fields together are over `limits.max_text_bytes`.
    #[error("{n_bytes} bytes of text, at most {max} are taken")]
    TooLong {
        /// Bytes of all fields together.
        n_bytes: usize,
        /// The configured bound.
        max: usize,
    },
}

/// Checks that `text` says something and stays within `max_bytes`, as [`ItemText::n_bytes`] counts them.
pub fn check(text: &ItemText, max_bytes: usize) -> Result<(), TextFault> {
    let n_separators = text.keywords.len() + text.attributes.len();
    match text.n_bytes() {
        n_bytes if n_bytes == n_separators => Err(TextFault::Empty),
        n_bytes if n_bytes > max_bytes => Err(TextFault::TooLong { n_bytes, max: max_bytes }),
        _ => Ok(()),
    }
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
    /// Compiles `source`. A name that the template uses and no field has is an error when it renders.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.add_template_owned(NAME, source.to_owned())?;
        Ok(Template { environment })
    }

    /// The prompt that the encoder reads: the same bytes as Jinja2 gives in training.
    pub fn render(&self, text: &ItemText) -> Result<String, TemplateError> {
        Ok(self.environment.get_template(NAME)?.render(Serde(text))?)
    }
}

#[cfg(test)]
mod tests;
