//! Scoring: the user tower and the CVR MLP run in one job on an inference thread.

use super::{Page, admission::shed, items::PageItems, rows::Rows, user::UserSource};
use crate::{
    bundle::Model,
    cache::users::UserCache,
    domain::{
        Matrix, MidEmbResponse, Outputs, RowStatus, Vector, all_finite,
        error::{Error, ShedReason},
    },
    inference::JobError,
    telemetry::events,
    towers::{
        fusion::Fused,
        scoring::{Score, ScoreInput, UserInput},
    },
};
use std::{sync::Arc, time::Instant};

/// The inputs of one scoring job.
pub(super) struct ScoreJob {
    user: UserSource,
    /// `[n, E]`: the candidates that have a record.
    items: Vec<f32>,
    outputs: Outputs,
}

/// The results of one scoring job; its rows are those of [`ScoreJob::items`].
pub(super) struct Scores {
    outputs: Outputs,
    user: Option<Vector>,
    fused: Option<Fused>,
}

impl ScoreJob {
    pub(super) fn new(user: UserSource, candidates: &mut Rows, outputs: Outputs) -> Self {
        let items = match outputs {
            _ if !outputs.needs_fusion() => Vec::new(),
            Outputs { item_emb: true, .. } => candidates.ready(),
            _ => candidates.take_ready(),
        };
        ScoreJob { user, items, outputs }
    }

    /// Scores on an inference thread. A user embedding that had to be computed is cached in `users`.
    pub(super) async fn run(self, model: &Model, answer_by: Instant, users: &UserCache) -> Result<Scores, Error> {
        let ScoreJob { user, items, outputs } = self;
        // Without items to fuse, a request may need no graph at all, and then no inference thread.
        if items.is_empty() {
            if !outputs.user_emb {
                return Ok(Scores { outputs, user: None, fused: None });
            }
            if let UserSource::Cached(user) = user {
                return Ok(Scores { outputs, user: Some(user), fused: None });
            }
        }
        let (user, key) = match user {
            UserSource::Cached(user) => (UserInput::Known(user), None),
            UserSource::History { history, key } => (UserInput::History(history), key),
        };
        match model.towers.run_together(&model.scoring, answer_by, ScoreInput { user, items }).await {
            Ok(Ok(Score { user, fused })) => {
                if !all_finite(&user) {
                    return Err(Error::internal("scoring", "the user embedding is not finite"));
                }
                if let Some(key) = key {
                    users.insert(key, Arc::clone(&user));
                }
                Ok(Scores { outputs, user: Some(user), fused })
            }
            Ok(Err(error)) => Err(Error::internal("scoring", error)),
            Err(JobError::Expired) => Err(Error::DeadlineExceeded),
            Err(error @ JobError::Panicked(_)) => Err(Error::internal("scoring", error)),
            Err(JobError::QueueFull) => {
                events::shed(ShedReason::TowerQueue, 1);
                Err(shed(ShedReason::TowerQueue))
            }
        }
    }
}

impl Scores {
    /// The answer: one row per candidate, all zeros where the candidate has no vector.
    pub(super) fn into_response(self, model: &Model, page: &Page, items: PageItems) -> MidEmbResponse {
        let PageItems { history, candidates: Rows { mut statuses, values: item_embs, .. } } = items;
        let was_scored: Vec<bool> = statuses.iter().map(|status| *status == RowStatus::Ok).collect();
        let mid_dim = model.manifest.cvr.dim;
        let fused = self.fused.unwrap_or(Fused { mid_emb: Matrix::zeros(0, mid_dim), cvr: Vec::new() });
        if !fused.cvr.is_empty() {
            fail_non_finite_rows(&mut statuses, &fused);
        }
        let Outputs { mid_emb, cvr, user_emb, item_emb } = self.outputs;
        let cvr_column = Matrix { n_cols: 1, data: fused.cvr };
        MidEmbResponse {
            model: model.reference.clone(),
            item_emb: item_emb.then(|| zero_rows_not_ok(item_embs, &statuses)),
            cvr: cvr.then(|| scatter(cvr_column, &was_scored, &statuses).data),
            mid_emb: mid_emb.then(|| scatter(fused.mid_emb, &was_scored, &statuses)),
            user_emb: self.user.filter(|_| user_emb).map(|user| user.to_vec()),
            n_history_used: history.statuses.iter().filter(|status| **status == RowStatus::Ok).count(),
            history_statuses: [vec![RowStatus::NotUsed; page.n_not_used], history.statuses].concat(),
            statuses,
        }
    }
}

/// Zeros the embeddings of rows that failed in scoring, after their item embedding was computed.
fn zero_rows_not_ok(mut items: Matrix, statuses: &[RowStatus]) -> Matrix {
    for (row, status) in statuses.iter().enumerate() {
        if *status != RowStatus::Ok {
            items.row_mut(row).fill(0.0);
        }
    }
    items
}

fn fail_non_finite_rows(statuses: &mut [RowStatus], fused: &Fused) {
    if all_finite(&fused.cvr) && all_finite(&fused.mid_emb.data) {
        return;
    }
    let ok = statuses.iter_mut().filter(|status| **status == RowStatus::Ok);
    for (i, status) in ok.enumerate() {
        if !(fused.cvr[i].is_finite() && all_finite(fused.mid_emb.row(i))) {
            events::vector_not_finite("cvr");
            *status = RowStatus::Failed;
        }
    }
}

/// Moves the rows of `scored` (one per candidate in `was_scored`) to their candidates' positions. Rows that are not OK are
/// zeros.
fn scatter(scored: Matrix, was_scored: &[bool], statuses: &[RowStatus]) -> Matrix {
    if statuses.iter().all(|status| *status == RowStatus::Ok) {
        return scored;
    }
    let mut matrix = Matrix::zeros(statuses.len(), scored.n_cols);
    let rows = (0..statuses.len()).filter(|i| was_scored[*i]);
    for (from, to) in rows.enumerate() {
        if statuses[to] == RowStatus::Ok {
            matrix.row_mut(to).copy_from_slice(scored.row(from));
        }
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scored_rows_move_to_their_candidates_and_other_rows_are_zero() {
        use RowStatus::{Failed, NotInTime, Ok, UnknownItem};
        let scored = Matrix { n_cols: 2, data: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0] };
        // The fourth candidate was scored, but its row was not finite.
        let was_scored = [false, true, true, true, false];
        let statuses = [UnknownItem, Ok, Ok, Failed, NotInTime];
        let matrix = scatter(scored, &was_scored, &statuses);
        assert_eq!(matrix.data, [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_non_finite_row_fails_alone() {
        let mid_emb = Matrix { n_cols: 1, data: vec![1.0, f32::NAN, 3.0] };
        let fused = Fused { mid_emb, cvr: vec![0.1, 0.2, f32::INFINITY] };
        let mut statuses = [RowStatus::Ok, RowStatus::UnknownItem, RowStatus::Ok, RowStatus::Ok];
        fail_non_finite_rows(&mut statuses, &fused);
        assert_eq!(statuses, [RowStatus::Ok, RowStatus::UnknownItem, RowStatus::Failed, RowStatus::Failed]);
    }
}
