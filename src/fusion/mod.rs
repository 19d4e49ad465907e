//! The CVR MLP: one user and many items in, a mid-emb and a probability an item out.

use crate::{
    domain::Matrix,
    inference::{GraphError, Input},
    towers::TowerGraphs,
};

/// What the CVR graph gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Fused {
    /// `[n, M]`
    pub mid_emb: Matrix,
    /// `[n]`, probabilities.
    pub cvr: Vec<f32>,
}

/// Fuses `user` with each of `items` (`[n, E]`, at least one, each as wide as `user`); `mid_dim` is `M`.
pub fn fuse(graphs: &mut TowerGraphs, user: &[f32], items: &[f32], mid_dim: usize) -> Result<Fused, GraphError> {
    let n = items.len() / user.len();
    let rows = vec![0_i64; n];
    let inputs = [
        Input::F32 { shape: &[1, user.len()], data: user },
        Input::F32 { shape: &[n, user.len()], data: items },
        Input::I64 { shape: &[n], data: &rows },
    ];
    let outputs = graphs.cvr.run(&inputs, &[&[n, mid_dim], &[n]])?;
    let [mid_emb, cvr] = <[Vec<f32>; 2]>::try_from(outputs)
        .map_err(|outputs| GraphError::OutputCount { found: outputs.len(), expected: 2 })?;
    Ok(Fused { mid_emb: Matrix { n_cols: mid_dim, data: mid_emb }, cvr })
}
