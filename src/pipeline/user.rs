//! The user's side of a request: a user embedding that is cached, or the content embeddings that the user tower reads.

use super::{Pipeline, Resolved, admission::Deadlines, candidates::unique, vector_or_status};
use crate::{
    bundle::Model,
    content::EmbedRequest,
    domain::{KnownItem, Priority, RowStatus, UserKey, Vector},
    telemetry::events,
};
use std::time::Instant;

/// What is known of the user.
pub(super) struct User {
    /// What is to be told of the history.
    pub(super) history: HistoryUse,
    /// What the user embedding is computed from.
    pub(super) source: UserSource,
}

/// What became of the history.
pub(super) struct HistoryUse {
    /// One an item sent, in order.
    pub(super) statuses: Vec<RowStatus>,
    /// Items behind the user embedding.
    pub(super) n_used: usize,
}

/// Where the user embedding comes from.
pub(super) enum UserSource {
    /// It was computed for an earlier page of the session.
    Cached(Vector),
    /// The user tower has to run.
    History {
        /// `[n, C]`, oldest first.
        contents: Vec<f32>,
        /// What the result may be cached under; nothing where an item was late, as the key says that all were there.
        key: Option<UserKey>,
    },
}

impl Pipeline {
    /// The user's side of a request. History items without a vector in time are left out and say so.
    pub(super) async fn embed_history(&self, model: &Model, history: Resolved, deadlines: Deadlines) -> User {
        let start = Instant::now();
        let key = UserKey::of(model.user_tower_digest, history.iter().flatten().map(|known| &known.digest));
        let user = match self.caches.users.get(&key) {
            Some(user) => User {
                history: HistoryUse::of(history.iter().map(|row| row.as_ref().err())),
                source: UserSource::Cached(user),
            },
            None => self.gather_history(model, history, key, deadlines).await,
        };
        events::stage_finished("history", start);
        user
    }

    async fn gather_history(&self, model: &Model, history: Resolved, key: UserKey, deadlines: Deadlines) -> User {
        let (items, places) = unique(history.iter().flatten());
        let request = EmbedRequest { items: &items, priority: Priority::Request, until: deadlines.encode_by };
        let embedded = self.contents.embed(&model.encoder, request).await;
        let mut places = places.into_iter();
        let mut contents = Vec::with_capacity(history.len() * model.manifest.encoder.dim);
        let mut row = |known: &Result<KnownItem, RowStatus>| {
            known.as_ref().map_err(|status| *status)?;
            let content = places.next().and_then(|i| embedded.get(i)).ok_or(RowStatus::Failed)?;
            contents.extend_from_slice(&vector_or_status(content)?);
            Ok(())
        };
        let rows: Vec<Result<(), RowStatus>> = history.iter().map(&mut row).collect();
        let history_use = HistoryUse::of(rows.iter().map(|row| row.as_ref().err()));
        let is_complete = history_use.n_used == history.iter().flatten().count();
        let source = UserSource::History { contents, key: is_complete.then_some(key) };
        User { history: history_use, source }
    }
}

impl HistoryUse {
    fn of<'a>(faults: impl Iterator<Item = Option<&'a RowStatus>>) -> Self {
        let statuses: Vec<RowStatus> = faults.map(|fault| fault.copied().unwrap_or(RowStatus::Ok)).collect();
        HistoryUse { n_used: statuses.iter().filter(|status| **status == RowStatus::Ok).count(), statuses }
    }
}
