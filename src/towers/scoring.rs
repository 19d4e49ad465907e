//! What an inference thread does for requests: user tower, then CVR graph, each once for all requests of a batch.
//!
//! A batch pads its histories to the longest, puts all candidates one below the other, and says with the CVR graph's `row`
//! input whose each of them is. A batch of one copies and pads nothing. Requests are independent: where a run over several
//! fails, each is run by itself, and only those that fail alone have failed.

use super::{
    TowerGraphs,
    fusion::{Fused, fuse},
    user_tower,
};
use crate::{
    domain::{Matrix, Vector},
    inference::GraphError,
    telemetry::events,
};
use std::{sync::Arc, time::Instant};

/// The widths of what is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreDims {
    /// `C`, content embeddings.
    pub content: usize,
    /// `E`, user and item embeddings.
    pub user: usize,
    /// `M`, mid-embs.
    pub mid: usize,
}

/// One request, as far as it is scored.
#[derive(Debug, Clone)]
pub struct ScoreInput {
    /// Who asks.
    pub user: UserInput,
    /// `[n, E]`; where it is empty only the user is embedded.
    pub items: Vec<f32>,
}

/// Where a user embedding comes from.
#[derive(Debug, Clone)]
pub enum UserInput {
    /// It is known.
    Known(Vector),
    /// The user tower reads this history: `[l, C]`, oldest first, empty for a new user.
    History(Vec<f32>),
}

/// What one request's scoring gave.
#[derive(Debug, Clone)]
pub struct Score {
    /// `[E]`
    pub user: Vector,
    /// Rows as in [`ScoreInput::items`]; nothing where there was none.
    pub fused: Option<Fused>,
}

/// Scores all of `inputs` together; the results are in their order.
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
    let rows = vec![0; items.len() / dims.user];
    let fused = run_cvr(graphs, &user, &items, &rows, dims)?;
    Ok(Score { user, fused: Some(fused) })
}

fn score_together(graphs: &mut TowerGraphs, inputs: &[ScoreInput], dims: ScoreDims) -> Result<Vec<Score>, GraphError> {
    let history = |input: &ScoreInput| match &input.user {
        UserInput::Known(_) => None,
        UserInput::History(history) => Some(history.clone()),
    };
    let histories: Vec<Vec<f32>> = inputs.iter().filter_map(history).collect();
    let embedded = if histories.is_empty() { Vec::new() } else { run_user_tower(graphs, histories, dims)? };
    let mut embedded = embedded.chunks_exact(dims.user);
    let mut user = |input: &ScoreInput| match &input.user {
        UserInput::Known(user) => Arc::clone(user),
        // As many rows as there were histories: the graph's output was held to that.
        UserInput::History(_) => embedded.next().unwrap_or_default().into(),
    };
    let users: Vec<Vector> = inputs.iter().map(&mut user).collect();
    let n_items = |input: &ScoreInput| input.items.len() / dims.user;
    let rows: Vec<i64> =
        inputs.iter().zip(0..).flat_map(|(input, row)| std::iter::repeat_n(row, n_items(input))).collect();
    if rows.is_empty() {
        return Ok(users.into_iter().map(|user| Score { user, fused: None }).collect());
    }
    let items: Vec<f32> = inputs.iter().flat_map(|input| &input.items).copied().collect();
    let fused = run_cvr(graphs, &users.concat(), &items, &rows, dims)?;
    let (mut mid_emb, mut cvr) = (fused.mid_emb.data.as_slice(), fused.cvr.as_slice());
    let mut part = |n: usize| Fused {
        mid_emb: Matrix { n_cols: dims.mid, data: split_off(&mut mid_emb, n * dims.mid) },
        cvr: split_off(&mut cvr, n),
    };
    let mut score = |(user, input): (Vector, &ScoreInput)| {
        let n = n_items(input);
        Score { user, fused: (n > 0).then(|| part(n)) }
    };
    Ok(users.into_iter().zip(inputs).map(&mut score).collect())
}

/// The first `n` values, which `values` loses.
fn split_off(values: &mut &[f32], n: usize) -> Vec<f32> {
    let (first, rest) = values.split_at(n.min(values.len()));
    *values = rest;
    first.to_vec()
}

/// `[b, E]`
fn run_user_tower(graphs: &mut TowerGraphs, histories: Vec<Vec<f32>>, dims: ScoreDims) -> Result<Vec<f32>, GraphError> {
    let start = Instant::now();
    events::batch_ran("user_tower", histories.len());
    let users = user_tower::embed(graphs, histories, user_tower::UserDims { content: dims.content, user: dims.user })?;
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
    let fused = fuse(graphs, users, items, rows, (dims.user, dims.mid))?;
    events::stage_finished("cvr", start);
    Ok(fused)
}
