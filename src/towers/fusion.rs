//! Fusion: the CVR MLP, from user and item embeddings to mid-embs and conversion probabilities.

use super::TowerGraphs;
use crate::{
    domain::Matrix,
    inference::{GraphError, Input},
};

/// The outputs of the CVR graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Fused {
    /// `[n, M]`
    pub mid_emb: Matrix,
    /// `[n]`, probabilities.
    pub cvr: Vec<f32>,
}

/// The widths of the CVR graph's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FusionDims {
    /// `E`, the width of user and item embeddings.
    pub embedding: usize,
    /// `M`, the width of a mid-emb.
    pub mid: usize,
}

/// Fuses each row of `items` (`[n, E]`, at least one row) with one row of `users` (`[b, E]`). `rows` (`[n]`) holds the user's
/// row for each item.
pub fn fuse(
    graphs: &mut TowerGraphs,
    users: &[f32],
    items: &[f32],
    rows: &[i64],
    dims: FusionDims,
) -> Result<Fused, GraphError> {
    let n = rows.len();
    let n_users = users.len() / dims.embedding;
    let inputs = [
        Input::F32 { shape: &[n_users, dims.embedding], data: users },
        Input::F32 { shape: &[n, dims.embedding], data: items },
        Input::I64 { shape: &[n], data: rows },
    ];
    let outputs = graphs.cvr.run(&inputs, &[&[n, dims.mid], &[n]])?;
    let [mid_emb, cvr] = <[Vec<f32>; 2]>::try_from(outputs)
        .map_err(|outputs| GraphError::OutputCount { found: outputs.len(), expected: 2 })?;
    Ok(Fused { mid_emb: Matrix { n_cols: dims.mid, data: mid_emb }, cvr })
}
