//! Item text: how it is kept, its digest and, where it has to be encoded, the encoder's prompt. No I/O, no state.
//!
//! The digest covers the fields, not the rendered prompt: on the hot path, where the vector is cached, no template runs. The
//! template is part of the encoder's digest, so a new template still changes the cache key. Each field is hashed with its
//! length, so that two different texts never feed the same bytes to the hash.

use super::{Digest, TextDigest};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, value::Serde};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use thiserror::Error;

/// The six text fields of an item, as the caller sent them.
///
/// Kept in two allocations, whatever the number of list entries: requests may send pages of thousands of texts, and the cache of
/// known items keeps many more. An entry of a list costs its bytes and four more.
#[derive(Clone, PartialEq, Eq)]
pub struct ItemText {
    /// All fields, one after the other, in the order of [`TextFields`].
    all: Box<str>,
    /// The end of each field and of each list entry in `all`: the four single fields, the keywords, the attributes.
    ends: Box<[u32]>,
    n_keywords: u32,
}

/// The number of fields that are not lists.
const N_SINGLE: usize = 4;

/// The six text fields of an item, each in a variable of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the names say it all")]
pub struct TextFields {
    pub title: String,
    pub category: String,
    pub brand: String,
    /// With its unit, as a reader would see it.
    pub price: String,
    pub keywords: Vec<String>,
    /// What the item offers: guarantees, services, properties.
    pub attributes: Vec<String>,
}

impl ItemText {
    /// A text of the single fields (title, category, brand, price) and the two lists. All together must be shorter than 4 GiB.
    pub fn new<S: AsRef<str>>(single: [&str; N_SINGLE], keywords: &[S], attributes: &[S]) -> Self {
        let n_entries = keywords.len() + attributes.len();
        let lists = || keywords.iter().chain(attributes).map(AsRef::as_ref);
        let n_bytes = single.into_iter().chain(lists()).map(str::len).sum();
        let mut all = String::with_capacity(n_bytes);
        let mut ends = Vec::with_capacity(N_SINGLE + n_entries);
        for part in single.into_iter().chain(lists()) {
            all.push_str(part);
            ends.push(all.len() as u32);
        }
        ItemText { all: all.into(), ends: ends.into(), n_keywords: keywords.len() as u32 }
    }

    /// A text that has only a title.
    pub fn titled(title: &str) -> Self {
        Self::new::<&str>([title, "", "", ""], &[], &[])
    }

    /// What the item is called.
    pub fn title(&self) -> &str {
        self.part(0)
    }

    /// Title, category, brand and price.
    pub fn single_fields(&self) -> [&str; N_SINGLE] {
        std::array::from_fn(|i| self.part(i))
    }

    /// The keywords, in the order in which they were sent.
    pub fn keywords(&self) -> impl ExactSizeIterator<Item = &str> {
        (N_SINGLE..N_SINGLE + self.n_keywords as usize).map(|i| self.part(i))
    }

    /// What the item offers: guarantees, services, properties.
    pub fn attributes(&self) -> impl ExactSizeIterator<Item = &str> {
        (N_SINGLE + self.n_keywords as usize..self.ends.len()).map(|i| self.part(i))
    }

    fn part(&self, i: usize) -> &str {
        let start = if i == 0 { 0 } else { self.ends[i - 1] as usize };
        self.all.get(start..self.ends[i] as usize).unwrap_or_default()
    }

    /// Bytes of all fields, plus one per list entry: even an empty entry costs a separator.
    pub fn n_bytes(&self) -> usize {
        self.all.len() + self.n_entries()
    }

    /// The bytes that it occupies outside this struct.
    pub fn heap_bytes(&self) -> usize {
        self.all.len() + size_of_val(&*self.ends)
    }

    fn n_entries(&self) -> usize {
        self.ends.len() - N_SINGLE
    }
}

impl Default for ItemText {
    fn default() -> Self {
        Self::new::<&str>([""; N_SINGLE], &[], &[])
    }
}

impl From<&TextFields> for ItemText {
    fn from(fields: &TextFields) -> Self {
        let TextFields { title, category, brand, price, keywords, attributes } = fields;
        Self::new([title, category, brand, price], keywords, attributes)
    }
}

impl From<TextFields> for ItemText {
    fn from(fields: TextFields) -> Self {
        Self::from(&fields)
    }
}

impl From<&ItemText> for TextFields {
    fn from(text: &ItemText) -> Self {
        let [title, category, brand, price] = text.single_fields().map(str::to_owned);
        let keywords = text.keywords().map(str::to_owned).collect();
        let attributes = text.attributes().map(str::to_owned).collect();
        TextFields { title, category, brand, price, keywords, attributes }
    }
}

impl fmt::Debug for ItemText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        TextFields::from(self).fmt(f)
    }
}

impl Serialize for ItemText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        TextFields::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for ItemText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        TextFields::deserialize(deserializer).map(Self::from)
    }
}

impl TextDigest {
    /// The digest of `text`.
    pub fn of(text: &ItemText) -> Self {
        let mut hasher = blake3::Hasher::new();
        for field in text.single_fields() {
            hash_str(&mut hasher, field);
        }
        hash_list(&mut hasher, text.keywords());
        hash_list(&mut hasher, text.attributes());
        Digest::from_blake3(&hasher)
    }
}

fn hash_list<'a>(hasher: &mut blake3::Hasher, entries: impl ExactSizeIterator<Item = &'a str>) {
    hasher.update(&(entries.len() as u64).to_le_bytes());
    for entry in entries {
        hash_str(hasher, entry);
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
    /// The fields together exceed `limits.max_text_bytes`, as [`ItemText::n_bytes`] counts them.
    #[error("more than {max} bytes of text")]
    TooLong {
        /// The configured limit.
        max: usize,
    },
}

/// Checks that `text` is not empty and has at most `max_bytes`, as [`ItemText::n_bytes`] counts them.
pub fn check(text: &ItemText, max_bytes: usize) -> Result<(), TextFault> {
    if text.all.is_empty() {
        return Err(TextFault::Empty);
    }
    if text.n_bytes() > max_bytes {
        return Err(TextFault::TooLong { max: max_bytes });
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
pub enum TemplateError {
    /// It is not a template, or names what no text has.
    #[error("item text template: {0:#}")]
    Invalid(minijinja::Error),
    /// Its loops do not end soon enough.
    #[error("item text template: one text takes more than {MAX_STEPS} steps, make its loops shorter")]
    TooManySteps,
}

impl From<minijinja::Error> for TemplateError {
    fn from(error: minijinja::Error) -> Self {
        match error.kind() {
            ErrorKind::OutOfFuel => TemplateError::TooManySteps,
            _ => TemplateError::Invalid(error),
        }
    }
}

/// The most steps that rendering one text may take: instructions of the template, or 64 bytes each that it makes. A text of the
/// default maximum length takes some thousands; the longest one that can be configured, of a million list entries, some
/// millions. Loops within loops over lists of a few hundred entries could take hours.
const MAX_STEPS: u64 = 20_000_000;

const NAME: &str = "item_text";

impl Template {
    /// Compiles `source`. A variable that is not a field of [`ItemText`] is an error in [`Template::render`], not here.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(MAX_STEPS));
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
