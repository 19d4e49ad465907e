//! The user tower: the content embeddings of histories, oldest first, to user embeddings.

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

/// The user embeddings `[b, E]` of `b` histories, `[n, C]` each and at least one. An empty one is valid: the tower answers
/// from its start token.
pub fn embed(graphs: &mut TowerGraphs, histories: Vec<Vec<f32>>, dims: UserDims) -> Result<Vec<f32>, GraphError> {
    let n_users = histories.len();
    // The graph takes at least one position; where there is no item the mask says so.
    let n_values = histories.iter().map(Vec::len).max().unwrap_or(0).max(dims.content);
    let n_positions = n_values / dims.content;
    let mut mask = vec![0_i64; n_users * n_positions];
    for (row, history) in mask.chunks_exact_mut(n_positions).zip(&histories) {
        row[..history.len() / dims.content].fill(1);
    }
    let content = side_by_side(histories, n_values);
    let inputs = [
        Input::F32 { shape: &[n_users, n_positions, dims.content], data: &content },
        Input::I64 { shape: &[n_users, n_positions], data: &mask },
    ];
    let mut outputs = graphs.user.run(&inputs, &[&[n_users, dims.user]])?;
    Ok(std::mem::take(&mut outputs[0]))
}

/// All histories in one tensor, zeros after each up to `n_values`. A single one stays where it is.
fn side_by_side(mut histories: Vec<Vec<f32>>, n_values: usize) -> Vec<f32> {
    let mut content = match histories.as_mut_slice() {
        [one] => std::mem::take(one),
        _ => Vec::with_capacity(histories.len() * n_values),
    };
    for (i, history) in histories.iter().enumerate() {
        content.extend_from_slice(history);
        content.resize((i + 1) * n_values, 0.0);
    }
    content
}
