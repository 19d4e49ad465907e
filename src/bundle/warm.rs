//! Runs every thread's graphs once at the sizes of real traffic, so that a session's first-run allocations happen before the
//! first request. The results must be finite.

use super::{BundleError, Manifest, golden::Golden};
use crate::{
    content::EncoderModel,
    domain::{RecordDims, Vector, all_finite},
    inference::Graph,
    towers::{TowerGraphs, fusion, fusion::FusionDims, item_tower, user_tower, user_tower::History},
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
    let user_dims = manifest.user_dims();
    // Every action once: a graph whose table is too short for the manifest's list fails here.
    let action_codes: Vec<i64> = (0..=manifest.history.actions.len() as i64).collect();
    let fusion_dims = FusionDims { embedding: user_dims.user, mid: manifest.cvr.dim };
    for graphs in towers {
        let record_dims = manifest.item_tower.record_dims();
        let records = item_tower::embed(graphs, &batch, record_dims)?;
        for record in &records {
            check_finite("item tower", record)?;
        }
        let mut user = Vec::new();
        for codes in action_codes.chunks(manifest.user_tower.max_history) {
            let history = longest_history(&records, manifest.user_tower.max_history, record_dims, codes);
            user = user_tower::embed(graphs, vec![history], user_dims)?;
            check_finite("user tower", &user)?;
        }
        let items = records.iter().cycle().take(CANDIDATES).map(|record| &record[..record_dims.item]);
        let candidates: Vec<f32> = items.flatten().copied().collect();
        let fused = fusion::fuse(graphs, &user, &candidates, &[0; CANDIDATES], fusion_dims)?;
        check_finite("cvr", &fused.mid_emb.data)?;
        check_finite("cvr", &fused.cvr)?;
    }
    Ok(())
}

fn longest_history(records: &[Vector], n_items: usize, dims: RecordDims, codes: &[i64]) -> History {
    let adapted = records.iter().cycle().take(n_items).flat_map(|record| &record[dims.item..]).copied().collect();
    History { adapted, actions: codes.iter().copied().cycle().take(n_items).collect() }
}

fn check_finite(stage: &'static str, values: &[f32]) -> Result<(), BundleError> {
    if all_finite(values) { Ok(()) } else { Err(BundleError::NotFinite { stage }) }
}
