//! Scoring: user tower and CVR MLP in one crossing to an inference thread.

use super::Rows;
use crate::{
    admission::shed,
    bundle::Model,
    domain::{Matrix, MidEmbResponse, Outputs, RowStatus, Vector},
    error::{Error, ShedReason},
    fusion::{self, Fused},
    inference::{GraphError, JobError},
    telemetry::events,
    towers::{TowerGraphs, user_tower, user_tower::UserDims},
};
use std::time::Instant;

/// What one scoring job reads.
pub(super) struct ScoreJob {
    history: Vec<Vector>,
    /// The candidates that have an embedding.
    items: Vec<Vector>,
    outputs: Outputs,
    user_dims: UserDims,
    mid_dim: usize,
}

/// What one scoring job gave; rows are those of [`ScoreJob::items`].
pub(super) struct Scores {
    outputs: Outputs,
    n_history_used: usize,
    user: Option<Vec<f32>>,
    fused: Option<Fused>,
}

impl ScoreJob {
    pub(super) fn new(model: &Model, history: &Rows, candidates: &Rows, outputs: Outputs) -> Self {
        let manifest = &model.manifest;
        ScoreJob {
            history: history.iter().flatten().cloned().collect(),
            items: candidates.iter().flatten().cloned().collect(),
            outputs,
            user_dims: UserDims { content: manifest.encoder.dim, user: manifest.user_tower.dim },
            mid_dim: manifest.cvr.dim,
        }
    }

    /// Scores on an inference thread, or says why not.
    pub(super) async fn run(self, model: &Model, answer_by: Instant) -> Result<Scores, Error> {
        if !self.needs_fusion() && !self.outputs.user_emb {
            return Ok(self.unscored());
        }
        let scored = model.towers.run(answer_by, move |graphs| self.score(graphs)).await;
        match scored {
            Ok(Ok(scores)) if scores.user.iter().flatten().all(|x| x.is_finite()) => Ok(scores),
            Ok(Ok(_)) => Err(Error::internal("scoring", "the user embedding is not finite")),
            Ok(Err(error)) => Err(Error::internal("scoring", error)),
            Err(JobError::Expired) => Err(Error::DeadlineExceeded),
            Err(error @ JobError::Panicked(_)) => Err(Error::internal("scoring", error)),
            Err(JobError::QueueFull) => {
                events::shed(ShedReason::TowerQueue, 1);
                Err(shed(ShedReason::TowerQueue))
            }
        }
    }

    fn needs_fusion(&self) -> bool {
        self.outputs.needs_fusion() && !self.items.is_empty()
    }

    fn unscored(&self) -> Scores {
        Scores { outputs: self.outputs, n_history_used: self.history.len(), user: None, fused: None }
    }

    fn score(&self, graphs: &mut TowerGraphs) -> Result<Scores, GraphError> {
        let start = Instant::now();
        let user = user_tower::embed(graphs, &self.history, self.user_dims)?;
        events::stage_finished("user_tower", start);
        events::batch_ran("user_tower", self.history.len());
        let mut scores = self.unscored();
        if self.needs_fusion() {
            let start = Instant::now();
            let items: Vec<&Vector> = self.items.iter().collect();
            scores.fused = Some(fusion::fuse(graphs, &user, &items, self.mid_dim)?);
            events::stage_finished("cvr", start);
            events::batch_ran("cvr", items.len());
        }
        scores.user = Some(user);
        Ok(scores)
    }
}

impl Scores {
    /// The answer: a row for every candidate, zeros where it has no vector.
    pub(super) fn into_response(self, model: &Model, history: Rows, candidates: Rows) -> MidEmbResponse {
        let status = |row: &Result<Vector, RowStatus>| row.as_ref().err().copied().unwrap_or(RowStatus::Ok);
        let mut statuses: Vec<RowStatus> = candidates.iter().map(status).collect();
        if let Some(fused) = &self.fused {
            fail_rows_that_are_not_finite(&mut statuses, fused);
        }
        let Outputs { mid_emb, cvr, user_emb, item_emb } = self.outputs;
        let n = candidates.len();
        let mid_dim = model.manifest.cvr.dim;
        let fused = self.fused.unwrap_or(Fused { mid_emb: Matrix::zeros(0, mid_dim), cvr: Vec::new() });
        let had_item: Vec<bool> = candidates.iter().map(Result::is_ok).collect();
        let item_matrix = || {
            let mut items = Matrix::zeros(n, model.manifest.item_tower.dim);
            let ok = candidates.iter().enumerate().zip(&statuses).filter(|(_, s)| **s == RowStatus::Ok);
            ok.for_each(|((i, row), _)| row.iter().for_each(|item| items.row_mut(i).copy_from_slice(item)));
            items
        };
        let cvr_column = || {
            let column = Matrix { n_cols: 1, data: fused.cvr.clone() };
            scatter(column, &had_item, &statuses).data
        };
        MidEmbResponse {
            model: model.reference.clone(),
            item_emb: item_emb.then(item_matrix),
            cvr: cvr.then(cvr_column),
            mid_emb: mid_emb.then(|| scatter(fused.mid_emb, &had_item, &statuses)),
            user_emb: self.user.filter(|_| user_emb),
            n_history_used: self.n_history_used,
            history_statuses: history.iter().map(status).collect(),
            statuses,
        }
    }
}

fn fail_rows_that_are_not_finite(statuses: &mut [RowStatus], fused: &Fused) {
    let ok = statuses.iter_mut().filter(|status| **status == RowStatus::Ok);
    for (i, status) in ok.enumerate() {
        if !(fused.cvr[i].is_finite() && fused.mid_emb.row(i).iter().all(|x| x.is_finite())) {
            events::vector_not_finite("cvr");
            *status = RowStatus::Failed;
        }
    }
}

/// Puts the rows of `scored` (one for each candidate that had an item embedding) where their candidates are. Rows that are
/// not OK stay zero.
fn scatter(scored: Matrix, had_item: &[bool], statuses: &[RowStatus]) -> Matrix {
    if statuses.iter().all(|status| *status == RowStatus::Ok) {
        return scored;
    }
    let mut matrix = Matrix::zeros(statuses.len(), scored.n_cols);
    let rows = (0..statuses.len()).filter(|i| had_item[*i]);
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
    fn rows_land_where_their_candidates_are_and_the_rest_is_zero() {
        use RowStatus::{Failed, NotInTime, Ok, UnknownItem};
        let scored = Matrix { n_cols: 2, data: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0] };
        // The fourth candidate was scored, but its row was not finite.
        let had_item = [false, true, true, true, false];
        let statuses = [UnknownItem, Ok, Ok, Failed, NotInTime];
        let matrix = scatter(scored, &had_item, &statuses);
        assert_eq!(matrix.data, [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_row_that_is_not_finite_fails_alone() {
        let mid_emb = Matrix { n_cols: 1, data: vec![1.0, f32::NAN, 3.0] };
        let fused = Fused { mid_emb, cvr: vec![0.1, 0.2, f32::INFINITY] };
        let mut statuses = [RowStatus::Ok, RowStatus::UnknownItem, RowStatus::Ok, RowStatus::Ok];
        fail_rows_that_are_not_finite(&mut statuses, &fused);
        assert_eq!(statuses, [RowStatus::Ok, RowStatus::UnknownItem, RowStatus::Failed, RowStatus::Failed]);
    }
}
