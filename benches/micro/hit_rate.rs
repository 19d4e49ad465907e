//! The hit rate of our bounded cache beside that of policies that a crate offers.
//!
//!     cd benches && cargo bench --bench hit_rate [-- TRACE.csv]
//!
//! Every policy sees the same keys in the same order: a look-up, and an insertion where it missed. Caches are bounded in
//! entries, at parts of the number of different keys. The workloads are Zipf draws; the same draws beside a flood of keys that
//! come once; and, where a MovieLens `ratings.csv` is given, its films in the order in which people rated them.
//! Then the same for content embeddings, which are looked up only where a cache of item records has no record.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a program that measures and prints")]

use fastrand::Rng;
use midemb::cache::{CacheName, bounded::BoundedCache};
use moka::{policy::EvictionPolicy, sync::Cache};
use std::collections::HashSet;

const N_KEYS: usize = 100_000;
const N_LOOKUPS: usize = 2_000_000;
/// Cache sizes as parts of all keys.
const PARTS: [usize; 4] = [100, 30, 10, 3];

/// Looks keys up and inserts those that are missing.
trait Policy {
    /// Whether the key was there.
    fn look_up(&mut self, key: u64) -> bool;
}

struct Ours(BoundedCache<u64, ()>);

impl Policy for Ours {
    fn look_up(&mut self, key: u64) -> bool {
        let hit = self.0.read(&key, |()| ()).is_some();
        if !hit {
            self.0.insert(key, ());
        }
        hit
    }
}

struct Moka(Cache<u64, ()>);

impl Moka {
    fn new(n_entries: u64, policy: EvictionPolicy) -> Self {
        Moka(Cache::builder().max_capacity(n_entries).eviction_policy(policy).build())
    }
}

impl Policy for Moka {
    fn look_up(&mut self, key: u64) -> bool {
        let hit = self.0.get(&key).is_some();
        if !hit {
            self.0.insert(key, ());
        }
        // A busy server does this sooner or later. Here it makes the bound hold at every look-up.
        self.0.run_pending_tasks();
        hit
    }
}

/// Caches of `n_entries`, in the order of the columns: S3-FIFO, which is ours, then LRU and TinyLFU, which are moka's.
fn policies(n_entries: u64) -> [Box<dyn Policy>; 3] {
    [
        Box::new(Ours(BoundedCache::new(CacheName::Content, n_entries, |_, ()| 1))),
        Box::new(Moka::new(n_entries, EvictionPolicy::lru())),
        Box::new(Moka::new(n_entries, EvictionPolicy::tiny_lfu())),
    ]
}

/// Prints the share of hits of every policy in the second half of the keys, when the caches are full.
fn compare(name: &str, keys: &[u64], n_different: usize) {
    for part in PARTS {
        let n_entries = (n_different / part).max(1) as u64;
        print!("{name:<36} {n_entries:>8}");
        for mut policy in policies(n_entries) {
            let (first, second) = keys.split_at(keys.len() / 2);
            for key in first {
                policy.look_up(*key);
            }
            let n_hits = second.iter().filter(|key| policy.look_up(**key)).count();
            print!(" {:>12.2}", n_hits as f64 * 1e2 / second.len() as f64);
        }
        println!();
    }
}

fn zipf(s: f64, rng: &mut Rng) -> Vec<u64> {
    let sums: Vec<f64> = (1..=N_KEYS)
        .scan(0.0, |sum, rank| {
            *sum += (rank as f64).powf(-s);
            Some(*sum)
        })
        .collect();
    let total = sums[N_KEYS - 1];
    let mut draw = || {
        let below = rng.f64() * total;
        sums.partition_point(|sum| *sum <= below) as u64
    };
    (0..N_LOOKUPS).map(|_| draw()).collect()
}

/// The draws, with a key that never comes again after every four of them.
fn beside_a_flood(keys: &[u64]) -> Vec<u64> {
    let flood = keys.chunks(4).enumerate().map(|(i, drawn)| (drawn, (N_KEYS + i) as u64));
    flood.flat_map(|(drawn, new)| drawn.iter().copied().chain([new])).collect()
}

/// What an operator pushes, nine times in all.
#[derive(Clone, Copy)]
enum Pushes {
    None,
    /// New towers: no record is left, and the hottest half of the items is embedded again from its content.
    Towers,
    /// The same, and every third time a new encoder, too: no content is left, either.
    TowersAndEncoders,
}

const N_PUSHES: usize = 9;

/// The share of item look-ups that end with the encoder, in the second half of `keys`, in percent. Records are in our own cache,
/// contents are found by `contents`.
fn encoded_behind_records(keys: &[u64], n_records: u64, pushes: Pushes, contents: &mut dyn Policy) -> f64 {
    let empty = || BoundedCache::new(CacheName::Item, n_records, |_: &u64, ()| 1);
    let mut records = empty();
    let mut encoder = 0;
    let mut n_encoded = 0;
    for (i, key) in keys.iter().enumerate() {
        let mut is_encoded =
            |key: u64, encoder: u64| usize::from(!contents.look_up(key | encoder << 32) && i >= keys.len() / 2);
        let (n_pushed, rest) = (i / (keys.len() / (N_PUSHES + 1)), i % (keys.len() / (N_PUSHES + 1)));
        if !matches!(pushes, Pushes::None) && (1..=N_PUSHES).contains(&n_pushed) && rest == 0 {
            encoder += u64::from(matches!(pushes, Pushes::TowersAndEncoders) && n_pushed % 3 == 0);
            let hot = std::mem::replace(&mut records, empty()).hottest_keys();
            for key in hot.into_iter().take(n_records as usize / 2) {
                n_encoded += is_encoded(key, encoder);
                records.insert_ahead(key, ());
            }
        }
        if records.read(key, |()| ()).is_none() {
            n_encoded += is_encoded(*key, encoder);
            records.insert(*key, ());
        }
    }
    n_encoded as f64 * 2e2 / keys.len() as f64
}

/// Prints what [`encoded_behind_records`] says of every policy, with room for the records of a tenth of the keys.
fn compare_behind_records(name: &str, keys: &[u64], n_different: usize) {
    let n_records = (n_different / 10) as u64;
    for (when, pushes) in [("", Pushes::None), (", towers", Pushes::Towers), (", encoders", Pushes::TowersAndEncoders)]
    {
        for n_contents in [n_records / 2, n_records, n_records * 2] {
            print!("{:<36} {n_contents:>8}", format!("{name}{when}"));
            for mut policy in policies(n_contents) {
                print!(" {:>12.2}", encoded_behind_records(keys, n_records, pushes, &mut *policy));
            }
            println!();
        }
    }
}

/// The films of a MovieLens `ratings.csv` (userId,movieId,rating,timestamp), oldest rating first.
fn ratings(path: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(path).unwrap();
    let field = |line: &str, i: usize| line.split(',').nth(i).unwrap().parse::<u64>().unwrap();
    let mut rated: Vec<(u64, u64)> = text.lines().skip(1).map(|line| (field(line, 3), field(line, 1))).collect();
    rated.sort_unstable();
    rated.into_iter().map(|(_, film)| film).collect()
}

fn main() {
    let workloads = || {
        let zipf = [0.8, 1.0].into_iter().flat_map(|s| {
            let keys = zipf(s, &mut Rng::with_seed(1));
            let flood = beside_a_flood(&keys);
            [(format!("Zipf {s}"), keys, N_KEYS), (format!("Zipf {s} beside a flood"), flood, N_KEYS)]
        });
        let path = std::env::args().skip(1).find(|argument| argument.ends_with(".csv"));
        zipf.chain(path.map(|path| {
            let keys = ratings(&path);
            let n_different = keys.iter().collect::<HashSet<_>>().len();
            ("MovieLens ratings".to_owned(), keys, n_different)
        }))
    };
    let head = |what: &str| {
        println!(
            "{what}\n{:<36} {:>8} {:>12} {:>12} {:>12}",
            "workload", "entries", "S3-FIFO (ours)", "LRU", "TinyLFU"
        );
    };
    head("hits, percent of look-ups");
    for (name, keys, n_different) in workloads() {
        compare(&name, &keys, n_different);
    }
    head("encoded behind a cache of records, percent of look-ups");
    for (name, keys, n_different) in workloads() {
        compare_behind_records(&name, &keys, n_different);
    }
}
