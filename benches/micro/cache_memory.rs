//! The memory of a cached entry beside its payload, measured as resident memory of this process at a million entries.
//!
//!     cd benches && cargo bench --bench cache_memory [-- ENTRIES]
//!
//! Each cache is filled in a process of its own (this program calls itself), so that memory that one left behind does not
//! count for the next. The goal is at most 1.25 x the payload + 100 bytes per entry. "content in moka" shows what content
//! embeddings would take in a cache that counts no bytes itself, so its counted bytes are 0.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a program that measures and prints")]

use midemb::{
    cache::{
        CacheName,
        known_items::KnownItems,
        users::{HistoryHasher, UserCache},
        vectors::VectorCache,
    },
    domain::{ContentKey, EncoderDigest, Item, ItemKey, ItemText, Priority, TextDigest, TowerDigest, Vector},
};
use std::{hint::black_box, process::Command};

const UNBOUNDED: u64 = 1 << 40;

fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn text(i: u64) -> ItemText {
    ItemText::new::<&str>([&format!("a title of usual length, number {i:>9}"), "Drama", "", ""], &[], &[])
}

fn vector(i: u64, dim: usize) -> Vector {
    vec![i as f32; dim].into()
}

/// A full cache.
struct Filled {
    /// Keeps the memory until it is measured.
    cache: Box<dyn std::any::Any>,
    payload_bytes_per_entry: u64,
    /// As the cache's own bound counts them.
    counted_bytes: u64,
}

impl Filled {
    fn new(cache: impl std::any::Any, payload_bytes_per_entry: u64, counted_bytes: u64) -> Self {
        Filled { cache: Box::new(cache), payload_bytes_per_entry, counted_bytes }
    }
}

fn fill(name: &str, n: u64) -> Filled {
    let digests = (0..n).map(|i| TextDigest::of(&ItemText::titled(&i.to_string())));
    match name {
        "item record, 128 dims" => {
            let cache = VectorCache::new(CacheName::Item, UNBOUNDED);
            let key = |text| ItemKey { part: TowerDigest::from_bytes([7; 16]), text };
            digests.zip(0..).for_each(|(text, i)| cache.insert(key(text), vector(i, 128)));
            let counted = cache.measure().n_bytes;
            Filled::new(cache, 512, counted)
        }
        "content, 384 dims" => {
            let cache = VectorCache::new(CacheName::Content, UNBOUNDED);
            let key = |text| ContentKey { part: EncoderDigest::from_bytes([7; 16]), text };
            digests.zip(0..).for_each(|(text, i)| cache.insert(key(text), vector(i, 384)));
            let counted = cache.measure().n_bytes;
            Filled::new(cache, 1536, counted)
        }
        "content in moka" => {
            let cache = moka::sync::Cache::builder().max_capacity(UNBOUNDED).weigher(|_key, _vector| 1).build();
            let key = |text| ContentKey { part: EncoderDigest::from_bytes([7; 16]), text };
            digests.zip(0..).for_each(|(text, i)| cache.insert(key(text), vector(i, 384)));
            cache.run_pending_tasks();
            Filled::new(cache, 1536, 0)
        }
        "user, 64 dims" => {
            let cache = UserCache::new(UNBOUNDED);
            let key = |text| {
                let mut history = HistoryHasher::new(TowerDigest::from_bytes([7; 16]));
                history.add(text, None);
                history.finish()
            };
            digests.zip(0..).for_each(|(text, i)| cache.insert(key(text), vector(i, 64)));
            let counted = cache.measure().n_bytes;
            Filled::new(cache, 256, counted)
        }
        _ => {
            let known = KnownItems::new(UNBOUNDED, 8192);
            (0..n).for_each(|i| {
                let id = format!("item-{i:>9}");
                drop(known.resolve(vec![Item { id: &id, text: Some(Ok(text(i))) }], Priority::Request));
            });
            let counted = known.measure().n_bytes;
            Filled::new(known, 14 + 40 + 5, counted)
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, command, name, n] = arguments.as_slice()
        && command == "--fill"
    {
        let n: u64 = n.parse().unwrap();
        let before = resident_bytes();
        let filled = fill(name, n);
        let resident = (resident_bytes() - before) / n;
        let payload = filled.payload_bytes_per_entry;
        let goal = payload * 5 / 4 + 100;
        println!("{name:20} {payload:>8} {resident:>9} {:>9} {goal:>6}", filled.counted_bytes / n);
        black_box(filled.cache);
        return;
    }
    let n = arguments.iter().find_map(|argument| argument.parse::<u64>().ok()).unwrap_or(1_000_000);
    println!(
        "{n} entries, bytes per entry\n{:20} {:>8} {:>9} {:>9} {:>6}",
        "cache", "payload", "resident", "counted", "goal"
    );
    for name in ["item record, 128 dims", "content, 384 dims", "content in moka", "user, 64 dims", "known item"] {
        let status = Command::new(&arguments[0]).args(["--fill", name, &n.to_string()]).status().unwrap();
        assert!(status.success());
    }
}
