//! The hit rate of our bounded cache beside that of policies that a crate offers.
//!
//!     cd benches && cargo bench --bench hit_rate [-- TRACE.csv]
//!
//! Every policy sees the same keys in the same order: a look-up, and an insertion where it missed. Caches are bounded in
//! entries, at parts of the number of different keys. The workloads are Zipf draws; the same draws beside a flood of keys that
//! come once; and, where a MovieLens `ratings.csv` is given, its films in the order in which people rated them.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a program that measures and prints")]

use fastrand::Rng;
use midemb::cache::{CacheName, bounded::BoundedCache};
use moka::{policy::EvictionPolicy, sync::Cache};

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

/// Prints the share of hits of every policy in the second half of the keys, when the caches are full.
fn compare(name: &str, keys: &[u64], n_different: usize) {
    for part in PARTS {
        let n_entries = (n_different / part).max(1) as u64;
        let mut policies: [(&str, Box<dyn Policy>); 3] = [
            ("S3-FIFO (ours)", Box::new(Ours(BoundedCache::new(CacheName::Item, n_entries, |_, ()| 1)))),
            ("LRU", Box::new(Moka::new(n_entries, EvictionPolicy::lru()))),
            ("TinyLFU", Box::new(Moka::new(n_entries, EvictionPolicy::tiny_lfu()))),
        ];
        print!("{name:<28} {n_entries:>8}");
        for (_, policy) in &mut policies {
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

/// The films of a MovieLens `ratings.csv` (userId,movieId,rating,timestamp), oldest rating first.
fn ratings(path: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(path).unwrap();
    let field = |line: &str, i: usize| line.split(',').nth(i).unwrap().parse::<u64>().unwrap();
    let mut rated: Vec<(u64, u64)> = text.lines().skip(1).map(|line| (field(line, 3), field(line, 1))).collect();
    rated.sort_unstable();
    rated.into_iter().map(|(_, film)| film).collect()
}

fn main() {
    println!(
        "hits, percent\n{:<28} {:>8} {:>12} {:>12} {:>12}",
        "workload", "entries", "S3-FIFO (ours)", "LRU", "TinyLFU"
    );
    for s in [0.8, 1.0] {
        let keys = zipf(s, &mut Rng::with_seed(1));
        compare(&format!("Zipf {s}"), &keys, N_KEYS);
        compare(&format!("Zipf {s} beside a flood"), &beside_a_flood(&keys), N_KEYS);
    }
    if let Some(path) = std::env::args().skip(1).find(|argument| argument.ends_with(".csv")) {
        let keys = ratings(&path);
        let n_different = keys.iter().collect::<std::collections::HashSet<_>>().len();
        compare("MovieLens ratings", &keys, n_different);
    }
}
