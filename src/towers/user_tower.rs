//! The user tower: the content embeddings of a history, oldest first, to one user embedding.

use super::TowerGraphs;
use crate::inference::{GraphError, Input};

/// The widths of the user tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserDims {
    /// `C`
    pub content: usize,
    /// `E`
    pub user: usize,
}

/// The user embedding (`E` wide) of a history `[n, C]`. An empty one is valid: the tower answers from its start token.
pub fn embed(graphs: &mut TowerGraphs, mut content: Vec<f32>, dims: UserDims) -> Result<Vec<f32>, GraphError> {
    let n_items = content.len() / dims.content;
    // The graph takes at least one position; where there is no item the mask says so.
    let n_positions = n_items.max(1);
    content.resize(n_positions * dims.content, 0.0);
    let mut mask = vec![1_i64; n_items];
    mask.resize(n_positions, 0);
    let inputs = [
        Input::F32 { shape: &[1, n_positions, dims.content], data: &content },
        Input::I64 { shape: &[1, n_positions], data: &mask },
    ];
    let mut outputs = graphs.user.run(&inputs, &[&[1, dims.user]])?;
    Ok(std::mem::take(&mut outputs[0]))
}
