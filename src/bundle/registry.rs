//! The models that serve, and which of them answers a user.
//!
//! A request loads one [`ModelSet`] when it starts and uses it until it ends, so a change of the registry cannot mix two
//! models in one answer.
//!
//! A user stays with a model as long as the shares stay the same. If the share of the last model grows (a canary), the
//! model keeps its users and gains others. A different salt assigns users anew, so the groups of one experiment are
//! independent of the groups of the next.

use super::Model;
use crate::{cache::snapshot::Served, domain::error::Error};
use arc_swap::ArcSwapOption;
use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};
use tokio::sync::Semaphore;

/// A model and its share of the traffic.
#[derive(Debug, Clone)]
pub struct ServedModel {
    #[expect(missing_docs, reason = "its type says it all")]
    pub model: Arc<Model>,
    /// Percent of the requests that name no model. The shares of a [`ModelSet`] add up to 100.
    pub share: u8,
}

/// A model that scores the requests of another model, to be compared with it.
#[derive(Debug, Clone)]
pub struct Shadow {
    #[expect(missing_docs, reason = "its type says it all")]
    pub model: Arc<Model>,
    /// The name of the model whose requests it scores.
    pub shadow_of: String,
    /// Percent of that model's users.
    pub percent: u8,
    /// One permit per request that it may score at the same time.
    pub permits: Arc<Semaphore>,
}

/// The models that serve at the same time; at least one of them is live.
#[derive(Debug)]
pub struct ModelSet {
    /// The models that answer requests, in the config's order.
    pub live: Vec<ServedModel>,
    /// The shadows, in the config's order.
    pub shadows: Vec<Shadow>,
    user_buckets: UserBuckets,
}

impl ModelSet {
    /// Creates a set whose users are assigned to shares with `salt`.
    pub fn new(live: Vec<ServedModel>, shadows: Vec<Shadow>, salt: &str) -> Self {
        ModelSet { live, shadows, user_buckets: UserBuckets::new(salt) }
    }

    /// The live model with this name, or without a name the one whose share `routing_key` falls into.
    pub fn route(&self, name: Option<&str>, routing_key: &RoutingKey) -> Result<&Arc<Model>, Error> {
        let served = match name {
            Some(name) => self.live.iter().find(|served| served.model.reference.name == name),
            None => {
                let shares = self.live.iter().map(|served| served.share);
                index_of_share(shares, self.share_bucket(routing_key)).map(|i| &self.live[i])
            }
        };
        served.map(|served| &served.model).ok_or_else(|| Error::model_not_found(name.unwrap_or_default()))
    }

    /// From 0 to 99: which percent of the traffic this key belongs to.
    pub(crate) fn share_bucket(&self, routing_key: &RoutingKey) -> u16 {
        self.user_buckets.share_bucket(routing_key)
    }

    /// The shadows that score a request with this key that `model` answers.
    pub fn shadows_of<'a>(&'a self, model: &'a Model, routing_key: &RoutingKey) -> impl Iterator<Item = &'a Shadow> {
        let shadows_model = |shadow: &&Shadow| shadow.shadow_of == model.reference.name;
        let covers_user =
            move |shadow: &&Shadow| self.user_buckets.shadow_bucket(routing_key) < u16::from(shadow.percent);
        self.shadows.iter().filter(shadows_model).filter(covers_user)
    }

    /// The digests and dimensions of each model's encoder and item tower, which the caches key vectors by. Models may share
    /// parts.
    pub fn cached_parts(&self) -> Vec<Served> {
        let parts = |model: &Arc<Model>| Served {
            encoder: model.encoder.digest(),
            content_dim: model.manifest.encoder.dim,
            tower: model.tower_digest,
            record_dim: model.manifest.item_tower.record_dims().width(),
        };
        self.all().map(parts).collect()
    }

    /// Every model: the live ones, then the shadows.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.live.iter().map(|served| &served.model).chain(self.shadows.iter().map(|shadow| &shadow.model))
    }
}

/// What routes a request: requests with the same key are answered by the same model. All replicas give a user the same key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoutingKey(Box<[u8]>);

impl RoutingKey {
    /// The key of a user. A visitor without an id has the key of the history's item ids; one without a history either has a random
    /// key.
    pub fn new<'a>(user_id: &str, history: impl ExactSizeIterator<Item = &'a str>) -> Self {
        if !user_id.is_empty() {
            return RoutingKey(user_id.as_bytes().into());
        }
        if history.len() == 0 {
            return RoutingKey(RandomState::new().hash_one(()).to_le_bytes().into());
        }
        let mut hasher = blake3::Hasher::new();
        for id in history {
            hasher.update(&(id.len() as u64).to_le_bytes());
            hasher.update(id.as_bytes());
        }
        RoutingKey(hasher.finalize().as_bytes().as_slice().into())
    }
}

/// Assigns users to buckets by keyed hashes of their routing keys. Shares and shadows have different keys, so that a shadow at 10 %
/// covers some users of every share.
#[derive(Debug)]
struct UserBuckets {
    share_key: [u8; 32],
    shadow_key: [u8; 32],
}

impl UserBuckets {
    fn new(salt: &str) -> Self {
        let key = |context| blake3::derive_key(context, salt.as_bytes());
        UserBuckets {
            share_key: key("midemb 2026-11 shares of users"),
            shadow_key: key("midemb 2026-11 users of shadows"),
        }
    }

    /// From 0 to 99; users are spread evenly.
    fn share_bucket(&self, routing_key: &RoutingKey) -> u16 {
        bucket(&self.share_key, routing_key)
    }

    fn shadow_bucket(&self, routing_key: &RoutingKey) -> u16 {
        bucket(&self.shadow_key, routing_key)
    }
}

fn bucket(key: &[u8; 32], routing_key: &RoutingKey) -> u16 {
    let hash = blake3::keyed_hash(key, &routing_key.0);
    let first_8 = hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    (first_8 % 100) as u16
}

/// The index of the share (percent, adding up to 100) that covers this bucket.
fn index_of_share(shares: impl Iterator<Item = u8>, bucket: u16) -> Option<usize> {
    let mut upper = 0;
    for (i, share) in shares.enumerate() {
        upper += u16::from(share);
        if bucket < upper {
            return Some(i);
        }
    }
    None
}

/// Holds the models that serve; empty while the server starts.
#[derive(Debug, Default)]
pub struct Registry {
    current: ArcSwapOption<ModelSet>,
}

impl Registry {
    /// The models that serve; an error while the server starts.
    pub fn current(&self) -> Result<Arc<ModelSet>, Error> {
        self.current.load_full().ok_or(Error::Unavailable("the models are being loaded"))
    }

    /// Replaces the models, for every request that starts from now on.
    pub fn install(&self, models: Arc<ModelSet>) {
        self.current.store(Some(models));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(i: u32) -> RoutingKey {
        RoutingKey::new(&format!("user-{i}"), [].into_iter())
    }

    /// The index of the share that each of 10,000 users falls into.
    fn assign_users(shares: &[u8], salt: &str) -> Vec<usize> {
        let buckets = UserBuckets::new(salt);
        let index = |i| index_of_share(shares.iter().copied(), buckets.share_bucket(&user(i))).unwrap();
        (0..10_000).map(index).collect()
    }

    #[test]
    fn users_keep_their_model_and_shares_are_respected() {
        let users = assign_users(&[10, 0, 90], "");
        assert_eq!(users, assign_users(&[10, 0, 90], ""));
        let n_users = |share| users.iter().filter(|index| **index == share).count();
        assert_eq!(n_users(1), 0, "a share of 0 had users");
        assert!((850..1150).contains(&n_users(0)), "{}", n_users(0));
    }

    #[test]
    fn a_growing_canary_keeps_its_users() {
        let (mut canary, mut n_before) = (assign_users(&[100, 0], "s"), 0);
        for share in [1, 5, 25, 50, 100] {
            let grown = assign_users(&[100 - share, share], "s");
            assert!(canary.iter().zip(&grown).all(|(before, now)| now >= before), "a user left the canary");
            let n_now = grown.iter().filter(|index| **index == 1).count();
            assert!(n_now > n_before && n_now.abs_diff(usize::from(share) * 100) < 200, "{n_now} users in {share} %");
            (canary, n_before) = (grown, n_now);
        }
    }

    #[test]
    fn another_salt_assigns_users_independently() {
        let (one, other) = (assign_users(&[50, 50], "ranking-7"), assign_users(&[50, 50], "ranking-8"));
        let n_same = one.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((4700..5300).contains(&n_same), "{n_same} of 10000 users have the same model under both salts");
        let buckets = UserBuckets::new("ranking-7");
        let in_both = |i: &u32| {
            let user = user(*i);
            buckets.share_bucket(&user) < 50 && buckets.shadow_bucket(&user) < 50
        };
        let n_both = (0..10_000).filter(in_both).count();
        assert!((2300..2700).contains(&n_both), "{n_both} of 10000: a shadow's users do not come from all shares");
    }

    #[test]
    fn a_visitor_without_an_id_is_routed_by_history_and_without_one_at_random() {
        let key = |history: &[&str]| RoutingKey::new("", history.iter().copied());
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        for other in [key(&["b", "a"]), key(&["ab"]), key(&["a", "", "b"]), RoutingKey::new("a", [].into_iter())] {
            assert_ne!(key(&["a", "b"]), other);
        }
        let buckets = UserBuckets::new("");
        let n_first_half = (0..10_000).filter(|_| buckets.share_bucket(&key(&[])) < 50).count();
        assert!((4700..5300).contains(&n_first_half), "{n_first_half} of 10000 visitors in a share of 50 %");
        let by_history = |i: u32| buckets.share_bucket(&key(&[&i.to_string()])) < 50;
        let n_first_half = (0..10_000).filter(|i| by_history(*i)).count();
        assert!((4700..5300).contains(&n_first_half), "{n_first_half} of 10000 histories in a share of 50 %");
    }

    #[test]
    fn an_empty_registry_is_unavailable() {
        assert!(matches!(Registry::default().current(), Err(Error::Unavailable(_))));
    }
}
