//! Identities: what vectors and texts are cached under.
//!
//! A vector is cached under a digest of everything it depends on, so an entry is never stale.

use super::{Digest, ItemText};
use std::sync::Arc;

/// Marks the digest of an item's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Text {}

/// Marks the digest of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Encoder {}

/// Marks the digest of a tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tower {}

/// Marks the digest of a history under a user tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum History {}

/// Marks the keyed hash of an item's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ItemId {}

/// BLAKE3 over the six fields of an item's text: see [`super::item_text`].
pub type TextDigest = Digest<Text>;

/// Everything that a content embedding depends on besides the text: graph, weights, tokenizer, template, token limit.
pub type EncoderDigest = Digest<Encoder>;

/// Everything that an item or user embedding depends on besides the texts: the tower (which of the two is meant is clear from
/// where it is used) and the encoder.
pub type TowerDigest = Digest<Tower>;

/// Everything that a user embedding depends on: the user tower, and the history's texts in their order.
pub type UserKey = Digest<History>;

/// A keyed hash of an item's id, the same only within one process or those that restore its snapshots.
pub type IdKey = Digest<ItemId>;

/// What an item's vector is cached under: the part of a model that computed it (`Part` is [`Encoder`] or [`Tower`]), and the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EmbeddingKey<Part> {
    /// The encoder or the tower.
    pub part: Digest<Part>,
    /// The item's text.
    pub text: TextDigest,
}

/// What a content embedding is cached under.
pub type ContentKey = EmbeddingKey<Encoder>;

/// What an item embedding is cached under.
pub type ItemKey = EmbeddingKey<Tower>;

/// An item whose text is known. The text itself is fetched only where it has to be encoded.
#[derive(Debug, Clone)]
pub struct KnownItem {
    /// What its text is remembered under.
    pub id: IdKey,
    /// The digest of its text.
    pub digest: TextDigest,
    /// The text, if it came with this request and was new.
    pub text: Option<Arc<ItemText>>,
}

/// Who waits for a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A request with a deadline.
    Request,
    /// Nobody yet: the caches are filled ahead of traffic.
    WarmUp,
}
