//! Bounds on memory over all connections: bytes of messages that are arriving, and of answers that nobody has taken yet.
//!
//! A connection gets at most a quarter of a budget, so that one peer alone cannot use it up, but always enough for one message.

use crate::telemetry::events;
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A number of bytes that all connections share.
#[derive(Debug)]
pub struct Budget {
    /// The metric's label.
    name: &'static str,
    max: u64,
    max_of_connection: u64,
    used: AtomicU64,
    n_holders: AtomicU64,
}

/// What one connection holds of a budget.
#[derive(Debug, Default)]
pub struct Share(AtomicU64);

/// Bytes of a budget, given back when dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    share: Arc<Share>,
    n_bytes: u64,
}

/// One part in this many is what a single connection may hold.
const CONNECTION_DIVISOR: u64 = 4;

impl Budget {
    /// A budget of `max` bytes. A connection may hold a quarter of it, or `max_message` bytes if that is more.
    pub fn new(name: &'static str, max: u64, max_message: u64) -> Self {
        let max_of_connection = (max / CONNECTION_DIVISOR).max(max_message);
        Budget { name, max, max_of_connection, used: AtomicU64::new(0), n_holders: AtomicU64::new(0) }
    }

    /// Takes `n_bytes` for a connection; none if the connection or all of them together would hold too much.
    pub fn take(self: &Arc<Self>, share: &Arc<Share>, n_bytes: u64) -> Option<Held> {
        self.n_holders.fetch_add(1, Ordering::Relaxed);
        let mut held = Held { budget: Arc::clone(self), share: Arc::clone(share), n_bytes: 0 };
        held.grow(n_bytes).then_some(held)
    }

    /// Sets its metrics.
    pub fn measure(&self) {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        events::budget_measured(self.name, load(&self.used), load(&self.n_holders));
    }

    #[cfg(test)]
    pub(super) fn n_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether no more can be taken, for however small a message.
    pub fn is_exhausted(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.max
    }
}

impl Held {
    /// Takes `n_bytes` more. False, and nothing is taken, if that would be too much.
    pub fn grow(&mut self, n_bytes: u64) -> bool {
        if !add(&self.share.0, n_bytes, self.budget.max_of_connection) {
            return false;
        }
        if !add(&self.budget.used, n_bytes, self.budget.max) {
            self.share.0.fetch_sub(n_bytes, Ordering::Relaxed);
            return false;
        }
        self.n_bytes += n_bytes;
        true
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.share.0.fetch_sub(self.n_bytes, Ordering::Relaxed);
        self.budget.used.fetch_sub(self.n_bytes, Ordering::Relaxed);
        self.budget.n_holders.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds `n` if the sum is at most `max`.
fn add(used: &AtomicU64, n: u64, max: u64) -> bool {
    let within = |used: u64| used.checked_add(n).filter(|sum| *sum <= max);
    used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_one_connection_nor_all_together_hold_more_than_their_bound() {
        let budget = Arc::new(Budget::new("test", 100, 10));
        let shares: Vec<Arc<Share>> = (0..5).map(|_| Arc::default()).collect();
        let mut first = budget.take(&shares[0], 20).unwrap();
        assert!(first.grow(5) && !first.grow(1), "one connection holds more than a quarter");
        let others: Vec<Held> = shares[1..4].iter().map(|share| budget.take(share, 25).unwrap()).collect();
        assert!(budget.is_exhausted() && budget.take(&shares[4], 1).is_none());
        drop(first);
        assert!(budget.take(&shares[4], 26).is_none(), "more than the budget was taken");
        let last = budget.take(&shares[4], 25);
        assert!(last.is_some());
        drop((others, last));
        let left = [&budget.used, &budget.n_holders].map(|number| number.load(Ordering::Relaxed));
        assert_eq!(left, [0, 0]);
        assert!(shares.iter().all(|share| share.0.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_connection_may_always_hold_one_message() {
        let budget = Arc::new(Budget::new("test", 100, 60));
        assert!(budget.take(&Arc::default(), 60).is_some());
        assert!(budget.take(&Arc::default(), 61).is_none());
    }
}
