//! Which items requests ask for: drawn by popularity, or as a trace has them.

use super::traffic::made_up_text;
use crate::{
    item_trace::{self, TracedItem, TracedRequest},
    wire::proto::{GetMidEmbRequest, Item},
};
use anyhow::ensure;
use fastrand::Rng;
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
};

/// An endless list of requests, in which the `i`-th is always the same.
#[derive(Debug)]
pub(super) enum Draws {
    /// Items by popularity: the `k`-th most popular one of `n` is asked for in proportion to `1 / k^s`.
    Zipf {
        /// The sums of the weights up to each item.
        sums: Vec<f64>,
        /// Different items of each request.
        n_history: usize,
        /// Different items of each request.
        n_candidates: usize,
        /// What the draws start from.
        seed: u64,
    },
    /// A recorded list, again from its start when it is over.
    Trace(Vec<TracedRequest>),
}

impl Draws {
    pub(super) fn zipf(s: f64, n_items: usize, n_history: usize, n_candidates: usize, seed: u64) -> Self {
        let weights = (1..=n_items).map(|rank| (rank as f64).powf(-s));
        let sums = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Draws::Zipf { sums: sums.collect(), n_history, n_candidates, seed }
    }

    pub(super) fn trace(path: &Path, max_requests: usize) -> anyhow::Result<Self> {
        let requests = item_trace::read(path, max_requests)?;
        ensure!(requests.iter().all(|request| !request.candidates.is_empty()), "a traced request has no candidates");
        Ok(Draws::Trace(requests))
    }

    /// How many different requests there are; none where they never repeat.
    pub(super) fn n_requests(&self) -> Option<u64> {
        match self {
            Draws::Zipf { .. } => None,
            Draws::Trace(requests) => Some(requests.len() as u64),
        }
    }

    /// History and candidates of the `i`-th request.
    pub(super) fn items(&self, i: u64) -> (Vec<TracedItem>, Vec<TracedItem>) {
        match self {
            Draws::Trace(requests) => {
                let request = &requests[(i % requests.len() as u64) as usize];
                (request.history.clone(), request.candidates.clone())
            }
            Draws::Zipf { sums, n_history, n_candidates, seed } => {
                let mut rng = Rng::with_seed(seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let mut different = |n: usize| -> Vec<TracedItem> {
                    let (mut seen, mut drawn) = (HashSet::with_capacity(n), Vec::with_capacity(n));
                    while drawn.len() < n {
                        let below = rng.f64() * sums.last().copied().unwrap_or_default();
                        let rank = sums.partition_point(|sum| *sum <= below).min(sums.len() - 1);
                        if seen.insert(rank) {
                            drawn.push(rank);
                        }
                    }
                    drawn.into_iter().map(|rank| TracedItem(format!("zipf-{rank}"), Some(rank.to_string()))).collect()
                };
                (different(*n_history), different(*n_candidates))
            }
        }
    }

    /// The `i`-th request. A trace has no texts, so each digest gets one that is made up from it, as long as films' are.
    pub(super) fn request(&self, i: u64) -> GetMidEmbRequest {
        let item = |TracedItem(id, digest): TracedItem| {
            let text = digest.map(|digest| {
                let mut hasher = DefaultHasher::new();
                digest.hash(&mut hasher);
                made_up_text(&digest, &mut Rng::with_seed(hasher.finish()))
            });
            Item { id, text }
        };
        let (history, candidates) = self.items(i);
        GetMidEmbRequest {
            user_id: format!("bench-user-{i}"),
            history: history.into_iter().map(item).collect(),
            candidates: candidates.into_iter().map(item).collect(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn popular_items_come_in_proportion_and_a_request_is_always_the_same() {
        let draws = Draws::zipf(1.0, 1000, 0, 1, 7);
        let is_first = |i: u64| draws.items(i).1 == [TracedItem("zipf-0".to_owned(), Some("0".to_owned()))];
        let share = (0..20_000).filter(|i| is_first(*i)).count() as f64 / 20_000.0;
        // 1 / (1 + 1/2 + ... + 1/1000)
        assert!((share - 0.1336).abs() < 0.01, "the most popular item has {share} of all draws");
        let page = Draws::zipf(1.0, 100, 20, 50, 7);
        let request = page.request(3);
        assert_eq!((request.history.len(), request.candidates.len()), (20, 50));
        let ids: HashSet<&String> = request.candidates.iter().map(|item| &item.id).collect();
        assert_eq!(ids.len(), 50, "an item twice on a page");
        assert_eq!(page.request(3), request);
        assert_ne!(page.request(4), request);
    }
}
