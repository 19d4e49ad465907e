//! Which items the requests of w3-zipf ask for: drawn by popularity, or as in a trace.

use crate::{
    args::Args,
    items::made_up_text,
    trace::{self, TracedItem, TracedRequest},
};
use fastrand::Rng;
use midemb_client::proto::{GetMidEmbRequest, Item};
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
};

/// An endless list of requests, in which the `i`-th is always the same.
#[derive(Debug)]
pub(crate) enum Draws {
    /// Drawn by popularity.
    Zipf(Zipf),
    /// Recorded requests; after the last one they start again from the first.
    Trace(Vec<TracedRequest>),
}

/// Zipf's law: the k-th most popular item is drawn in proportion to `1 / k^exponent`. `midemb cache-curve` draws the same
/// items from the same seed; a test on either side holds both to the same page.
#[derive(Debug)]
pub(crate) struct Zipf {
    /// The sum of the weights up to each item.
    cumulative_weights: Vec<f64>,
    n_history: usize,
    n_candidates: usize,
    seed: u64,
}

impl Draws {
    pub(crate) fn new(args: &Args) -> anyhow::Result<Self> {
        match &args.trace {
            // Two phases are sent.
            Some(path) => Ok(Draws::Trace(trace::read(path, 2 * args.requests as usize)?)),
            None => Ok(Draws::Zipf(Zipf {
                cumulative_weights: cumulative_weights(args.zipf, args.items),
                n_history: args.history,
                n_candidates: args.candidates,
                seed: args.seed,
            })),
        }
    }

    /// The `i`-th request. Neither kind has texts, so each different digest gets a made-up one.
    pub(crate) fn request(&self, i: u64) -> GetMidEmbRequest {
        let TracedRequest { history, candidates } = match self {
            Draws::Trace(requests) => requests[(i % requests.len() as u64) as usize].clone(),
            Draws::Zipf(zipf) => zipf.draw(i),
        };
        GetMidEmbRequest {
            user_id: format!("bench-user-{i}"),
            history: history.into_iter().map(item).collect(),
            candidates: candidates.into_iter().map(item).collect(),
            ..Default::default()
        }
    }
}

fn cumulative_weights(exponent: f64, n_items: usize) -> Vec<f64> {
    let weights = (1..=n_items).map(|rank| (rank as f64).powf(-exponent));
    let sums = weights.scan(0.0, |sum, weight| {
        *sum += weight;
        Some(*sum)
    });
    sums.collect()
}

/// One text per digest: equal digests give equal texts.
fn item(TracedItem(id, digest): TracedItem) -> Item {
    let text = digest.map(|digest| {
        let mut hasher = DefaultHasher::new();
        digest.hash(&mut hasher);
        made_up_text(&digest, &mut Rng::with_seed(hasher.finish()))
    });
    Item { id, text }
}

impl Zipf {
    /// The `i`-th request: distinct items in the history, and distinct ones on the page.
    fn draw(&self, i: u64) -> TracedRequest {
        let mut rng = Rng::with_seed(self.seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let history = self.draw_distinct(self.n_history, &mut rng);
        TracedRequest { history, candidates: self.draw_distinct(self.n_candidates, &mut rng) }
    }

    fn draw_distinct(&self, n: usize, rng: &mut Rng) -> Vec<TracedItem> {
        let (mut seen, mut drawn) = (HashSet::with_capacity(n), Vec::with_capacity(n));
        while drawn.len() < n {
            let rank = self.draw_one(rng);
            if seen.insert(rank) {
                drawn.push(TracedItem(format!("zipf-{rank}"), Some(rank.to_string())));
            }
        }
        drawn
    }

    /// The rank of one item by popularity, from 0.
    fn draw_one(&self, rng: &mut Rng) -> usize {
        let below = rng.f64() * self.cumulative_weights.last().copied().unwrap_or_default();
        self.cumulative_weights.partition_point(|sum| *sum <= below).min(self.cumulative_weights.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zipf(n_items: usize, n_history: usize, n_candidates: usize) -> Draws {
        let cumulative_weights = cumulative_weights(1.0, n_items);
        Draws::Zipf(Zipf { cumulative_weights, n_history, n_candidates, seed: 7 })
    }

    #[test]
    fn popular_items_are_drawn_in_proportion_and_a_request_is_always_the_same() {
        let draws = zipf(1000, 0, 1);
        let n_most_popular = (0..20_000).filter(|i| draws.request(*i).candidates[0].id == "zipf-0").count();
        let share = n_most_popular as f64 / 20_000.0;
        // 1 / (1 + 1/2 + ... + 1/1000)
        assert!((share - 0.1336).abs() < 0.01, "the most popular item has {share} of all draws");
        let page = zipf(100, 20, 50);
        let request = page.request(3);
        assert_eq!((request.history.len(), request.candidates.len()), (20, 50));
        let ids: HashSet<&String> = request.candidates.iter().map(|item| &item.id).collect();
        assert_eq!(ids.len(), 50, "an item twice on a page");
        assert_eq!(page.request(3), request);
        assert_ne!(page.request(4), request);
    }

    /// `midemb cache-curve` has the same constant in its own test.
    #[test]
    fn a_page_has_the_items_that_cache_curve_draws() {
        let ids: Vec<String> = zipf(1000, 0, 8).request(3).candidates.into_iter().map(|item| item.id).collect();
        let ranks = [1, 50, 5, 231, 18, 49, 175, 632];
        assert_eq!(ids, ranks.map(|rank| format!("zipf-{rank}")));
    }

    #[test]
    fn a_trace_starts_again_and_equal_digests_have_equal_texts() {
        let traced = |digest: Option<&str>| TracedItem("id".to_owned(), digest.map(str::to_owned));
        let request =
            TracedRequest { history: vec![traced(Some("d"))], candidates: vec![traced(Some("d")), traced(None)] };
        let draws = Draws::Trace(vec![request]);
        let first = draws.request(0);
        assert!(first.history[0].text.is_some() && first.candidates[1].text.is_none());
        assert_eq!(first.history[0].text, first.candidates[0].text);
        assert_eq!(draws.request(1).candidates, first.candidates);
    }
}
