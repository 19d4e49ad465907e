//! The time and size of a snapshot of the caches, written and restored, by number of items.
//!
//!     cd benches && cargo bench --bench snapshot [-- ITEMS]
//!
//! Each item has a content embedding of 384 numbers, a record of 128, and a text that is known by its id. The folder
//! is a temporary one; `TMPDIR` chooses its disk. The files are read from the system's page cache, as after a restart.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a program that measures and prints")]

use midemb::{
    cache::{
        CacheLimits, Caches,
        snapshot::{self, Served},
    },
    domain::{ContentKey, EncoderDigest, Item, ItemKey, ItemText, Priority, TowerDigest},
};
use std::time::Instant;

const UNBOUNDED: u64 = 1 << 40;
const SERVED: Served = Served {
    encoder: EncoderDigest::from_bytes([1; 16]),
    content_dim: 384,
    tower: TowerDigest::from_bytes([2; 16]),
    record_dim: 128,
};

fn empty_caches() -> Caches {
    Caches::new(CacheLimits {
        content_bytes: UNBOUNDED,
        item_bytes: UNBOUNDED,
        user_bytes: UNBOUNDED,
        known_items_bytes: UNBOUNDED,
        max_text_bytes: 8192,
    })
}

fn text(i: u64) -> ItemText {
    let single = [&*format!("a title of usual length, number {i:>9}"), "Drama", "a brand", "$12.99"];
    ItemText::new(single, &["first", "second"], &["returns within 30 days"])
}

fn fill(caches: &Caches, n: u64) {
    for i in 0..n {
        let id = format!("item-{i:>9}");
        let items = vec![Item { id: &id, text: Some(Ok(text(i))) }];
        let text = caches.known_items.resolve(items, Priority::WarmUp).remove(0).unwrap().digest;
        let vector = |dim| (0..dim).map(|j| (i + j) as f32).collect();
        caches.contents.insert(ContentKey { part: SERVED.encoder, text }, vector(384));
        caches.items.insert(ItemKey { part: SERVED.tower, text }, vector(128));
    }
}

fn main() {
    let n = std::env::args().find_map(|argument| argument.parse::<u64>().ok()).unwrap_or(100_000);
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (empty_caches(), empty_caches());
    fill(&old, n);

    let start = Instant::now();
    let written = snapshot::write(folder.path(), &old, &[SERVED]).unwrap();
    let write_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let restored = snapshot::restore(folder.path(), &new, &[SERVED]);
    let restore_seconds = start.elapsed().as_secs_f64();

    assert!(restored.refused.is_empty() && restored.counts == written.counts, "{restored:?}");
    let n_entries = written.counts.n_contents + written.counts.n_items + written.counts.n_known_items;
    let megabytes = written.counts.n_bytes as f64 / 1e6;
    println!("{n} items: {n_entries} entries, {megabytes:.1} MB");
    println!("written and synced in {write_seconds:.2} s, restored in {restore_seconds:.2} s");
}
