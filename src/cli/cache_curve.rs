//! `midemb cache-curve`: how often caches of several sizes would hit, from the server's own cache code and without a server.
//!
//! Requests are looked up as the server looks them up: history and candidates in the item cache; what it misses in the content
//! cache, each text once per request; and what the content cache misses is encoded and put into both. Both caches
//! have room for the same number of items. Every user counts as new: later pages of a session, whose history is not looked up
//! again, cost less than the curve says.

mod requests;

use super::terminal::table;
use crate::{
    cache::{CacheName, vectors::VectorCache},
    domain::{ContentKey, EncoderDigest, ItemKey, TextDigest, TowerDigest, Vector},
    pipeline::item_trace,
};
use anyhow::ensure;
use requests::{Popularity, Request, Requests, Sizes, distinct};
use serde::Serialize;
use std::{hash::Hash, path::PathBuf, sync::Arc};

/// The cache sizes: the number of different items divided by each of these.
const DIVISORS: &[usize] = &[64, 32, 16, 8, 4, 2, 1];

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Requests to draw, or to read from the trace. Hits are counted in their second half.
    #[arg(long, default_value_t = 2000)]
    requests: u64,
    /// Candidates per drawn request.
    #[arg(long, default_value_t = 500)]
    candidates: usize,
    /// History items per request. Of a trace's histories the newest so many are read, as the model does.
    #[arg(long, default_value_t = 80)]
    history: usize,
    /// Different items to draw from.
    #[arg(long, default_value_t = 1000)]
    items: usize,
    /// The k-th most popular item is drawn in proportion to 1/k^S.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    zipf: f64,
    /// Look up what this trace (of `midemb serve --record-trace`) asks for, instead of drawing.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The width of content embeddings.
    #[arg(long, default_value_t = 384)]
    content_dim: usize,
    /// The width of item records: an item embedding and an adapted content embedding.
    #[arg(long, default_value_t = 128)]
    record_dim: usize,
    /// Another seed draws other requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object per size.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn read_requests(&self) -> anyhow::Result<Requests> {
        ensure!(
            self.requests > 0 && self.candidates > 0 && self.items > 0,
            "--requests, --candidates and --items must be at least 1"
        );
        ensure!(self.items >= self.candidates.max(self.history), "--items must cover the candidates and the history");
        // With a steeper law, a page would wait long for its rare items to be drawn.
        ensure!((0.0..=1.5).contains(&self.zipf), "--zipf must be from 0 to 1.5");
        if let Some(path) = &self.trace {
            return Ok(Requests::from_trace(item_trace::read(path, self.requests as usize)?, self.history));
        }
        let sizes = Sizes { n_requests: self.requests, n_history: self.history, n_candidates: self.candidates };
        Ok(Requests::draw(&Popularity::zipf(self.zipf, self.items, self.seed), sizes))
    }

    fn content_mb(&self, n_entries: usize) -> f64 {
        megabytes(n_entries, VectorCache::<ContentKey>::entry_bytes(self.content_dim))
    }

    fn item_mb(&self, n_entries: usize) -> f64 {
        megabytes(n_entries, VectorCache::<ItemKey>::entry_bytes(self.record_dim))
    }
}

fn megabytes(n_entries: usize, entry_bytes: u64) -> f64 {
    (n_entries as u64 * entry_bytes) as f64 / (1 << 20) as f64
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let requests = args.read_requests()?;
    let mut sizes: Vec<usize> = DIVISORS.iter().map(|divisor| (requests.n_texts / divisor).max(1)).collect();
    sizes.dedup();
    let points: Vec<Point> = sizes.into_iter().map(|n_entries| simulate(&requests.all, n_entries)).collect();
    if args.json {
        for point in &points {
            println!("{}", serde_json::to_string(&point.to_json(args))?);
        }
    } else {
        print(args, &requests, &points);
    }
    Ok(())
}

fn print(args: &Args, requests: &Requests, points: &[Point]) {
    println!(
        "cache-curve: {} requests of {} different items, hits in their second half",
        requests.all.len(),
        requests.n_texts
    );
    let mut shown =
        table(&["items", "cache.content_mb", "cache.item_mb", "content hits", "item hits", "encoded/request"]);
    for point in points {
        shown.add_row([
            point.n_entries.to_string(),
            format!("{:.1}", args.content_mb(point.n_entries)),
            format!("{:.1}", args.item_mb(point.n_entries)),
            format!("{:.1} %", point.content.rate() * 1e2),
            format!("{:.1} %", point.item.rate() * 1e2),
            format!("{:.2}", point.encoded_per_request()),
        ]);
    }
    println!("{shown}");
}

/// One cache size and the look-ups of the second half of the requests.
#[derive(Debug)]
struct Point {
    n_entries: usize,
    n_requests: usize,
    item: Lookups,
    content: Lookups,
}

/// The look-ups of one cache.
#[derive(Debug, Default, Clone, Copy)]
struct Lookups {
    n_hits: usize,
    n_misses: usize,
}

impl Lookups {
    /// The part that hit; 1 where nothing was looked up.
    fn rate(self) -> f64 {
        let n_lookups = self.n_hits + self.n_misses;
        if n_lookups == 0 { 1.0 } else { self.n_hits as f64 / n_lookups as f64 }
    }

    fn count(&mut self, n_lookups: usize, n_misses: usize) {
        self.n_hits += n_lookups - n_misses;
        self.n_misses += n_misses;
    }
}

/// What `--json` prints per size.
#[derive(Serialize)]
struct PointJson {
    scenario: &'static str,
    requests: u64,
    items: usize,
    content_mb: f64,
    item_mb: f64,
    content_hit_rate: f64,
    item_hit_rate: f64,
    encoded_per_request: f64,
}

impl Point {
    fn encoded_per_request(&self) -> f64 {
        self.content.n_misses as f64 / self.n_requests.max(1) as f64
    }

    fn to_json(&self, args: &Args) -> PointJson {
        PointJson {
            scenario: "cache-curve",
            requests: args.requests,
            items: self.n_entries,
            content_mb: args.content_mb(self.n_entries),
            item_mb: args.item_mb(self.n_entries),
            content_hit_rate: self.content.rate(),
            item_hit_rate: self.item.rate(),
            encoded_per_request: self.encoded_per_request(),
        }
    }
}

/// Sends all requests through two caches. Their vectors have one number each, as only the keys matter.
fn simulate(requests: &[Request], n_entries: usize) -> Point {
    let contents = VectorCache::new(CacheName::Content, n_entries as u64 * VectorCache::<ContentKey>::entry_bytes(1));
    let items = VectorCache::new(CacheName::Item, n_entries as u64 * VectorCache::<ItemKey>::entry_bytes(1));
    let content_key = |text: &TextDigest| ContentKey { part: EncoderDigest::from_bytes([0; 16]), text: *text };
    let item_key = |text: &TextDigest| ItemKey { part: TowerDigest::from_bytes([0; 16]), text: *text };
    let vector: Vector = Arc::from([0.0]);
    let n_warm_up = requests.len() / 2;
    let n_requests = requests.len() - n_warm_up;
    let mut point = Point { n_entries, n_requests, item: Lookups::default(), content: Lookups::default() };
    for (i, Request { history, candidates }) in requests.iter().enumerate() {
        let texts: Vec<TextDigest> = history.iter().chain(candidates).copied().collect();
        let missing_items = missing(&items, &texts, item_key);
        let needed_contents = distinct(missing_items.iter().copied());
        let missing_contents = missing(&contents, &needed_contents, content_key);
        if i >= n_warm_up {
            point.item.count(texts.len(), missing_items.len());
            point.content.count(needed_contents.len(), missing_contents.len());
        }
        for text in &missing_contents {
            contents.insert(content_key(text), Arc::clone(&vector));
        }
        for text in &needed_contents {
            items.insert(item_key(text), Arc::clone(&vector));
        }
    }
    point
}

/// The texts that are not in the cache.
fn missing<K: Copy + Eq + Hash>(
    cache: &VectorCache<K>,
    texts: &[TextDigest],
    key: impl Fn(&TextDigest) -> K,
) -> Vec<TextDigest> {
    let keys: Vec<K> = texts.iter().map(key).collect();
    let mut missing = Vec::new();
    cache.read_many(&keys, |i, vector| {
        if vector.is_none() {
            missing.push(texts[i]);
        }
    });
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_cache_for_all_items_misses_new_ones_only_and_a_smaller_one_misses_more() {
        let sizes = Sizes { n_requests: 400, n_history: 10, n_candidates: 20 };
        let requests = Requests::draw(&Popularity::zipf(1.0, 400, 1), sizes);
        let texts = |requests: &[Request]| -> HashSet<TextDigest> {
            requests.iter().flat_map(|request| request.history.iter().chain(&request.candidates).copied()).collect()
        };
        let (first_half, second_half) = (texts(&requests.all[..200]), texts(&requests.all[200..]));
        let n_new = second_half.difference(&first_half).count();
        assert_eq!(simulate(&requests.all, requests.n_texts).encoded_per_request(), n_new as f64 / 200.0);
        let rate = |n_entries| simulate(&requests.all, n_entries).item.rate();
        let (small, medium) = (rate(20), rate(100));
        assert!(0.1 < small && small < medium && medium < 1.0, "{small} {medium}");
    }
}
