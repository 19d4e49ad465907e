//! The user's side of a request: a cached user embedding, or the content embeddings that the user tower reads.

use super::{Pipeline, Resolved, Waits, candidates::Distinct, vector_or_status};
use crate::{
    bundle::Model,
    content::EmbedRequest,
    domain::{Priority, RowStatus, UserKey, Vector},
    telemetry::events,
};
use std::time::Instant;

/// The user's side of a request, ready to be scored.
pub(super) struct User {
    /// Reported to the caller.
    pub(super) history: HistoryUse,
    /// Where the user embedding comes from.
    pub(super) source: UserSource,
}

/// How much of the history the user embedding is based on.
pub(super) struct HistoryUse {
    /// One status per item sent, in order.
    pub(super) statuses: Vec<RowStatus>,
    /// Number of items that the user embedding is based on.
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
        /// The key to cache the result under; none if an item has no vector, because the key stands for the complete history.
        key: Option<UserKey>,
    },
}

impl Pipeline {
    /// Prepares the user's side of a request. History items without a vector in time are left out, and their statuses say
    /// so.
    pub(super) async fn embed_history(&self, model: &Model, history: Resolved, waits: Waits<'_>) -> User {
        let start = Instant::now();
        let key = UserKey::of(model.user_tower_digest, history.iter().flatten().map(|known| &known.digest));
        let user = match self.caches.users.get(&key) {
            Some(user) => {
                let statuses = history.iter().map(|row| row.as_ref().err().copied().unwrap_or(RowStatus::Ok)).collect();
                User { history: HistoryUse::new(statuses), source: UserSource::Cached(user) }
            }
            None => self.gather_history(model, history, key, waits).await,
        };
        events::stage_finished("history", start);
        user
    }

    async fn gather_history(&self, model: &Model, history: Resolved, key: UserKey, waits: Waits<'_>) -> User {
        let distinct = Distinct::of(history.iter().flatten());
        let request = EmbedRequest {
            items: &distinct.items,
            priority: Priority::Request,
            until: waits.deadlines.encode_by,
            gate: waits.gate,
        };
        let embedded = self.contents.embed(&model.encoder, request).await;
        let mut positions = distinct.positions.into_iter();
        let mut contents = Vec::with_capacity(history.len() * model.manifest.encoder.dim);
        let mut statuses = Vec::with_capacity(history.len());
        for row in &history {
            let vector = match row {
                Ok(_) => {
                    positions.next().and_then(|i| embedded.get(i)).map_or(Err(RowStatus::Failed), vector_or_status)
                }
                Err(status) => Err(*status),
            };
            match vector {
                Ok(vector) => {
                    contents.extend_from_slice(&vector);
                    statuses.push(RowStatus::Ok);
                }
                Err(status) => statuses.push(status),
            }
        }
        let history_use = HistoryUse::new(statuses);
        let is_complete = history_use.n_used == history.iter().flatten().count();
        let source = UserSource::History { contents, key: is_complete.then_some(key) };
        User { history: history_use, source }
    }
}

impl HistoryUse {
    fn new(statuses: Vec<RowStatus>) -> Self {
        let n_used = statuses.iter().filter(|status| **status == RowStatus::Ok).count();
        HistoryUse { statuses, n_used }
    }
}
