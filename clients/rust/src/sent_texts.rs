//! Which texts a replica has been sent, so that later calls send ids alone.
//!
//! It remembers a bounded number of ids, each with a hash of its text: where an item's text has changed it is sent again. A
//! replica may have forgotten an item meanwhile; it says so, and the text is sent again ([`crate::resend`]).

use crate::proto::{Item, ItemText};
use lru::LruCache;
use std::{
    hash::{BuildHasher, RandomState},
    sync::{Mutex, PoisonError},
};

/// The texts that one replica has.
#[derive(Debug)]
pub(crate) struct SentTexts {
    /// The hash of the text by item id. The lock is held for the look-ups of one request and never while waiting.
    by_id: Option<Mutex<LruCache<String, u64, RandomState>>>,
    max_items: usize,
    hasher: RandomState,
}

impl SentTexts {
    /// Remembers at most `max_items`; with 0 every text is sent every time.
    pub(crate) fn new(max_items: usize) -> Self {
        let hasher = RandomState::new();
        // A bounded LruCache would reserve memory for all its entries at once.
        let by_id = (max_items > 0).then(|| Mutex::new(LruCache::unbounded_with_hasher(hasher.clone())));
        SentTexts { by_id, max_items, hasher }
    }

    /// The items as they have to be sent: with their text where the replica has not seen it.
    pub(crate) fn strip(&self, items: &[Item]) -> Vec<Item> {
        let Some(by_id) = &self.by_id else { return items.to_vec() };
        let mut by_id = by_id.lock().unwrap_or_else(PoisonError::into_inner);
        let strip = |item: &Item| {
            let text = item.text.as_ref().filter(|text| by_id.get(&item.id) != Some(&self.hash(text)));
            Item { id: item.id.clone(), text: text.cloned() }
        };
        items.iter().map(strip).collect()
    }

    /// Records that the replica has the texts of these items. Items without a text are ignored.
    pub(crate) fn remember<'a>(&self, items: impl Iterator<Item = &'a Item>) {
        let Some(by_id) = &self.by_id else { return };
        let mut by_id = by_id.lock().unwrap_or_else(PoisonError::into_inner);
        for item in items {
            if let Some(text) = &item.text {
                by_id.put(item.id.clone(), self.hash(text));
                if by_id.len() > self.max_items {
                    by_id.pop_lru();
                }
            }
        }
    }

    /// Records that the replica does not have the texts of these items.
    pub(crate) fn forget<'a>(&self, items: impl Iterator<Item = &'a Item>) {
        let Some(by_id) = &self.by_id else { return };
        let mut by_id = by_id.lock().unwrap_or_else(PoisonError::into_inner);
        for item in items {
            by_id.pop(&item.id);
        }
    }

    /// If two texts of one item had the same hash, the old text would stay in use; with 64 bits that is negligible.
    fn hash(&self, text: &ItemText) -> u64 {
        let ItemText { title, category, brand, price, keywords, attributes } = text;
        self.hasher.hash_one((title, category, brand, price, keywords, attributes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(id: &str, title: &str) -> Item {
        Item { id: id.to_owned(), text: Some(ItemText { title: title.to_owned(), ..ItemText::default() }) }
    }

    fn has_text(items: &[Item]) -> Vec<bool> {
        items.iter().map(|item| item.text.is_some()).collect()
    }

    #[test]
    fn a_text_is_sent_until_it_is_remembered_and_again_when_it_changes_or_is_forgotten() {
        let sent = SentTexts::new(10);
        let items = [item("a", "one"), item("b", "two")];
        assert_eq!(sent.strip(&items), items);
        sent.remember(items.iter());
        assert_eq!(has_text(&sent.strip(&items)), [false, false]);
        assert_eq!(has_text(&sent.strip(&[item("a", "another")])), [true]);
        sent.forget(items[..1].iter());
        assert_eq!(has_text(&sent.strip(&items)), [true, false]);
    }

    #[test]
    fn only_so_many_items_are_remembered_and_zero_is_none() {
        let sent = SentTexts::new(2);
        let items = [item("a", "one"), item("b", "two"), item("c", "three")];
        sent.remember(items.iter());
        assert_eq!(has_text(&sent.strip(&items)), [true, false, false]);
        let all = SentTexts::new(usize::MAX);
        all.remember(items.iter());
        assert_eq!(has_text(&all.strip(&items)), [false, false, false]);
        let none = SentTexts::new(0);
        none.remember(items.iter());
        assert_eq!(none.strip(&items), items);
    }
}
