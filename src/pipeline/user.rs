//! The user's side of a request: a user embedding that is cached, or the history that the user tower reads.

use super::{Page, Pipeline, rows::Rows};
use crate::{
    bundle::Model,
    cache::users::HistoryHasher,
    domain::{Action, RowStatus, UserKey, Vector},
    towers::user_tower::History,
};

/// Where the user embedding comes from.
pub(super) enum UserSource {
    /// It was computed for an earlier page of the session.
    Cached(Vector),
    /// The user tower has to run.
    History {
        /// Oldest first.
        history: History,
        /// The key to cache the result under; none if an item has no record, because the key stands for the complete history.
        key: Option<UserKey>,
    },
}

/// What is known of the user before any item is looked up.
pub(super) struct User {
    /// The key of the user's complete history.
    key: UserKey,
    /// The user embedding, if an earlier page of the session computed it.
    pub(super) cached: Option<Vector>,
}

impl Pipeline {
    pub(super) fn look_up_user(&self, model: &Model, page: &Page) -> User {
        let mut key = HistoryHasher::new(model.user_tower_digest);
        for (position, known) in page.history.iter().enumerate() {
            if let Ok(known) = known {
                key.add(known.digest, model.action_codes.map(|codes| codes.code(page.action(position))));
            }
        }
        let key = key.finish();
        User { key, cached: self.caches.users.get(&key) }
    }
}

impl User {
    /// Where the user embedding comes from, if `rows` hold what was found of the history. A history item without a record is left
    /// out.
    pub(super) fn into_source(self, model: &Model, page: &Page, rows: &mut Rows) -> UserSource {
        if let Some(user) = self.cached {
            return UserSource::Cached(user);
        }
        let is_used = |position: &usize| rows.statuses[*position] == RowStatus::Ok;
        let used = (0..page.history.len()).filter(is_used);
        let actions: Vec<Action> = used.map(|position| page.action(position)).collect();
        let is_complete = actions.len() == page.history.iter().flatten().count();
        let codes = model.action_codes.map(|codes| codes.of_history(&actions, actions.len()));
        let history = History { adapted: rows.take_ready(), actions: codes.unwrap_or_default() };
        UserSource::History { history, key: is_complete.then_some(self.key) }
    }
}
