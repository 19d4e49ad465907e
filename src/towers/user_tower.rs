//! The user tower: from histories of adapted items, oldest first, to user embeddings.

use super::TowerGraphs;
use crate::inference::{GraphError, Input};

/// The widths of the user tower's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserDims {
    /// `D`, the width of an adapted item.
    pub adapted: usize,
    /// `E`, the width of user embeddings.
    pub user: usize,
    /// Whether the tower reads what the user did with each item.
    pub reads_actions: bool,
}

/// What the user tower reads of one user.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct History {
    /// `[l, D]`, oldest first.
    pub adapted: Vec<f32>,
    /// `[l]`: the code of each item's action. Empty if the tower reads none.
    pub actions: Vec<i64>,
}

/// Computes the user embeddings, `[b, E]`, of `b` histories (at least one). An empty history is valid: the tower then reads its
/// start token alone.
pub fn embed(graphs: &mut TowerGraphs, histories: Vec<History>, dims: UserDims) -> Result<Vec<f32>, GraphError> {
    let n_users = histories.len();
    let longest = histories.iter().map(|history| history.adapted.len() / dims.adapted).max().unwrap_or(0);
    // The graph needs at least one position; the mask is 0 at positions that hold no item.
    let n_positions = longest.max(1);
    let mut mask = vec![0_i64; n_users * n_positions];
    for (row, history) in mask.chunks_exact_mut(n_positions).zip(&histories) {
        row[..history.adapted.len() / dims.adapted].fill(1);
    }
    let (adapted, actions): (Vec<_>, Vec<_>) =
        histories.into_iter().map(|history| (history.adapted, history.actions)).unzip();
    let adapted = join_padded(adapted, n_positions * dims.adapted);
    let actions = if dims.reads_actions { join_padded(actions, n_positions) } else { Vec::new() };
    let rows_shape = [n_users, n_positions];
    let inputs = [
        Input::F32 { shape: &[n_users, n_positions, dims.adapted], data: &adapted },
        Input::I64 { shape: &rows_shape, data: &mask },
        Input::I64 { shape: &rows_shape, data: &actions },
    ];
    let n_inputs = if dims.reads_actions { 3 } else { 2 };
    let mut outputs = graphs.user.run(&inputs[..n_inputs], &[&[n_users, dims.user]])?;
    Ok(std::mem::take(&mut outputs[0]))
}

/// Joins all rows into one tensor, each padded with zeros to `n_values`. A single row is moved, not copied.
fn join_padded<T: Copy + Default>(mut rows: Vec<Vec<T>>, n_values: usize) -> Vec<T> {
    if let [one] = rows.as_mut_slice() {
        let mut joined = std::mem::take(one);
        joined.resize(n_values, T::default());
        return joined;
    }
    let mut joined = Vec::with_capacity(rows.len() * n_values);
    for (i, row) in rows.iter().enumerate() {
        joined.extend_from_slice(row);
        joined.resize((i + 1) * n_values, T::default());
    }
    joined
}
