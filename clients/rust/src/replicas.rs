//! Which server gets the next call.
//!
//! A call goes to the replica with the fewest calls in flight. A replica that does not take a call cools down: for
//! [`COOL_DOWN`] the others get its calls. Then one call probes it, and the others keep avoiding it until that probe is
//! answered. A replica that drains or is gone so costs one failed attempt per cool-down, however many calls there are. Where
//! every replica is avoided, the one that failed longest ago is asked.
//!
//! This is not tonic's own balancing, which does not tell which replica a call went to: each replica remembers texts of its
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

/// Large enough for pages of ten thousand candidates with every output.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// About as long as a replica needs to leave a load balancer's list, or to come back from a restart with warm caches.
const COOL_DOWN: Duration = Duration::from_secs(1);

/// One server.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) address: String,
    pub(crate) sent_texts: SentTexts,
    service: MidEmbServiceClient<Channel>,
    n_in_flight: AtomicUsize,
    /// None while the replica takes calls. The lock is never held while waiting.
    failure: Mutex<Option<FailureState>>,
}

/// A replica that did not take its last call.
#[derive(Debug, Clone, Copy)]
struct FailureState {
    at: Instant,
    has_probe_in_flight: bool,
}

impl Replica {
    pub(crate) fn new(address: &Address, channel: Channel, max_remembered_items: usize) -> Self {
        Replica {
            address: address.name.clone(),
            sent_texts: SentTexts::new(max_remembered_items),
            service: MidEmbServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
            n_in_flight: AtomicUsize::new(0),
            failure: Mutex::new(None),
        }
    }

    /// The generated client. Its clones share one connection.
    pub(crate) fn service(&self) -> MidEmbServiceClient<Channel> {
        self.service.clone()
    }

    /// Counts one call as in flight until it is dropped. The first call after a cool-down is the probe.
    pub(crate) fn start_call(&self) -> CallInFlight<'_> {
        self.n_in_flight.fetch_add(1, Ordering::Relaxed);
        let mut is_probe = false;
        self.with_failure(|failure| {
            if let Some(state) = failure
                && !state.has_probe_in_flight
            {
                state.has_probe_in_flight = true;
                is_probe = true;
            }
        });
        CallInFlight { replica: self, is_probe }
    }

    /// Whether calls should go to other replicas: during a cool-down, and while a probe is in flight.
    pub(crate) fn is_avoided(&self) -> bool {
        self.avoided_since().is_some()
    }

    fn avoided_since(&self) -> Option<Instant> {
        let failure = self.with_failure(|failure| *failure)?;
        (failure.has_probe_in_flight || failure.at.elapsed() < COOL_DOWN).then_some(failure.at)
    }

    fn with_failure<T>(&self, f: impl FnOnce(&mut Option<FailureState>) -> T) -> T {
        f(&mut self.failure.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A call that is counted as in flight.
#[derive(Debug)]
pub(crate) struct CallInFlight<'a> {
    pub(crate) replica: &'a Replica,
    is_probe: bool,
}

impl CallInFlight<'_> {
    /// The replica answered the call, with a result or with an error of its own.
    pub(crate) fn was_answered(mut self) {
        self.is_probe = false;
        self.replica.with_failure(|failure| *failure = None);
    }

    /// The replica did not take the call; the cool-down begins.
    pub(crate) fn was_not_taken(mut self) {
        let is_probe = std::mem::take(&mut self.is_probe);
        self.replica.with_failure(|failure| {
            let has_other_probe = !is_probe && failure.is_some_and(|state| state.has_probe_in_flight);
            *failure = Some(FailureState { at: Instant::now(), has_probe_in_flight: has_other_probe });
        });
    }
}

/// A call that ends in neither way was cancelled or timed out, and says nothing about its replica. After such a probe, another
/// cool-down begins, so that a host that swallows all packets does not cost one call after the other.
impl Drop for CallInFlight<'_> {
    fn drop(&mut self) {
        self.replica.n_in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.is_probe {
            self.replica.with_failure(|failure| {
                if let Some(state) = failure {
                    *state = FailureState { at: Instant::now(), has_probe_in_flight: false };
                }
            });
        }
    }
}

/// Whether another attempt has a replica to go to at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Availability {
    /// At least one replica is not avoided.
    SomeReady,
    /// Every replica is avoided.
    NoneReady,
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
        if self.0.iter().all(Replica::is_avoided) { Availability::NoneReady } else { Availability::SomeReady }
    }

    /// The replica that should get the next call.
    pub(crate) fn best(&self) -> &Replica {
        // The search starts at a random place; otherwise the first replica would win every tie, and get every lone call.
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
    match (a.avoided_since(), b.avoided_since()) {
        (None, Some(_)) => true,
        (Some(_), None) => false,
        (Some(a), Some(b)) => a < b,
        (None, None) => a.n_in_flight.load(Ordering::Relaxed) < b.n_in_flight.load(Ordering::Relaxed),
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

    fn fail(replica: &Replica) {
        replica.start_call().was_not_taken();
    }

    #[tokio::test(start_paused = true)]
    async fn the_replica_with_the_fewest_calls_in_flight_is_asked() {
        let replicas = replicas(3);
        let _first = replicas.all()[0].start_call();
        let _third = replicas.all()[2].start_call();
        assert_eq!(replicas.best().address, "localhost:2");
        let _second = [replicas.all()[1].start_call(), replicas.all()[1].start_call()];
        assert_ne!(replicas.best().address, "localhost:2");
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_come_one_by_one_are_spread() {
        let replicas = replicas(2);
        let n_first = (0..1000).filter(|_| replicas.best().address == "localhost:1").count();
        assert!((300..700).contains(&n_first), "{n_first} of 1000 calls went to one of two replicas");
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_failed_is_avoided_unless_all_are() {
        let replicas = replicas(2);
        fail(&replicas.all()[0]);
        let _busy = replicas.all()[1].start_call();
        assert_eq!(replicas.best().address, "localhost:2");
        assert_eq!(replicas.availability(), Availability::SomeReady);
        tokio::time::advance(COOL_DOWN / 2).await;
        fail(&replicas.all()[1]);
        assert_eq!(replicas.best().address, "localhost:1");
        assert_eq!(replicas.availability(), Availability::NoneReady);
        tokio::time::advance(COOL_DOWN / 2).await;
        assert_eq!(replicas.best().address, "localhost:1");
        replicas.all()[1].start_call().was_answered();
        let _busier = [replicas.all()[0].start_call(), replicas.all()[0].start_call()];
        assert_eq!(replicas.best().address, "localhost:2");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_cool_down_a_single_call_probes_the_replica() {
        let replicas = replicas(2);
        let failed = &replicas.all()[0];
        fail(failed);
        let _busy = replicas.all()[1].start_call();
        tokio::time::advance(COOL_DOWN).await;
        assert_eq!(replicas.best().address, failed.address);
        let probe = failed.start_call();
        tokio::time::advance(10 * COOL_DOWN).await;
        assert_eq!(replicas.best().address, "localhost:2", "a second call went to a replica that is being probed");
        // A call of before the failure ends now. It is not the probe, which stays the only one.
        fail(failed);
        tokio::time::advance(COOL_DOWN).await;
        assert!(failed.is_avoided());
        probe.was_answered();
        assert_eq!(replicas.best().address, failed.address);
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_fails_or_is_never_answered_begins_another_cool_down() {
        let replicas = replicas(1);
        let replica = &replicas.all()[0];
        fail(replica);
        for ends_in_failure in [true, false] {
            tokio::time::advance(COOL_DOWN).await;
            assert!(!replica.is_avoided());
            let probe = replica.start_call();
            if ends_in_failure {
                probe.was_not_taken();
            } else {
                drop(probe);
            }
            assert!(replica.is_avoided());
        }
        tokio::time::advance(COOL_DOWN).await;
        assert!(!replica.is_avoided());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_times_out_says_nothing_about_a_healthy_replica() {
        let replicas = replicas(1);
        drop(replicas.all()[0].start_call());
        assert!(!replicas.all()[0].is_avoided());
    }
}
