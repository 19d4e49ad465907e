//! The item tower: from content embeddings to item records, each item independent of the others in its batch.

use super::TowerGraphs;
use crate::{
    domain::{RecordDims, Vector},
    inference::{GraphError, Input},
};

/// The most items in one run: enough to keep a core busy, few enough to keep the activations small.
pub const BATCH: usize = 256;

/// Computes the record of each content embedding (`C` wide), in order: its item embedding, then its adapted content.
pub fn embed(graphs: &mut TowerGraphs, contents: &[Vector], dims: RecordDims) -> Result<Vec<Vector>, GraphError> {
    let mut records = Vec::with_capacity(contents.len());
    for batch in contents.chunks(BATCH) {
        let data = batch.concat();
        let n = batch.len();
        let shape = [n, data.len() / n];
        let outputs =
            graphs.item.run(&[Input::F32 { shape: &shape, data: &data }], &[&[n, dims.item], &[n, dims.adapted]])?;
        let [items, adapted] = <[Vec<f32>; 2]>::try_from(outputs)
            .map_err(|outputs| GraphError::OutputCount { found: outputs.len(), expected: 2 })?;
        for (item, adapted) in items.chunks_exact(dims.item).zip(adapted.chunks_exact(dims.adapted)) {
            records.push([item, adapted].concat().into());
        }
    }
    Ok(records)
}
