//! The requests of a cache curve, as texts to look up: drawn by popularity, or as a trace has them.

use crate::{
    domain::{ItemText, TextDigest},
    pipeline::item_trace::{TracedItem, TracedRequest},
};
use fastrand::Rng;
use std::collections::{HashMap, HashSet};

/// The texts that one request looks up, each once.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) history: Vec<TextDigest>,
    pub(super) candidates: Vec<TextDigest>,
}

/// The requests, in order.
#[derive(Debug)]
pub(super) struct Requests {
    pub(super) all: Vec<Request>,
    /// How many different texts they look up.
    pub(super) n_texts: usize,
}

impl Requests {
    /// As they were recorded. Of a history only the newest `max_history` items count, as in the server.
    pub(super) fn from_trace(trace: Vec<TracedRequest>, max_history: usize) -> Self {
        let mut texts = Texts::default();
        let mut all = Vec::with_capacity(trace.len());
        for TracedRequest { history, candidates, .. } in trace {
            let newest = history.len().saturating_sub(max_history);
            // An item without a digest has no text and costs no look-up.
            let mut digests = |items: &[TracedItem]| -> Vec<TextDigest> {
                let names = items.iter().filter_map(|TracedItem(_, digest)| digest.as_deref());
                distinct(names.map(|name| texts.digest(name)))
            };
            all.push(Request { history: digests(&history[newest..]), candidates: digests(&candidates) });
        }
        Requests { all, n_texts: texts.by_name.len() }
    }

    /// Draws distinct items for each history and each page, by popularity.
    pub(super) fn draw(popularity: &Popularity, sizes: Sizes) -> Self {
        let mut texts = Texts::default();
        let mut all = Vec::with_capacity(sizes.n_requests as usize);
        for request in 0..sizes.n_requests {
            let mut draws = popularity.draws(request);
            let mut digests = |n: usize| -> Vec<TextDigest> {
                draws.distinct(n).into_iter().map(|rank| texts.digest(&rank.to_string())).collect()
            };
            all.push(Request { history: digests(sizes.n_history), candidates: digests(sizes.n_candidates) });
        }
        Requests { all, n_texts: texts.by_name.len() }
    }
}

/// How many requests to draw, and how many items each has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) n_requests: u64,
    pub(super) n_history: usize,
    pub(super) n_candidates: usize,
}

/// A digest per different text. The texts themselves are made up: only which are equal matters.
#[derive(Default)]
struct Texts {
    by_name: HashMap<String, TextDigest>,
}

impl Texts {
    fn digest(&mut self, name: &str) -> TextDigest {
        let text = || TextDigest::of(&ItemText::titled(name));
        *self.by_name.entry(name.to_owned()).or_insert_with(text)
    }
}

/// Each text once, in order.
pub(super) fn distinct(texts: impl Iterator<Item = TextDigest>) -> Vec<TextDigest> {
    let mut seen = HashSet::new();
    texts.filter(|text| seen.insert(*text)).collect()
}

/// Zipf's law: the k-th most popular item is drawn in proportion to `1 / k^exponent`.
#[derive(Debug)]
pub(super) struct Popularity {
    /// The sum of the weights up to each item.
    cumulative_weights: Vec<f64>,
    seed: u64,
}

impl Popularity {
    pub(super) fn zipf(exponent: f64, n_items: usize, seed: u64) -> Self {
        let weights = (1..=n_items).map(|rank| (rank as f64).powf(-exponent));
        let cumulative_weights = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Popularity { cumulative_weights: cumulative_weights.collect(), seed }
    }

    /// The draws of one request: always the same ones, and those of `midemb-bench w3-zipf` with this seed. A test on either
    /// side holds both to the same page.
    fn draws(&self, request: u64) -> Draws<'_> {
        let spread = request.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Draws { cumulative_weights: &self.cumulative_weights, random: Rng::with_seed(self.seed ^ spread) }
    }
}

struct Draws<'a> {
    cumulative_weights: &'a [f64],
    random: Rng,
}

impl Draws<'_> {
    fn distinct(&mut self, n: usize) -> Vec<usize> {
        let (mut seen, mut ranks) = (HashSet::with_capacity(n), Vec::with_capacity(n));
        while ranks.len() < n {
            let rank = self.next();
            if seen.insert(rank) {
                ranks.push(rank);
            }
        }
        ranks
    }

    /// The rank of one item by popularity, from 0.
    fn next(&mut self) -> usize {
        let below = self.random.f64() * self.cumulative_weights.last().copied().unwrap_or_default();
        self.cumulative_weights.partition_point(|sum| *sum <= below).min(self.cumulative_weights.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn popular_items_are_drawn_in_proportion_and_a_request_is_always_the_same() {
        let popularity = Popularity::zipf(1.0, 1000, 7);
        let n_most_popular = (0..20_000).filter(|request| popularity.draws(*request).next() == 0).count();
        let share = n_most_popular as f64 / 20_000.0;
        // 1 / (1 + 1/2 + ... + 1/1000)
        assert!((share - 0.1336).abs() < 0.01, "the most popular item has {share} of all draws");
        let page = popularity.draws(3).distinct(50);
        assert_eq!(page.iter().collect::<HashSet<_>>().len(), 50, "an item twice on a page");
        assert_eq!(popularity.draws(3).distinct(50), page);
        assert_ne!(popularity.draws(4).distinct(50), page);
    }

    /// `midemb-bench` has the same constant in its own test.
    #[test]
    fn a_page_has_the_items_that_the_load_generator_draws() {
        let page = Popularity::zipf(1.0, 1000, 7).draws(3).distinct(8);
        assert_eq!(page, [1, 50, 5, 231, 18, 49, 175, 632]);
    }

    #[test]
    fn a_trace_keeps_its_newest_history_and_what_is_equal() {
        let items = |digests: &[Option<&str>]| -> Vec<TracedItem> {
            digests.iter().map(|digest| TracedItem("id".to_owned(), digest.map(str::to_owned))).collect()
        };
        let trace = vec![TracedRequest {
            at_ms: 1,
            history: items(&[Some("a"), Some("b"), Some("c")]),
            candidates: items(&[Some("b"), None, Some("d"), Some("b")]),
        }];
        let requests = Requests::from_trace(trace, 2);
        let [Request { history, candidates }] = requests.all.as_slice() else { panic!("{requests:?}") };
        assert_eq!((history.len(), candidates.len(), requests.n_texts), (2, 2, 3));
        assert_eq!(history[0], candidates[0], "one text has two digests");
    }
}
