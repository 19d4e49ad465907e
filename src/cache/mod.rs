//! The caches of the process: embeddings by everything they depend on, and item texts by id.
//!
//! [`Caches`] holds all four and is shared by requests, operators' calls and snapshots. [`bounded`] is the implementation of
//! three of them: [`vectors`] keeps content embeddings and item records, [`known_items`] keeps the texts. [`users`] keeps user
//! embeddings, which expire. [`snapshot`] writes the caches to files and reads them back.
//!
//! Not here: computing a missing entry (`content`, `towers`) and deciding when to compute it (`pipeline`).

pub mod bounded;
pub mod known_items;
pub mod snapshot;
pub mod users;
pub mod vectors;

use crate::{
    domain::{ContentKey, ItemKey},
    telemetry::events,
};
use known_items::KnownItems;
use users::UserCache;
use vectors::VectorCache;

/// The limits of the caches.
#[derive(Debug, Clone, Copy)]
pub struct CacheLimits {
    /// Bytes of content embeddings.
    pub content_bytes: u64,
    /// Bytes of item records.
    pub item_bytes: u64,
    /// Bytes of user embeddings.
    pub user_bytes: u64,
    /// Bytes of remembered texts.
    pub known_items_bytes: u64,
    /// Bytes of a single text; a longer text is invalid and not remembered.
    pub max_text_bytes: usize,
}

/// All caches of the process.
#[derive(Debug)]
pub struct Caches {
    /// Content embeddings, by encoder and text.
    pub contents: VectorCache<ContentKey>,
    /// Item records, by item tower and text.
    pub items: VectorCache<ItemKey>,
    /// User embeddings, by user tower and history.
    pub users: UserCache,
    /// Texts by item id.
    pub known_items: KnownItems,
}

/// How full a cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The cache's name.
    pub cache: &'static str,
    /// How many entries it has.
    pub n_entries: u64,
    /// Their bytes, as the limit counts them: payload, key and bookkeeping.
    pub n_bytes: u64,
    /// The limit.
    pub max_bytes: u64,
}

/// One of the caches, as operators name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheName {
    /// Content embeddings.
    Content,
    /// Item records.
    Item,
    /// User embeddings.
    User,
    /// Texts by item id.
    KnownItems,
}

impl CacheName {
    /// Every cache.
    pub const ALL: [CacheName; 4] = [CacheName::Content, CacheName::Item, CacheName::User, CacheName::KnownItems];

    /// The name that metrics, tables and operators' calls use.
    pub const fn as_str(self) -> &'static str {
        match self {
            CacheName::Content => "content",
            CacheName::Item => "item",
            CacheName::User => "user",
            CacheName::KnownItems => "known_items",
        }
    }

    /// The cache with this name.
    pub fn parse(name: &str) -> Option<Self> {
        CacheName::ALL.into_iter().find(|cache| cache.as_str() == name)
    }
}

impl Caches {
    /// Empty caches.
    pub fn new(limits: CacheLimits) -> Self {
        Caches {
            contents: VectorCache::new(CacheName::Content, limits.content_bytes),
            items: VectorCache::new(CacheName::Item, limits.item_bytes),
            users: UserCache::new(limits.user_bytes),
            known_items: KnownItems::new(limits.known_items_bytes, limits.max_text_bytes),
        }
    }

    /// How full each cache is, in the order of [`CacheName::ALL`]. Updates the metrics.
    pub fn measure(&self) -> [Usage; 4] {
        let usages = [self.contents.measure(), self.items.measure(), self.users.measure(), self.known_items.measure()];
        for usage in usages {
            events::cache_measured(usage.cache, usage.n_entries, usage.n_bytes);
        }
        usages
    }

    /// Empties one cache and returns how many entries it had.
    pub fn flush(&self, cache: CacheName) -> u64 {
        match cache {
            CacheName::Content => self.contents.flush(),
            CacheName::Item => self.items.flush(),
            CacheName::User => self.users.flush(),
            CacheName::KnownItems => self.known_items.flush(),
        }
    }

    /// Empties all caches and returns how many entries they had.
    pub fn flush_all(&self) -> u64 {
        CacheName::ALL.into_iter().map(|cache| self.flush(cache)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cache_is_found_by_its_name_and_measured_under_it() {
        let limits = CacheLimits {
            content_bytes: 1 << 20,
            item_bytes: 1 << 20,
            user_bytes: 1 << 20,
            known_items_bytes: 1 << 20,
            max_text_bytes: 100,
        };
        let usages = Caches::new(limits).measure();
        for (name, usage) in CacheName::ALL.into_iter().zip(usages) {
            assert_eq!(usage.cache, name.as_str());
            assert_eq!(CacheName::parse(name.as_str()), Some(name));
        }
        assert_eq!(CacheName::parse("contents"), None);
    }
}
