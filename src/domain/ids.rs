//! Known items and their priority, and the keys under which vectors and texts are cached.
//!
//! A vector's key is a digest of everything the vector depends on, so an entry is never stale.

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

/// Marks the digest of a user tower together with a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum History {}

/// Marks the keyed hash of an item's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ItemId {}

/// BLAKE3 over the six fields of an item's text; see [`super::item_text`].
pub type TextDigest = Digest<Text>;

/// Covers everything that a content embedding depends on besides the text: graph, weights, tokenizer, template, token limit.
pub type EncoderDigest = Digest<Encoder>;

/// Covers everything that an item record or a user embedding depends on besides the items' texts: the towers and the encoder. The
/// context tells which of the two is meant.
pub type TowerDigest = Digest<Tower>;

/// Covers everything that a user embedding depends on: the towers, and the history's texts and actions in their order.
pub type UserKey = Digest<History>;

/// A keyed hash of an item's id. Comparable only within one process and those that restored its snapshots.
pub type IdKey = Digest<ItemId>;

/// The cache key of an item's vector: the part of a model that computed it (`Part` is [`Encoder`] or [`Tower`]) and the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EmbeddingKey<Part> {
    /// The encoder or the tower.
    pub part: Digest<Part>,
    /// The item's text.
    pub text: TextDigest,
}

/// The cache key of a content embedding.
pub type ContentKey = EmbeddingKey<Encoder>;

/// The cache key of an item record.
pub type ItemKey = EmbeddingKey<Tower>;

/// An item whose text is known. The text itself is fetched only if it has to be encoded.
#[derive(Debug, Clone)]
pub struct KnownItem {
    /// The key under which its text is remembered.
    pub id: IdKey,
    /// The digest of its text.
    pub digest: TextDigest,
    /// The text, if it came with this request and was not known before.
    pub text: Option<Arc<ItemText>>,
}

/// Who waits for a result. `Request` sorts first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A request with a deadline.
    Request,
    /// Nobody yet: the caches are being filled ahead of traffic.
    WarmUp,
}
