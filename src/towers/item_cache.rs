//! What an item embedding is cached under.

use crate::item_text::TextDigest;
use std::fmt;

/// Everything that an embedding depends on beside the text: the encoder and the tower, which is the item tower or the user
/// tower.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TowerDigest(pub [u8; 16]);

impl fmt::Display for TowerDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TowerDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What an item embedding is cached under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ItemKey {
    /// The item tower.
    pub tower: TowerDigest,
    /// The text.
    pub text: TextDigest,
}
