//! Which models serve, and which of them answers a user.
//!
//! A request takes one [`Snapshot`] at its start and keeps it to its end: nothing that happens to the registry meanwhile
//! can mix two models in one answer.
//!
//! A user stays with a model for as long as the shares stay. Where the share of the last model grows (a canary), its users
//! stay and others join them. The salt draws anew: with another one, who was in one experiment's share says nothing about
//! who is in the next one's.

use super::Model;
use crate::{cache::snapshot::Served, domain::error::Error};
use arc_swap::ArcSwapOption;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// A model and its part of the traffic.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// The model.
    pub model: Arc<Model>,
    /// Percent of the requests that name no model. All shares of a snapshot add up to 100.
    pub share: u8,
}

/// A model that scores what another one answers, and is compared with it.
#[derive(Debug, Clone)]
pub struct Shadow {
    /// The model.
    pub model: Arc<Model>,
    /// Whose requests it scores.
    pub of: String,
    /// Percent of that model's users.
    pub percent: u8,
    /// Requests that it may have under way.
    pub room: Arc<Semaphore>,
}

/// The models that serve at one moment; at least one.
#[derive(Debug)]
pub struct Snapshot {
    /// In the config's order.
    pub models: Vec<ServedModel>,
    /// In the config's order.
    pub shadows: Vec<Shadow>,
    draw: Draw,
}

impl Snapshot {
    /// What these models are from now on. `salt` draws the users of their shares.
    pub fn new(models: Vec<ServedModel>, shadows: Vec<Shadow>, salt: &str) -> Self {
        Snapshot { models, shadows, draw: Draw::new(salt) }
    }

    /// The model named, or the one that `user_id` is always routed to.
    pub fn route(&self, name: Option<&str>, user_id: &str) -> Result<&Arc<Model>, Error> {
        let served = match name {
            Some(name) => self.models.iter().find(|served| served.model.reference.name == name),
            None => {
                let place = share_of(self.models.iter().map(|served| served.share), self.draw.percent(user_id));
                place.map(|i| &self.models[i])
            }
        };
        served.map(|served| &served.model).ok_or_else(|| Error::ModelNotFound(name.unwrap_or_default().to_owned()))
    }

    /// The shadows that score what `model` answers to this user.
    pub fn shadows_of<'a>(&'a self, model: &'a Model, user_id: &str) -> impl Iterator<Item = &'a Shadow> {
        let of_model = |shadow: &&Shadow| shadow.of == model.reference.name;
        let is_drawn = move |shadow: &&Shadow| self.draw.shadow_percent(user_id) < u16::from(shadow.percent);
        self.shadows.iter().filter(of_model).filter(is_drawn)
    }

    /// The parts of its models whose vectors are cached. Models may share parts.
    pub fn cached_parts(&self) -> Vec<Served> {
        let parts = |model: &Arc<Model>| Served {
            encoder: model.encoder.digest(),
            content_dim: model.manifest.encoder.dim,
            tower: model.tower_digest,
            item_dim: model.manifest.item_tower.dim,
        };
        self.all().map(parts).collect()
    }

    /// Every model, those that answer first.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Model>> {
        self.models.iter().map(|served| &served.model).chain(self.shadows.iter().map(|shadow| &shadow.model))
    }
}

/// Draws users by keyed hashes of their ids: one key for the shares, another for the shadows, so that a shadow at 10 % sees
/// some of every share.
#[derive(Debug)]
struct Draw {
    share_key: [u8; 32],
    shadow_key: [u8; 32],
}

impl Draw {
    fn new(salt: &str) -> Self {
        let key = |context| blake3::derive_key(context, salt.as_bytes());
        Draw { share_key: key("midemb 2026-11 shares of users"), shadow_key: key("midemb 2026-11 users of shadows") }
    }

    /// From 0 to 99, evenly over users.
    fn percent(&self, user_id: &str) -> u16 {
        percent(&self.share_key, user_id)
    }

    fn shadow_percent(&self, user_id: &str) -> u16 {
        percent(&self.shadow_key, user_id)
    }
}

fn percent(key: &[u8; 32], user_id: &str) -> u16 {
    let hash = blake3::keyed_hash(key, user_id.as_bytes());
    let first_8 = hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    (first_8 % 100) as u16
}

/// Which of `shares` (percent, adding up to 100) a user of this percent falls into.
fn share_of(shares: impl Iterator<Item = u8>, percent: u16) -> Option<usize> {
    let mut upper = 0;
    shares.map(u16::from).position(|share| {
        upper += share;
        percent < upper
    })
}

/// The snapshot in force; none while the server starts.
#[derive(Debug, Default)]
pub struct Registry {
    current: ArcSwapOption<Snapshot>,
}

impl Registry {
    /// The snapshot in force.
    pub fn current(&self) -> Result<Arc<Snapshot>, Error> {
        self.current.load_full().ok_or(Error::Unavailable("the models are being loaded"))
    }

    /// Puts a snapshot in force, at once for every request that starts from now on.
    pub fn install(&self, snapshot: Arc<Snapshot>) {
        self.current.store(Some(snapshot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(shares: &[u8], salt: &str) -> Vec<usize> {
        let draw = Draw::new(salt);
        let place = |i| share_of(shares.iter().copied(), draw.percent(&format!("user-{i}"))).unwrap();
        (0..10_000).map(place).collect()
    }

    #[test]
    fn users_stay_where_they_are_and_shares_are_kept() {
        let users = places(&[10, 0, 90], "");
        assert_eq!(users, places(&[10, 0, 90], ""));
        let n_users = |place| users.iter().filter(|p| **p == place).count();
        assert_eq!(n_users(1), 0, "a share of 0 had users");
        assert!((850..1150).contains(&n_users(0)), "{}", n_users(0));
    }

    #[test]
    fn a_canary_that_grows_keeps_its_users() {
        let (mut canary, mut n_before) = (places(&[100, 0], "s"), 0);
        for share in [1, 5, 25, 50, 100] {
            let grown = places(&[100 - share, share], "s");
            assert!(canary.iter().zip(&grown).all(|(before, now)| now >= before), "a user of the canary left it");
            let n_now = grown.iter().filter(|place| **place == 1).count();
            assert!(n_now > n_before && n_now.abs_diff(usize::from(share) * 100) < 200, "{n_now} users in {share} %");
            (canary, n_before) = (grown, n_now);
        }
    }

    #[test]
    fn another_salt_is_another_draw() {
        let (one, other) = (places(&[50, 50], "ranking-7"), places(&[50, 50], "ranking-8"));
        let n_same = one.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((4700..5300).contains(&n_same), "{n_same} of 10000 users fell on the same side twice");
        let draw = Draw::new("ranking-7");
        let in_both = |i: &u32| {
            let user = format!("user-{i}");
            draw.percent(&user) < 50 && draw.shadow_percent(&user) < 50
        };
        let n_both = (0..10_000).filter(in_both).count();
        assert!((2300..2700).contains(&n_both), "{n_both} of 10000: a shadow's users are not drawn from all shares");
    }

    #[test]
    fn an_empty_registry_is_unavailable() {
        assert!(matches!(Registry::default().current(), Err(Error::Unavailable(_))));
    }
}
