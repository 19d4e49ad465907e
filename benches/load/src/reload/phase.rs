//! One part of the scenario: before the pushes, or while pushing.

use super::load::Outcome;
use crate::scrape::Scrape;
use std::time::Duration;

/// What was sent, and the server's metrics around it.
pub(super) struct Phase {
    pub(super) outcome: Outcome,
    pub(super) took: Duration,
    pub(super) scrape_before: Scrape,
    pub(super) scrape_after: Scrape,
}

impl Phase {
    /// Server CPU milliseconds per request.
    pub(super) fn cpu_ms(&self) -> f64 {
        let cpu_seconds = self.scrape_after.cpu_seconds - self.scrape_before.cpu_seconds;
        cpu_seconds * 1e3 / self.outcome.n_sent().max(1) as f64
    }

    /// The part of the requests whose user was cached; none where no user was looked up.
    pub(super) fn user_hit_rate(&self) -> Option<f64> {
        self.scrape_after.hit_rates_since(&self.scrape_before).user
    }

    /// Items that the server encoded meanwhile.
    pub(super) fn n_encoded(&self) -> f64 {
        self.scrape_after.n_encoded - self.scrape_before.n_encoded
    }
}
