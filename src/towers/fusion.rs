//! Fusion: the CVR MLP, from user and item embeddings to mid-embs and conversion probabilities.

use super::TowerGraphs;
use crate::{
    domain::Matrix,
    inference::{GraphError, Input},
};

/// What the CVR graph gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Fused {
    /// `[n, M]`
    pub mid_emb: Matrix,
    /// `[n]`, probabilities.
    pub cvr: Vec<f32>,
}

/// Fuses each of `items` (`[n, E]`, at least one) with one of `users` (`[b, E]`): `rows` (`[n]`) says which. `dim` is `E`,
/// `mid_dim` is `M`.
pub fn fuse(
    graphs: &mut TowerGraphs,
    users: &[f32],
    items: &[f32],
    rows: &[i64],
    (dim, mid_dim): (usize, usize),
) -> Result<Fused, GraphError> {
    let n = rows.len();
    let inputs = [
        Input::F32 { shape: &[users.len() / dim, dim], data: users },
        Input::F32 { shape: &[n, dim], data: items },
        Input::I64 { shape: &[n], data: rows },
    ];
    let outputs = graphs.cvr.run(&inputs, &[&[n, mid_dim], &[n]])?;
    let [mid_emb, cvr] = <[Vec<f32>; 2]>::try_from(outputs)
        .map_err(|outputs| GraphError::OutputCount { found: outputs.len(), expected: 2 })?;
    Ok(Fused { mid_emb: Matrix { n_cols: mid_dim, data: mid_emb }, cvr })
}
