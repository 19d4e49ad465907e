//! `cache-curve`: what the caches would hold and miss at other sizes, worked out with the server's own cache code and no
//! server.
//!
//! Requests are looked up as the server looks them up: candidates in the item cache, those that are missing there and the
//! history in the content cache, each text once a request, and what is missing there is encoded and put into both. Both
//! caches have room for the same number of items. Every user counts as one who was not there a moment ago: pages of a
//! session, whose history is not looked up again, cost less than it says.

use super::{Args, draws::Draws};
use crate::{
    cache::{CacheName, vectors::VectorCache},
    cli::client::table,
    domain::{ContentKey, EncoderDigest, ItemKey, ItemText, TextDigest, TowerDigest, Vector},
    pipeline::item_trace::TracedItem,
};
use serde_json::json;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// The sizes, as parts of all items that the requests ask for.
const PARTS: &[usize] = &[64, 32, 16, 8, 4, 2, 1];

/// One size and what became of the second half of the requests.
#[derive(Debug)]
struct Point {
    n_entries: usize,
    item: Hits,
    content: Hits,
    n_requests: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Hits {
    n_hits: u64,
    n_lookups: u64,
}

impl Hits {
    fn rate(self) -> f64 {
        if self.n_lookups == 0 { 1.0 } else { self.n_hits as f64 / self.n_lookups as f64 }
    }

    fn n_misses(self) -> u64 {
        self.n_lookups - self.n_hits
    }
}

/// Requests as numbers of texts.
struct Texts {
    requests: Vec<[Vec<TextDigest>; 2]>,
    n_different: usize,
}

impl Texts {
    fn of(draws: &Draws, n_requests: u64, max_history: usize) -> Self {
        let mut numbers: HashMap<String, TextDigest> = HashMap::new();
        let mut number = |TracedItem(_, digest): TracedItem| {
            let next = numbers.len().to_string();
            // An item without text costs no look-up.
            let text = || TextDigest::of(&ItemText { title: next, ..ItemText::default() });
            digest.map(|digest| *numbers.entry(digest).or_insert_with(text))
        };
        let mut request = |i| {
            let (mut history, candidates) = draws.items(i);
            history.drain(..history.len().saturating_sub(max_history));
            [history, candidates].map(|items| different(items.into_iter().filter_map(&mut number)))
        };
        let n_requests = draws.n_requests().map_or(n_requests, |n| n.min(n_requests));
        let requests = (0..n_requests).map(&mut request).collect();
        Texts { requests, n_different: numbers.len() }
    }
}

/// Each once, in order.
fn different(texts: impl Iterator<Item = TextDigest>) -> Vec<TextDigest> {
    let mut seen = HashSet::new();
    texts.filter(|text| seen.insert(*text)).collect()
}

pub(super) fn run(args: &Args, draws: &Draws) {
    let texts = Texts::of(draws, args.requests, args.history);
    let mut sizes: Vec<usize> = PARTS.iter().map(|part| (texts.n_different / part).max(1)).collect();
    sizes.dedup();
    let points: Vec<Point> = sizes.into_iter().map(|n_entries| point(&texts, n_entries)).collect();
    if args.json {
        return points.iter().for_each(|point| println!("{}", to_json(args, point)));
    }
    println!(
        "cache-curve: {} requests of {} different items, hits in their second half",
        texts.requests.len(),
        texts.n_different
    );
    let mut figures =
        table(&["items", "cache.content_mb", "cache.item_mb", "content hits", "item hits", "encoded/request"]);
    for point in points {
        figures.add_row([
            point.n_entries.to_string(),
            format!("{:.1}", content_mb(args, point.n_entries)),
            format!("{:.1}", item_mb(args, point.n_entries)),
            format!("{:.1} %", point.content.rate() * 1e2),
            format!("{:.1} %", point.item.rate() * 1e2),
            format!("{:.2}", point.encoded_per_request()),
        ]);
    }
    println!("{figures}");
}

fn content_mb(args: &Args, n_entries: usize) -> f64 {
    (n_entries as u64 * VectorCache::<ContentKey>::entry_bytes(args.content_dim)) as f64 / (1 << 20) as f64
}

fn item_mb(args: &Args, n_entries: usize) -> f64 {
    (n_entries as u64 * VectorCache::<ItemKey>::entry_bytes(args.item_dim)) as f64 / (1 << 20) as f64
}

impl Point {
    fn encoded_per_request(&self) -> f64 {
        self.content.n_misses() as f64 / self.n_requests.max(1) as f64
    }
}

fn to_json(args: &Args, point: &Point) -> serde_json::Value {
    json!({
        "scenario": args.scenario.name(),
        "requests": args.requests,
        "items": point.n_entries,
        "content_mb": content_mb(args, point.n_entries),
        "item_mb": item_mb(args, point.n_entries),
        "content_hit_rate": point.content.rate(),
        "item_hit_rate": point.item.rate(),
        "encoded_per_request": point.encoded_per_request(),
    })
}

/// Vectors of one number stand for all: what is asked is who is there.
fn point(texts: &Texts, n_entries: usize) -> Point {
    let contents = VectorCache::new(CacheName::Content, n_entries as u64 * VectorCache::<ContentKey>::entry_bytes(1));
    let items = VectorCache::new(CacheName::Item, n_entries as u64 * VectorCache::<ItemKey>::entry_bytes(1));
    let content_key = |text: &TextDigest| ContentKey { part: EncoderDigest::from_bytes([0; 16]), text: *text };
    let item_key = |text: &TextDigest| ItemKey { part: TowerDigest::from_bytes([0; 16]), text: *text };
    let vector: Vector = Arc::from([0.0]);
    let (mut content_hits, mut item_hits) = (Hits::default(), Hits::default());
    let n_warm_up = texts.requests.len() / 2;
    for (i, [history, candidates]) in texts.requests.iter().enumerate() {
        let missing_items = missing(&items, candidates, item_key, (i >= n_warm_up).then_some(&mut item_hits));
        let wanted = different(history.iter().chain(&missing_items).copied());
        let encoded = missing(&contents, &wanted, content_key, (i >= n_warm_up).then_some(&mut content_hits));
        encoded.iter().for_each(|text| contents.insert(content_key(text), Arc::clone(&vector)));
        missing_items.iter().for_each(|text| items.insert(item_key(text), Arc::clone(&vector)));
    }
    let n_requests = (texts.requests.len() - n_warm_up) as u64;
    Point { n_entries, item: item_hits, content: content_hits, n_requests }
}

/// Those of `texts` that are not in the cache.
fn missing<K: Copy + Eq + std::hash::Hash>(
    cache: &VectorCache<K>,
    texts: &[TextDigest],
    key: impl Fn(&TextDigest) -> K,
    hits: Option<&mut Hits>,
) -> Vec<TextDigest> {
    let mut missing = Vec::new();
    cache.read_many(&texts.iter().map(key).collect::<Vec<K>>(), |i, vector| {
        if vector.is_none() {
            missing.push(texts[i]);
        }
    });
    if let Some(hits) = hits {
        hits.n_lookups += texts.len() as u64;
        hits.n_hits += (texts.len() - missing.len()) as u64;
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_holds_everything_misses_nothing_and_a_smaller_one_misses_more() {
        let texts = Texts::of(&Draws::zipf(1.0, 400, 10, 20, 1), 400, 10);
        let rate = |n_entries| point(&texts, n_entries).item.rate();
        let all = |requests: &[[Vec<TextDigest>; 2]]| requests.iter().flatten().flatten().copied().collect();
        let (first, second): (HashSet<TextDigest>, HashSet<TextDigest>) =
            (all(&texts.requests[..200]), all(&texts.requests[200..]));
        let n_new = second.difference(&first).count();
        assert_eq!(point(&texts, texts.n_different).encoded_per_request(), n_new as f64 / 200.0);
        let (small, medium) = (rate(20), rate(100));
        assert!(0.1 < small && small < medium && medium < 1.0, "{small} {medium}");
    }
}
