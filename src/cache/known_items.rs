//! Text by item id: a text that was sent once is remembered, so that later requests may send only the id.
//!
//! The cache has a limit in bytes, and the newest text of an id wins. A forgotten id costs one UNKNOWN_ITEM row, after which the
//! caller sends the text again. A hot request needs only the digests, so its texts are not copied.
//!
//! Ids are kept as 128 bits of SipHash under a secret key: as unlikely to collide as text digests, of the same size whatever the
//! ids look like, and nobody outside can construct a collision. The key is random, or taken over from the process whose items
//! are restored; it changes only while no item is known. A request reads the key once. If the key changes during the request,
//! its items are unknown or remembered under hashes that nobody will look up, but never confused with other items.

use super::{CacheName, Usage, bounded::BoundedCache};
use crate::{
    domain::{
        IdKey, Item, ItemText, KnownItem, Priority, RowStatus, TextDigest,
        item_text::{self, TextFault},
    },
    telemetry::events::{self, Lookups},
};
use siphasher::sip128::SipHasher13;
use std::{
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{Arc, PoisonError, RwLock},
};
use thiserror::Error;

/// The bytes of an entry besides its text: its slot in the cache and three allocations. Measured with
/// `benches/micro/cache_memory.rs`.
const ENTRY_OVERHEAD: usize = 230;

/// Remembers the texts of items by id.
#[derive(Debug)]
pub struct KnownItems {
    cache: BoundedCache<IdKey, Known>,
    /// Held only to copy the key, or to change it after checking that no item is known.
    hash_key: RwLock<HashKey>,
    max_text_bytes: usize,
}

/// The key under which ids are hashed. Whoever knows it can construct colliding ids, so it is saved with the items but never
/// logged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u64; 2]);

impl HashKey {
    fn random() -> Self {
        let random = || RandomState::new().hash_one(0);
        HashKey([random(), random()])
    }

    fn hash(self, id: &str) -> IdKey {
        let hash = SipHasher13::new_with_keys(self.0[0], self.0[1]).hash(id.as_bytes());
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&hash.h1.to_le_bytes());
        bytes[8..].copy_from_slice(&hash.h2.to_le_bytes());
        IdKey::from_bytes(bytes)
    }
}

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(..)")
    }
}

/// Items are already known under another hash key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("items are already known, and their ids are hashed under another key")]
pub struct HashKeyMismatch;

#[derive(Debug)]
struct Known {
    digest: TextDigest,
    text: Arc<ItemText>,
}

/// An item of a message, without what borrows from the message: its id's hash and, if the text was sent, the text with its digest.
#[derive(Debug)]
pub struct HashedItem {
    id: IdKey,
    text: Option<Result<(TextDigest, ItemText), TextFault>>,
}

/// A list of items whose texts are remembered.
struct PartlyResolved {
    /// One per item; UNKNOWN_ITEM for those that came without text.
    rows: Vec<Result<KnownItem, RowStatus>>,
    /// The items that came without text.
    ids: Vec<IdKey>,
    /// Their places in `rows`.
    places: Vec<usize>,
}

impl KnownItems {
    /// An empty cache. A text of more than `max_text_bytes` is not restored.
    pub fn new(max_bytes: u64, max_text_bytes: usize) -> Self {
        let cache = BoundedCache::new(CacheName::KnownItems, max_bytes, |_id, known: &Known| entry_bytes(&known.text));
        KnownItems { cache, hash_key: RwLock::new(HashKey::random()), max_text_bytes }
    }

    /// Hashes the items of a message. Takes no lock that a request waits for, so it may run on a thread that gives way.
    pub fn hash(&self, items: Vec<Item<'_>>) -> Vec<HashedItem> {
        let hash_key = self.hash_key();
        let mut hashed = Vec::with_capacity(items.len());
        for Item { id, text } in items {
            let text = text.map(|text| text.map(|text| (TextDigest::of(&text), text)));
            hashed.push(HashedItem { id: hash_key.hash(id), text });
        }
        hashed
    }

    /// Hashes and resolves the items of one list. See [`KnownItems::resolve_lists`].
    pub fn resolve(&self, items: Vec<Item<'_>>, priority: Priority) -> Vec<Result<KnownItem, RowStatus>> {
        let [resolved] = self.resolve_lists([self.hash(items)], priority);
        resolved
    }

    /// Resolves each item to the digest of its text, which was sent now or is remembered, or else to the row's status.
    ///
    /// The texts of all lists are remembered before any id is looked up, so that an item whose text stands in one place is known
    /// in all others. With [`Priority::WarmUp`] they skip probation, so that they are still there when they are first
    /// asked for.
    pub fn resolve_lists<const N: usize>(
        &self,
        lists: [Vec<HashedItem>; N],
        priority: Priority,
    ) -> [Vec<Result<KnownItem, RowStatus>>; N] {
        let remembered = lists.map(|items| self.remember_texts(items, priority));
        let mut lookups = Lookups::default();
        let resolved = remembered.map(|list| self.resolve_ids(list, &mut lookups));
        events::cache_looked_up(self.cache.name().as_str(), lookups);
        resolved
    }

    /// Remembers the texts of a list, and leaves the ids that came without text to be resolved.
    fn remember_texts(&self, items: Vec<HashedItem>, priority: Priority) -> PartlyResolved {
        let n = items.len();
        let mut list =
            PartlyResolved { rows: Vec::with_capacity(n), ids: Vec::with_capacity(n), places: Vec::with_capacity(n) };
        for HashedItem { id, text } in items {
            list.rows.push(match text {
                Some(Ok((digest, text))) => Ok(self.remember(id, digest, text, priority)),
                Some(Err(_fault)) => Err(RowStatus::InvalidItem),
                None => {
                    list.ids.push(id);
                    list.places.push(list.rows.len());
                    Err(RowStatus::UnknownItem)
                }
            });
        }
        list
    }

    fn resolve_ids(&self, list: PartlyResolved, lookups: &mut Lookups) -> Vec<Result<KnownItem, RowStatus>> {
        let PartlyResolved { mut rows, ids, places } = list;
        self.cache.read_many(&ids, |i, known| {
            if let Some(known) = known {
                lookups.n_hits += 1;
                rows[places[i]] = Ok(KnownItem { id: ids[i], digest: known.digest, text: None });
            } else {
                lookups.n_misses += 1;
            }
        });
        rows
    }

    fn remember(&self, id: IdKey, digest: TextDigest, text: ItemText, priority: Priority) -> KnownItem {
        if self.cache.read(&id, |known| known.digest) == Some(digest) {
            return KnownItem { id, digest, text: None };
        }
        let text = Arc::new(text);
        let known = Known { digest, text: Arc::clone(&text) };
        match priority {
            Priority::Request => self.cache.insert(id, known),
            Priority::WarmUp => self.cache.insert_ahead(id, known),
        }
        KnownItem { id, digest, text: Some(text) }
    }

    /// All known items with their texts, hottest first.
    pub fn hottest(&self) -> Vec<KnownItem> {
        let ids = self.cache.hottest_keys();
        let mut items = Vec::with_capacity(ids.len());
        self.cache.peek_many(&ids, |i, known| {
            if let Some(Known { digest, text }) = known {
                items.push(KnownItem { id: ids[i], digest: *digest, text: Some(Arc::clone(text)) });
            }
        });
        items
    }

    /// The ids of all known items, hottest first.
    pub fn hottest_ids(&self) -> Vec<IdKey> {
        self.cache.hottest_keys()
    }

    /// The text under an id. Does not count as a use.
    pub fn peek(&self, id: IdKey) -> Option<Arc<ItemText>> {
        let mut found = None;
        self.cache.peek_many(&[id], |_, known| found = known.map(|known| Arc::clone(&known.text)));
        found
    }

    /// The key under which the ids are hashed.
    pub fn hash_key(&self) -> HashKey {
        *self.hash_key.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hashes ids under `key` from now on, so that the items of the process that used it can be restored. Fails if items are
    /// already known under another key.
    pub fn adopt_hash_key(&self, key: HashKey) -> Result<(), HashKeyMismatch> {
        let mut own = self.hash_key.write().unwrap_or_else(PoisonError::into_inner);
        if *own != key && self.cache.measure().n_entries > 0 {
            return Err(HashKeyMismatch);
        }
        *own = key;
        Ok(())
    }

    /// Remembers an item from [`KnownItems::hottest`] ahead of its first reader. `id` must be hashed under the current key.
    pub fn restore(&self, id: IdKey, text: ItemText) -> Result<(), TextFault> {
        item_text::check(&text, self.max_text_bytes)?;
        let known = Known { digest: TextDigest::of(&text), text: Arc::new(text) };
        self.cache.insert_ahead(id, known);
        Ok(())
    }

    /// The text of `item`; `None` if it was forgotten or replaced since the item was resolved.
    pub fn text(&self, item: &KnownItem) -> Option<Arc<ItemText>> {
        if let Some(text) = &item.text {
            return Some(Arc::clone(text));
        }
        let if_same = |known: &Known| (known.digest == item.digest).then(|| Arc::clone(&known.text));
        self.cache.read(&item.id, if_same).flatten()
    }

    /// The number of entries, their bytes and the limit.
    pub fn measure(&self) -> Usage {
        self.cache.measure()
    }

    /// Forgets all items and returns how many were known.
    pub fn flush(&self) -> u64 {
        self.cache.flush()
    }
}

fn entry_bytes(text: &ItemText) -> u64 {
    (text.heap_bytes() + ENTRY_OVERHEAD) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item<'a>(id: &'a str, title: Option<&str>) -> Item<'a> {
        let text = title.map(ItemText::titled);
        let check = |text: ItemText| item_text::check(&text, 5).map(|()| text);
        Item { id, text: text.map(check) }
    }

    fn titles(known: &KnownItems, items: Vec<Item<'_>>) -> Vec<Result<String, RowStatus>> {
        let title =
            |item: KnownItem| known.text(&item).map_or_else(|| "forgotten".to_owned(), |text| text.title().to_owned());
        known.resolve(items, Priority::Request).into_iter().map(|r| r.map(title)).collect()
    }

    #[test]
    fn the_newest_text_of_an_id_wins() {
        let known = KnownItems::new(1 << 20, 100);
        let first = titles(&known, vec![item("a", None), item("a", Some("old")), item("a", None)]);
        assert_eq!(first, [Ok("old".into()), Ok("old".into()), Ok("old".into())], "its place in the list matters");
        let old = known.resolve(vec![item("a", None)], Priority::Request).remove(0).unwrap();
        let second = titles(&known, vec![item("a", Some("new")), item("a", None), item("b", None)]);
        assert_eq!(second, [Ok("new".into()), Ok("new".into()), Err(RowStatus::UnknownItem)]);
        assert!(known.text(&old).is_none(), "an item that was resolved earlier got the text of another");
        assert_eq!(titles(&known, vec![item("a", Some("new"))]), [Ok("new".into())], "the same text was sent again");
    }

    #[test]
    fn a_text_in_one_list_serves_the_same_id_in_another() {
        let known = KnownItems::new(1 << 20, 100);
        let lists = [vec![item("a", None), item("b", Some("2"))], vec![item("a", Some("1")), item("b", None)]];
        let [history, candidates] = known.resolve_lists(lists.map(|items| known.hash(items)), Priority::Request);
        let digests = |rows: Vec<Result<KnownItem, RowStatus>>| rows.into_iter().map(|row| row.unwrap().digest);
        assert!(digests(history).eq(digests(candidates)));
    }

    #[test]
    fn a_new_item_is_remembered_even_if_the_cache_is_full() {
        let known = KnownItems::new(20 * 1024, 100);
        for i in 0..1000 {
            let id = format!("item-{i}");
            assert!(known.resolve(vec![item(&id, Some("text"))], Priority::Request)[0].is_ok());
            known.measure();
            assert!(
                known.resolve(vec![item(&id, None)], Priority::Request)[0].is_ok(),
                "{id} was forgotten immediately"
            );
        }
        let measured = known.measure();
        assert!(measured.n_entries < 100 && measured.n_bytes <= measured.max_bytes, "{measured:?}");
    }

    #[test]
    fn an_invalid_text_does_not_replace_a_known_one() {
        let known = KnownItems::new(1 << 20, 5);
        let long = item("a", Some("too long"));
        let resolved = titles(&known, vec![item("a", Some("short")), long, item("a", Some("")), item("a", None)]);
        let invalid = Err(RowStatus::InvalidItem);
        assert_eq!(resolved, [Ok("short".into()), invalid.clone(), invalid, Ok("short".into())]);
    }

    #[test]
    fn items_of_another_process_are_found_by_id_under_its_key() {
        let old = KnownItems::new(1 << 20, 100);
        titles(&old, vec![item("a", Some("1")), item("b", Some("2")), item("a", None)]);
        let dumped = old.hottest();
        let texts = || dumped.iter().map(|item| ItemText::clone(item.text.as_ref().unwrap()));
        assert_eq!(texts().map(|text| text.title().to_owned()).collect::<Vec<_>>(), ["1", "2"]);

        let new = KnownItems::new(1 << 20, 100);
        assert_ne!(new.hash_key(), old.hash_key());
        new.adopt_hash_key(old.hash_key()).unwrap();
        for (item, text) in dumped.iter().zip(texts()).rev() {
            new.restore(item.id, text).unwrap();
        }
        assert_eq!(titles(&new, vec![item("a", None), item("b", None)]), [Ok("1".into()), Ok("2".into())]);
        assert_eq!(new.hottest()[0].digest, dumped[0].digest);
        assert_eq!(new.restore(dumped[0].id, ItemText::default()), Err(TextFault::Empty));

        assert_eq!(new.adopt_hash_key(old.hash_key()), Ok(()));
        assert_eq!(new.adopt_hash_key(KnownItems::new(0, 0).hash_key()), Err(HashKeyMismatch));
        assert_eq!(format!("{:?}", new.hash_key()), "HashKey(..)");
        assert!(titles(&new, vec![item("a", None)])[0].is_ok(), "a refused key was adopted");
    }
}
