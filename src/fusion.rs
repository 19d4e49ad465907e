//! The CVR MLP: one user and many items in, a mid-emb and a probability an item out.

use crate::{
    domain::{Matrix, Vector},
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

/// Fuses `user` with each of `items` (at least one, all as wide as `user`); `mid_dim` is `M`.
pub fn fuse(graphs: &mut TowerGraphs, user: &[f32], items: &[&Vector], mid_dim: usize) -> Result<Fused, GraphError> {
    let n = items.len();
    let mut gathered = Vec::with_capacity(n * user.len());
    items.iter().for_each(|item| gathered.extend_from_slice(item));
    let rows = vec![0_i64; n];
    let inputs = [
        Input::F32 { shape: &[1, user.len()], data: user },
        Input::F32 { shape: &[n, gathered.len() / n.max(1)], data: &gathered },
        Input::I64 { shape: &[n], data: &rows },
    ];
    let outputs = graphs.cvr.run(&inputs, &[&[n, mid_dim], &[n]])?;
    let [mid_emb, cvr] = <[Vec<f32>; 2]>::try_from(outputs)
        .map_err(|outputs| GraphError::OutputCount { found: outputs.len(), expected: 2 })?;
    Ok(Fused { mid_emb: Matrix { n_cols: mid_dim, data: mid_emb }, cvr })
}
