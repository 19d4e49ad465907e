//! The item tower: from content embeddings to item embeddings, each item independent of the others in its batch.

use super::TowerGraphs;
use crate::{
    domain::Vector,
    inference::{GraphError, Input},
};

/// The most items in one run: enough to keep a core busy, few enough to keep the activations small.
pub const BATCH: usize = 256;

/// Computes the item embedding (`dim` = `E` wide) of each content embedding (`C` wide), in order.
pub fn embed(graphs: &mut TowerGraphs, contents: &[Vector], dim: usize) -> Result<Vec<Vector>, GraphError> {
    let mut items = Vec::with_capacity(contents.len());
    for batch in contents.chunks(BATCH) {
        let data = batch.concat();
        let shape = [batch.len(), data.len() / batch.len()];
        let outputs = graphs.item.run(&[Input::F32 { shape: &shape, data: &data }], &[&[batch.len(), dim]])?;
        items.extend(outputs.iter().flat_map(|rows| rows.chunks_exact(dim)).map(Vector::from));
    }
    Ok(items)
}
