//! The scoring job: user tower, then CVR graph, each run once for all requests of a batch.
//!
//! A batch pads its histories to the longest one, stacks all candidates into one tensor, and tells the CVR graph through its
//! `row` input which user each candidate belongs to. A batch of one request copies and pads nothing. Requests are independent:
//! if a run over several requests fails, each is run again alone, and only those that fail alone get an error.

use super::{
    TowerGraphs,
    fusion::{Fused, FusionDims, fuse},
    user_tower::{self, History, UserDims},
};
use crate::{
    domain::{Matrix, Vector},
    inference::GraphError,
    telemetry::events,
};
use std::{sync::Arc, time::Instant};

/// The widths of the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreDims {
    /// What the user tower reads, and `E`, the width of user and item embeddings.
    pub user: UserDims,
    /// `M`, the width of mid-embs.
    pub mid: usize,
}

/// What scoring needs of one request.
#[derive(Debug, Clone)]
pub struct ScoreInput {
    /// The user.
    pub user: UserInput,
    /// `[n, E]`; if it is empty, only the user embedding is computed.
    pub items: Vec<f32>,
}

/// Where a user embedding comes from.
#[derive(Debug, Clone)]
pub enum UserInput {
    /// It is already known: `[E]`.
    Known(Vector),
    /// The user tower computes it from this history, which is empty for a new user.
    History(History),
}

/// The result of scoring one request.
#[derive(Debug, Clone)]
pub struct Score {
    /// `[E]`
    pub user: Vector,
    /// One row per row of [`ScoreInput::items`]; `None` if there were none.
    pub fused: Option<Fused>,
}

/// Scores all of `inputs` together. Results are in the order of the inputs.
pub fn score_all(graphs: &mut TowerGraphs, inputs: Vec<ScoreInput>, dims: ScoreDims) -> Vec<Result<Score, GraphError>> {
    if inputs.len() == 1 {
        return inputs.into_iter().map(|input| score(graphs, input, dims)).collect();
    }
    match score_together(graphs, &inputs, dims) {
        Ok(scores) => scores.into_iter().map(Ok).collect(),
        Err(_) => inputs.into_iter().map(|input| score(graphs, input, dims)).collect(),
    }
}

fn score(graphs: &mut TowerGraphs, input: ScoreInput, dims: ScoreDims) -> Result<Score, GraphError> {
    let ScoreInput { user, items } = input;
    let user: Vector = match user {
        UserInput::Known(user) => user,
        UserInput::History(history) => run_user_tower(graphs, vec![history], dims)?.into(),
    };
    if items.is_empty() {
        return Ok(Score { user, fused: None });
    }
    let rows = vec![0; items.len() / dims.user.user];
    let fused = run_cvr(graphs, &user, &items, &rows, dims)?;
    Ok(Score { user, fused: Some(fused) })
}

fn score_together(graphs: &mut TowerGraphs, inputs: &[ScoreInput], dims: ScoreDims) -> Result<Vec<Score>, GraphError> {
    let users = embed_users(graphs, inputs, dims)?;
    let n_items = |input: &ScoreInput| input.items.len() / dims.user.user;
    let mut rows: Vec<i64> = Vec::new();
    for (row, input) in (0..).zip(inputs) {
        rows.extend(std::iter::repeat_n(row, n_items(input)));
    }
    if rows.is_empty() {
        return Ok(users.into_iter().map(|user| Score { user, fused: None }).collect());
    }
    let items: Vec<f32> = inputs.iter().flat_map(|input| &input.items).copied().collect();
    let fused = run_cvr(graphs, &users.concat(), &items, &rows, dims)?;
    let (mut mid_emb, mut cvr) = (fused.mid_emb.data.as_slice(), fused.cvr.as_slice());
    let mut scores = Vec::with_capacity(inputs.len());
    for (user, input) in users.into_iter().zip(inputs) {
        let n = n_items(input);
        let fused = (n > 0).then(|| Fused {
            mid_emb: Matrix { n_cols: dims.mid, data: take_first(&mut mid_emb, n * dims.mid) },
            cvr: take_first(&mut cvr, n),
        });
        scores.push(Score { user, fused });
    }
    Ok(scores)
}

/// The user embedding `[E]` of each input, in order.
fn embed_users(graphs: &mut TowerGraphs, inputs: &[ScoreInput], dims: ScoreDims) -> Result<Vec<Vector>, GraphError> {
    let mut histories: Vec<History> = Vec::new();
    for input in inputs {
        if let UserInput::History(history) = &input.user {
            histories.push(history.clone());
        }
    }
    let embedded = if histories.is_empty() { Vec::new() } else { run_user_tower(graphs, histories, dims)? };
    let mut embedded = embedded.chunks_exact(dims.user.user);
    let mut users = Vec::with_capacity(inputs.len());
    for input in inputs {
        users.push(match &input.user {
            UserInput::Known(user) => Arc::clone(user),
            // There is one row per history: the graph's output shape was checked.
            UserInput::History(_) => embedded.next().unwrap_or_default().into(),
        });
    }
    Ok(users)
}

/// Removes the first `n` values from `values` and returns a copy of them.
fn take_first(values: &mut &[f32], n: usize) -> Vec<f32> {
    let (first, rest) = values.split_at(n.min(values.len()));
    *values = rest;
    first.to_vec()
}

/// Returns the user embeddings, `[b, E]`.
fn run_user_tower(graphs: &mut TowerGraphs, histories: Vec<History>, dims: ScoreDims) -> Result<Vec<f32>, GraphError> {
    let start = Instant::now();
    events::batch_ran("user_tower", histories.len());
    let users = user_tower::embed(graphs, histories, dims.user)?;
    events::stage_finished("user_tower", start);
    Ok(users)
}

fn run_cvr(
    graphs: &mut TowerGraphs,
    users: &[f32],
    items: &[f32],
    rows: &[i64],
    dims: ScoreDims,
) -> Result<Fused, GraphError> {
    let start = Instant::now();
    events::batch_ran("cvr", rows.len());
    let fused = fuse(graphs, users, items, rows, FusionDims { embedding: dims.user.user, mid: dims.mid })?;
    events::stage_finished("cvr", start);
    Ok(fused)
}
