//! The servers that share the calls.
//!
//! A call goes to the replica with the fewest calls under way. One that did not take a call rests for a moment, in which the
//! others get its calls, so that a replica that drains or is gone costs one failed attempt and not every second one. Where
//! all rest, the one that has rested longest is asked.
//!
//! This is not tonic's own balancing, as that does not tell which replica a call went to: each replica remembers texts of its
//! own, and another attempt should go to another replica.

use crate::{connection::Address, proto::mid_emb_service_client::MidEmbServiceClient, sent_texts::SentTexts};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tonic::transport::Channel;

/// Pages of ten thousand candidates with every output fit.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// About as long as a replica needs to leave a load balancer's list, or to come back from a restart with warm caches.
const REST: Duration = Duration::from_secs(1);

/// One server.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) address: String,
    pub(crate) sent_texts: SentTexts,
    service: MidEmbServiceClient<Channel>,
    n_under_way: AtomicUsize,
    /// When it last did not take a call. Held for a copy only.
    failed_at: Mutex<Option<Instant>>,
}

impl Replica {
    pub(crate) fn new(address: &Address, channel: Channel, max_remembered_items: usize) -> Self {
        Replica {
            address: address.name.clone(),
            sent_texts: SentTexts::new(max_remembered_items),
            service: MidEmbServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
            n_under_way: AtomicUsize::new(0),
            failed_at: Mutex::new(None),
        }
    }

    /// The generated client. Its clones share one connection.
    pub(crate) fn service(&self) -> MidEmbServiceClient<Channel> {
        self.service.clone()
    }

    /// Counts one call until what it returns is dropped.
    pub(crate) fn call_under_way(&self) -> CallUnderWay<'_> {
        self.n_under_way.fetch_add(1, Ordering::Relaxed);
        CallUnderWay(self)
    }

    pub(crate) fn has_answered(&self) {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn did_not_take_a_call(&self) {
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(crate) fn rests(&self) -> bool {
        self.resting_since().is_some()
    }

    /// When it failed, while it still rests.
    fn resting_since(&self) -> Option<Instant> {
        let failed_at = *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        failed_at.filter(|failed_at| failed_at.elapsed() < REST)
    }
}

/// A call that is counted as under way.
#[derive(Debug)]
pub(crate) struct CallUnderWay<'a>(&'a Replica);

impl Drop for CallUnderWay<'_> {
    fn drop(&mut self) {
        self.0.n_under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether another attempt has a replica to go to at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Availability {
    /// At least one replica does not rest.
    SomeReady,
    /// No replica took its last call, and that was a moment ago.
    AllRest,
}

/// All servers of a client; at least one.
#[derive(Debug)]
pub(crate) struct Replicas(Vec<Replica>);

impl Replicas {
    pub(crate) fn new(replicas: Vec<Replica>) -> Self {
        assert!(!replicas.is_empty(), "a client without a server");
        Replicas(replicas)
    }

    pub(crate) fn all(&self) -> &[Replica] {
        &self.0
    }

    pub(crate) fn availability(&self) -> Availability {
        if self.0.iter().all(Replica::rests) { Availability::AllRest } else { Availability::SomeReady }
    }

    /// The one to ask next.
    pub(crate) fn pick(&self) -> &Replica {
        // Ties are broken by where the search starts, or the first replica would get every lone call.
        let first = fastrand::usize(..self.0.len());
        let mut best = &self.0[first];
        for i in 1..self.0.len() {
            let other = &self.0[(first + i) % self.0.len()];
            if is_better(other, best) {
                best = other;
            }
        }
        best
    }
}

fn is_better(a: &Replica, b: &Replica) -> bool {
    match (a.resting_since(), b.resting_since()) {
        (None, Some(_)) => true,
        (Some(_), None) => false,
        (Some(a), Some(b)) => a < b,
        (None, None) => a.n_under_way.load(Ordering::Relaxed) < b.n_under_way.load(Ordering::Relaxed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(n: usize) -> Replicas {
        let replica = |i: usize| {
            let address = Address::new(&format!("localhost:{}", i + 1), None).unwrap();
            let channel = address.connect_lazily();
            Replica::new(&address, channel, 0)
        };
        Replicas::new((0..n).map(replica).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn the_replica_with_the_fewest_calls_is_asked() {
        let replicas = replicas(3);
        let _first = replicas.all()[0].call_under_way();
        let _third = replicas.all()[2].call_under_way();
        assert_eq!(replicas.pick().address, "localhost:2");
        let _second = [replicas.all()[1].call_under_way(), replicas.all()[1].call_under_way()];
        assert_ne!(replicas.pick().address, "localhost:2");
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_come_one_by_one_are_spread() {
        let replicas = replicas(2);
        let n_first = (0..1000).filter(|_| replicas.pick().address == "localhost:1").count();
        assert!((300..700).contains(&n_first), "{n_first} of 1000 calls went to one of two replicas");
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_failed_rests_unless_all_do() {
        let replicas = replicas(2);
        replicas.all()[0].did_not_take_a_call();
        let _busy = replicas.all()[1].call_under_way();
        assert_eq!(replicas.pick().address, "localhost:2");
        tokio::time::advance(REST / 2).await;
        replicas.all()[1].did_not_take_a_call();
        assert_eq!(replicas.pick().address, "localhost:1");
        tokio::time::advance(REST / 2).await;
        assert_eq!(replicas.pick().address, "localhost:1");
        replicas.all()[1].has_answered();
        let _busier = [replicas.all()[0].call_under_way(), replicas.all()[0].call_under_way()];
        assert_eq!(replicas.pick().address, "localhost:2");
    }
}
