//! The user tower: from the content embeddings of histories, oldest first, to user embeddings.

use super::TowerGraphs;
use crate::inference::{GraphError, Input};

/// The widths of the user tower's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserDims {
    /// `C`, the width of content embeddings.
    pub content: usize,
    /// `E`, the width of user embeddings.
    pub user: usize,
}

/// Computes the user embeddings, `[b, E]`, of `b` histories (at least one), each `[n, C]`. An empty history is valid: the tower
/// then reads its start token alone.
pub fn embed(graphs: &mut TowerGraphs, histories: Vec<Vec<f32>>, dims: UserDims) -> Result<Vec<f32>, GraphError> {
    let n_users = histories.len();
    // The graph needs at least one position; the mask is 0 at positions that hold no item.
    let n_values = histories.iter().map(Vec::len).max().unwrap_or(0).max(dims.content);
    let n_positions = n_values / dims.content;
    let mut mask = vec![0_i64; n_users * n_positions];
    for (row, history) in mask.chunks_exact_mut(n_positions).zip(&histories) {
        row[..history.len() / dims.content].fill(1);
    }
    let content = pad(histories, n_values);
    let inputs = [
        Input::F32 { shape: &[n_users, n_positions, dims.content], data: &content },
        Input::I64 { shape: &[n_users, n_positions], data: &mask },
    ];
    let mut outputs = graphs.user.run(&inputs, &[&[n_users, dims.user]])?;
    Ok(std::mem::take(&mut outputs[0]))
}

/// Joins all histories into one tensor, each padded with zeros to `n_values`. A single history is moved, not copied.
fn pad(mut histories: Vec<Vec<f32>>, n_values: usize) -> Vec<f32> {
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
