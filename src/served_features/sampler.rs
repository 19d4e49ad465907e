//! Which requests are sampled. Takes no lock and allocates nothing.

use crate::domain::digest::hex;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::atomic::{AtomicU64, Ordering};

/// How many of the requests or users are sampled: those whose 64 random bits are below this bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

/// The number of values that 64 bits have.
const N_VALUES: f64 = 18_446_744_073_709_551_616.0;

impl Rate {
    /// The rate of a percentage; none unless it is from 0 to 100.
    pub fn from_percent(percent: f64) -> Option<Self> {
        // The conversion saturates, so that 100 % is the greatest bound.
        (0.0..=100.0).contains(&percent).then_some(Rate((percent / 100.0 * N_VALUES) as u64))
    }

    fn covers(self, bits: u64) -> bool {
        bits < self.0 || self.0 == u64::MAX
    }
}

/// What is sampled as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleBy {
    /// Every request is drawn for itself.
    Request,
    /// All requests of a user are sampled or none. Those of visitors without an id are drawn one by one.
    User,
}

/// Draws requests at a rate that may change at any time.
#[derive(Debug)]
pub(super) struct Sampler {
    rate: AtomicU64,
    by: SampleBy,
    user_key: [u8; 32],
}

impl Sampler {
    pub(super) fn new(rate: Rate, by: SampleBy) -> Self {
        // A key of its own, so that a sample is spread over the shares of all models, and the same one in every replica.
        let user_key = blake3::derive_key("midemb 2026-11 users of served features", &[]);
        Sampler { rate: AtomicU64::new(rate.0), by, user_key }
    }

    pub(super) fn set_rate(&self, rate: Rate) {
        self.rate.store(rate.0, Ordering::Relaxed);
    }

    /// Whether a request of this user is sampled.
    pub(super) fn draws(&self, user_id: &str) -> bool {
        let is_sticky = self.by == SampleBy::User && !user_id.is_empty();
        let bits = if is_sticky { self.hash(user_id) } else { fastrand::u64(..) };
        Rate(self.rate.load(Ordering::Relaxed)).covers(bits)
    }

    fn hash(&self, user_id: &str) -> u64 {
        let hash = blake3::keyed_hash(&self.user_key, user_id.as_bytes());
        hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// 128 random bits in hex.
pub(super) fn random_id() -> String {
    let mut bytes = [0; 16];
    if getrandom(&mut bytes, GetRandomFlags::empty()) != Ok(bytes.len()) {
        // The kernel gives so few bytes in one piece or, before it has any, not at all.
        fastrand::fill(&mut bytes);
    }
    hex(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::registry::{ModelSet, RoutingKey};

    fn users() -> impl Iterator<Item = String> {
        (0..20_000).map(|i| format!("user-{i}"))
    }

    fn sampled(percent: f64) -> Vec<String> {
        let sampler = Sampler::new(Rate::from_percent(percent).unwrap(), SampleBy::User);
        users().filter(|user| sampler.draws(user)).collect()
    }

    #[test]
    fn a_percentage_is_from_0_to_100() {
        for percent in [-1.0, 100.000_001, f64::NAN, f64::INFINITY] {
            assert_eq!(Rate::from_percent(percent), None, "{percent}");
        }
        assert!(Rate::from_percent(100.0).unwrap().covers(u64::MAX));
        assert!(!Rate::from_percent(0.0).unwrap().covers(0));
        let half = Rate::from_percent(50.0).unwrap();
        assert!(half.covers(u64::MAX / 2) && !half.covers(u64::MAX / 2 + 1));
    }

    #[test]
    fn users_stay_in_the_sample_and_a_higher_rate_adds_others() {
        let (few, more) = (sampled(1.0), sampled(20.0));
        assert_eq!(few, sampled(1.0));
        assert!((120..280).contains(&few.len()), "{} of 20000 users at 1 %", few.len());
        assert!((3700..4300).contains(&more.len()), "{} of 20000 users at 20 %", more.len());
        assert!(few.iter().all(|user| more.contains(user)), "a user left the sample");
        assert_eq!(sampled(100.0).len(), 20_000);
    }

    /// A sample that came from one share alone would train on one side of an experiment.
    #[test]
    fn the_sample_of_users_is_independent_of_their_models() {
        let half = sampled(50.0);
        for salt in ["", "ranking-7"] {
            let models = ModelSet::new(Vec::new(), Vec::new(), salt);
            let in_first_half = |user: &&String| models.share_bucket(&RoutingKey::new(user, [].into_iter())) < 50;
            let n_first = half.iter().filter(in_first_half).count();
            let share = n_first as f64 / half.len() as f64;
            assert!((0.48..0.52).contains(&share), "{share} of the sampled users are in a share of 50 %");
        }
    }

    #[test]
    fn requests_and_visitors_without_an_id_are_drawn_one_by_one() {
        let rate = Rate::from_percent(30.0).unwrap();
        for (by, user) in [(SampleBy::Request, "user-1"), (SampleBy::User, "")] {
            let sampler = Sampler::new(rate, by);
            let n_drawn = (0..10_000).filter(|_| sampler.draws(user)).count();
            assert!((2700..3300).contains(&n_drawn), "{n_drawn} of 10000 at 30 %");
        }
        let sampler = Sampler::new(rate, SampleBy::User);
        let first = sampler.draws("user-1");
        assert!((0..100).all(|_| sampler.draws("user-1") == first));
        sampler.set_rate(Rate::from_percent(100.0).unwrap());
        assert!(sampler.draws("user-1") && sampler.draws("user-2"));
    }

    #[test]
    fn made_ids_have_128_bits_and_differ() {
        let (one, other) = (random_id(), random_id());
        assert!(one != other && one.len() == 32 && one.bytes().all(|byte| byte.is_ascii_hexdigit()), "{one}");
    }
}
