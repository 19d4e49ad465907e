//! Text by item id: text sent once is remembered, so that later requests may send ids alone.
//!
//! Bounded in bytes; the newest text of an id wins. What an id that fell out costs is one UNKNOWN_ITEM row, upon which the
//! caller sends the text again.

use crate::{
    bounded_cache::{Bound, BoundedCache, Contents},
    content::KnownItem,
    domain::{Item, RowStatus},
    item_text::{self, TextDigest},
    telemetry::events::{self, Lookups},
};
use std::{mem::size_of, sync::Arc};

/// What metrics call it.
pub const NAME: &str = "known_items";
/// What an entry costs beside its letters: its places in the cache, and the text's own six fields on the heap. Measured by
/// `cargo bench --bench cache_memory`.
const ENTRY_OVERHEAD: usize = 330;
/// An entry of a few words; only the number of shards depends on it.
const USUAL_BYTES: u64 = 480;

/// The texts of the items seen so far.
#[derive(Debug)]
pub struct KnownItems {
    cache: BoundedCache<Box<str>, KnownItem>,
    max_text_bytes: usize,
}

impl KnownItems {
    /// Nothing known. Texts of more than `max_text_bytes` are refused.
    pub fn new(max_bytes: u64, max_text_bytes: usize) -> Self {
        let bound = Bound::<Box<str>, KnownItem> {
            max_bytes,
            weigh: |id, item| entry_bytes(id, item),
            usual_bytes: USUAL_BYTES,
        };
        let cache = BoundedCache::new(NAME, bound);
        KnownItems { cache, max_text_bytes }
    }

    /// The text of each item, sent now or known from before; else the row's status.
    pub fn resolve(&self, items: Vec<Item>) -> Vec<Result<KnownItem, RowStatus>> {
        let mut lookups = Lookups::default();
        let resolved = items.into_iter().map(|item| self.resolve_one(item, &mut lookups)).collect();
        events::cache_looked_up(NAME, lookups);
        resolved
    }

    fn resolve_one(&self, item: Item, lookups: &mut Lookups) -> Result<KnownItem, RowStatus> {
        let Some(text) = item.text else {
            let known = self.cache.get(item.id.as_str());
            *if known.is_some() { &mut lookups.n_hits } else { &mut lookups.n_misses } += 1;
            return known.ok_or(RowStatus::UnknownItem);
        };
        item_text::check(&text, self.max_text_bytes).map_err(|_fault| RowStatus::InvalidItem)?;
        let digest = TextDigest::of(&text);
        if let Some(known) = self.cache.get(item.id.as_str()).filter(|known| known.digest == digest) {
            return Ok(known);
        }
        let known = KnownItem { digest, text: Arc::new(text) };
        self.cache.insert(item.id.into(), known.clone());
        Ok(known)
    }

    /// Entries, bytes and the bound.
    pub fn measure(&self) -> Contents {
        self.cache.measure()
    }

    /// Forgets everything; returns how many items were known.
    pub fn flush(&self) -> u64 {
        self.cache.flush()
    }
}

fn entry_bytes(id: &str, item: &KnownItem) -> u64 {
    let text = &item.text;
    let fields = text.title.len() + text.category.len() + text.brand.len() + text.price.len();
    let words = text.keywords.iter().chain(&text.attributes).map(|word| word.len() + size_of::<String>());
    (id.len() + fields + words.sum::<usize>() + ENTRY_OVERHEAD) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ItemText;

    fn item(id: &str, title: Option<&str>) -> Item {
        let text = title.map(|title| ItemText { title: title.to_owned(), ..ItemText::default() });
        Item { id: id.to_owned(), text }
    }

    fn titles(resolved: Vec<Result<KnownItem, RowStatus>>) -> Vec<Result<String, RowStatus>> {
        resolved.into_iter().map(|r| r.map(|known| known.text.title.clone())).collect()
    }

    #[test]
    fn the_newest_text_of_an_id_wins() {
        let known = KnownItems::new(1 << 20, 100);
        let first = titles(known.resolve(vec![item("a", None), item("a", Some("old")), item("a", None)]));
        assert_eq!(first, [Err(RowStatus::UnknownItem), Ok("old".into()), Ok("old".into())]);
        let second = titles(known.resolve(vec![item("a", Some("new")), item("a", None), item("b", None)]));
        assert_eq!(second, [Ok("new".into()), Ok("new".into()), Err(RowStatus::UnknownItem)]);
    }

    #[test]
    fn a_new_item_is_remembered_even_where_the_memory_is_full() {
        let known = KnownItems::new(20 * 1024, 100);
        for i in 0..1000 {
            let id = format!("item-{i}");
            assert!(known.resolve(vec![item(&id, Some("text"))])[0].is_ok());
            known.measure();
            assert!(known.resolve(vec![item(&id, None)])[0].is_ok(), "{id} was forgotten at once");
        }
        let measured = known.measure();
        assert!(measured.n_entries < 100 && measured.n_bytes <= measured.max_bytes, "{measured:?}");
    }

    #[test]
    fn text_that_cannot_be_used_does_not_replace_what_is_known() {
        let known = KnownItems::new(1 << 20, 5);
        let long = item("a", Some("too long"));
        let resolved =
            titles(known.resolve(vec![item("a", Some("short")), long, item("a", Some("")), item("a", None)]));
        let invalid = Err(RowStatus::InvalidItem);
        assert_eq!(resolved, [Ok("short".into()), invalid.clone(), invalid, Ok("short".into())]);
    }
}
