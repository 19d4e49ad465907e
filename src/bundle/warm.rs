//! Runs every thread's graphs once at the sizes of real traffic, so that a session's first-run allocations happen before the
//! first request. The results must be finite.

use super::{BundleError, Manifest, golden::Golden};
use crate::{
    content::EncoderModel,
    domain::{Vector, all_finite},
    inference::Graph,
    towers::{TowerGraphs, fusion, fusion::FusionDims, item_tower, user_tower, user_tower::UserDims},
};

/// Candidates per run.
const CANDIDATES: usize = 512;
/// Tokens per run of the encoder, as many as its batches have on a CPU.
const TOKENS: usize = 512;

/// Runs all graphs of all threads.
pub(super) fn run(
    golden: &Golden,
    manifest: &Manifest,
    encoders: Option<(&EncoderModel, &mut [Graph])>,
    towers: &mut [TowerGraphs],
) -> Result<(), BundleError> {
    if let Some((model, graphs)) = encoders {
        let longest = golden.token_ids().map(<[i64]>::len).max().unwrap_or(1).max(1);
        let texts: Vec<&[i64]> = golden.token_ids().cycle().take((TOKENS / longest).max(1)).collect();
        for graph in graphs {
            check_finite("encoder", &model.encode(graph, &texts)?)?;
        }
    }
    let contents: Vec<Vector> = golden.contents().map(Vector::from).collect();
    let batch: Vec<Vector> = contents.iter().cycle().take(item_tower::BATCH).cloned().collect();
    let history: Vec<f32> =
        contents.iter().cycle().take(manifest.user_tower.max_history).flat_map(|v| v.iter().copied()).collect();
    let dims = UserDims { content: manifest.encoder.dim, user: manifest.user_tower.dim };
    let fusion_dims = FusionDims { embedding: dims.user, mid: manifest.cvr.dim };
    for graphs in towers {
        let items = item_tower::embed(graphs, &batch, manifest.item_tower.dim)?;
        for item in &items {
            check_finite("item tower", item)?;
        }
        let user = user_tower::embed(graphs, vec![history.clone()], dims)?;
        check_finite("user tower", &user)?;
        let candidates: Vec<f32> = items.iter().cycle().take(CANDIDATES).flat_map(|v| v.iter().copied()).collect();
        let fused = fusion::fuse(graphs, &user, &candidates, &[0; CANDIDATES], fusion_dims)?;
        check_finite("cvr", &fused.mid_emb.data)?;
        check_finite("cvr", &fused.cvr)?;
    }
    Ok(())
}

fn check_finite(stage: &'static str, values: &[f32]) -> Result<(), BundleError> {
    if all_finite(values) { Ok(()) } else { Err(BundleError::NotFinite { stage }) }
}
