//! Which models serve, and which of them answers a user.
//!
//! A request takes one [`Snapshot`] at its start and keeps it to its end: nothing that happens to the registry meanwhile
//! can mix two models in one answer.

use super::Model;
use crate::error::Error;
use arc_swap::ArcSwapOption;
use std::sync::Arc;

/// A model and its part of the traffic.
#[derive(Debug, Clone)]
pub struct ServedModel {
    /// The model.
    pub model: Arc<Model>,
    /// Percent of the requests that name no model. All shares of a snapshot add up to 100.
    pub share: u8,
}

/// The models that serve at one moment; at least one.
#[derive(Debug)]
pub struct Snapshot {
    /// In the config's order.
    pub models: Vec<ServedModel>,
}

impl Snapshot {
    /// The model named, or the one that `user_id` is always routed to.
    pub fn route(&self, name: Option<&str>, user_id: &str) -> Result<&Arc<Model>, Error> {
        let served = match name {
            Some(name) => self.models.iter().find(|served| served.model.reference.name == name),
            None => share_of(self.models.iter().map(|served| served.share), user_id).map(|i| &self.models[i]),
        };
        served.map(|served| &served.model).ok_or_else(|| Error::ModelNotFound(name.unwrap_or_default().to_owned()))
    }
}

/// Which of `shares` (percent, adding up to 100) the user falls into: always the same, and evenly over users.
fn share_of(shares: impl Iterator<Item = u8>, user_id: &str) -> Option<usize> {
    let hash = blake3::hash(user_id.as_bytes());
    let first_8 = hash.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let percent = (first_8 % 100) as u16;
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
    pub fn install(&self, snapshot: Snapshot) {
        self.current.store(Some(Arc::new(snapshot)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_stay_where_they_are_and_shares_are_kept() {
        let shares = [10_u8, 0, 90];
        let mut n_users = [0; 3];
        for i in 0..10_000 {
            let user = format!("user-{i}");
            let place = share_of(shares.into_iter(), &user).unwrap();
            assert_eq!(share_of(shares.into_iter(), &user), Some(place));
            n_users[place] += 1;
        }
        assert_eq!(n_users[1], 0, "a share of 0 had users");
        assert!((850..1150).contains(&n_users[0]), "{n_users:?}");
    }

    #[test]
    fn an_empty_registry_is_unavailable() {
        assert!(matches!(Registry::default().current(), Err(Error::Unavailable(_))));
    }
}
