//! Batch independence: a vector must be the same whatever else is in its batch.
//!
//! Vectors are cached and shared, and whose batch an item falls into is chance. A graph that takes a scale from its whole input,
//! as dynamic quantisation does, gives vectors that depend on their neighbours. Golden vectors do not always show that (a bundle
//! may have a single golden item), and never say why they differ. So these checks use inputs of their own, of several lengths,
//! and compare each vector that is computed alone with the same vector in batches.

use super::{
    BundleError, Manifest,
    golden::{Golden, StageReport},
};
use crate::{
    content::EncoderModel,
    domain::{ItemText, Tolerance, Vector, all_finite, cosine},
    inference::Graph,
    towers::{TowerGraphs, fusion, fusion::FusionDims, item_tower, user_tower, user_tower::History},
};

/// Texts from one word to about a hundred. Longer ones would make the check of a large encoder slow.
fn texts() -> Vec<ItemText> {
    let words = "stainless steel water bottle with a wide mouth, double walls and a lid that does not leak; ";
    let full = ItemText::new([words, "Kitchen", "Example", "$24.90"], &["bottle", "travel"], &["free returns"]);
    let titles = ["A", "The Third Man (1949)", &words.repeat(3), &words.repeat(6)].map(ItemText::titled);
    titles.into_iter().chain([full]).collect()
}

/// How far a vector from a batch may be from the same one computed alone. A manifest's tolerance of content says how far another
/// precision may be from PyTorch, which is no leeway for this.
const TOLERANCE: Tolerance = Tolerance::SINGLE_PRECISION;

/// The comparisons of one graph.
struct BatchCheck {
    graph: &'static str,
    report: StageReport,
}

impl BatchCheck {
    fn new(graph: &'static str, stage: &'static str) -> Self {
        let report = StageReport { stage, n_vectors: 0, max_absolute: 0.0, min_cosine: 1.0 };
        BatchCheck { graph, report }
    }

    /// Compares a vector from a batch with the same one computed alone.
    fn compare(&mut self, beside: &[f32], alone: &[f32]) -> Result<(), BundleError> {
        // The golden check reports this with the vector's name.
        if !all_finite(alone) {
            return Ok(());
        }
        let absolute = beside.iter().zip(alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let cosine = if beside == alone || alone.len() == 1 { 1.0 } else { cosine(beside, alone) };
        if !TOLERANCE.holds(absolute, cosine) {
            return Err(BundleError::DependsOnBatch { graph: self.graph, absolute, cosine });
        }
        self.report.n_vectors += 1;
        self.report.max_absolute = self.report.max_absolute.max(absolute);
        self.report.min_cosine = self.report.min_cosine.min(cosine);
        Ok(())
    }
}

/// Runs the texts of this module through the encoder, alone and in two batches of different order.
pub(super) fn check_encoder(model: &EncoderModel, graph: &mut Graph) -> Result<StageReport, BundleError> {
    let mut check = BatchCheck::new("encoder", "content in batches");
    let tokens = texts().iter().map(|text| model.tokenize(text)).collect::<Result<Vec<_>, _>>()?;
    let mut order: Vec<&[i64]> = tokens.iter().map(Vec::as_slice).collect();
    for _ in 0..2 {
        let together = model.encode(graph, &order)?;
        for (ids, vector) in order.iter().zip(together.chunks_exact(model.dim)) {
            check.compare(vector, &model.encode(graph, &[ids])?)?;
        }
        order.reverse();
    }
    Ok(check.report)
}

/// Runs content embeddings made from the golden ones through the towers and the CVR graph, alone and together.
pub(super) fn check_towers(
    golden: &Golden,
    manifest: &Manifest,
    graphs: &mut TowerGraphs,
) -> Result<Vec<StageReport>, BundleError> {
    let contents = contents(golden);
    let mut item_check = BatchCheck::new("item tower", "item in batches");
    let mut user_check = BatchCheck::new("user tower", "user in batches");
    let mut cvr_check = BatchCheck::new("CVR graph", "mid_emb in batches");
    let record_dims = manifest.item_tower.record_dims();
    let records = item_tower::embed(graphs, &contents, record_dims)?;
    for (content, record) in contents.iter().zip(&records) {
        let alone = item_tower::embed(graphs, std::slice::from_ref(content), record_dims)?.concat();
        let (item, adapted) = record.split_at(record_dims.item);
        item_check.compare(item, &alone[..record_dims.item])?;
        item_check.compare(adapted, &alone[record_dims.item..])?;
    }
    let (items, adapted): (Vec<&[f32]>, Vec<&[f32]>) =
        records.iter().map(|record| record.split_at(record_dims.item)).unzip();
    let dims = manifest.user_dims();
    // Neighbours with other actions, so that a tower that mixes them up is found.
    let actions: Vec<i64> = (0..=manifest.history.actions.len() as i64).cycle().take(adapted.len()).collect();
    let history =
        |n_items: usize| History { adapted: adapted[..n_items].concat(), actions: actions[..n_items].to_vec() };
    let longest = adapted.len().min(manifest.user_tower.max_history);
    let histories: Vec<History> = (0..=longest).map(history).collect();
    let users = user_tower::embed(graphs, histories.clone(), dims)?;
    for (history, user) in histories.iter().zip(users.chunks_exact(dims.user)) {
        user_check.compare(user, &user_tower::embed(graphs, vec![history.clone()], dims)?)?;
    }
    let dims = FusionDims { embedding: manifest.user_tower.dim, mid: manifest.cvr.dim };
    let (n_users, one_user) = (histories.len(), dims.embedding);
    let owners: Vec<i64> = (0..items.len()).map(|i| (i % n_users) as i64).collect();
    let together = fusion::fuse(graphs, &users, &items.concat(), &owners, dims)?;
    for (row, (item, owner)) in items.iter().zip(&owners).enumerate() {
        let user = &users[*owner as usize * one_user..][..one_user];
        let alone = fusion::fuse(graphs, user, item, &[0], dims)?;
        cvr_check.compare(together.mid_emb.row(row), alone.mid_emb.row(0))?;
        cvr_check.compare(&together.cvr[row..=row], &alone.cvr)?;
    }
    Ok(vec![item_check.report, user_check.report, cvr_check.report])
}

/// The most golden items that are used.
const MAX_ITEMS: usize = 4;

/// Golden content embeddings, and others of the same length that are far from them: their values in reverse order, and negated.
fn contents(golden: &Golden) -> Vec<Vector> {
    let mut contents = Vec::new();
    for content in golden.contents().take(MAX_ITEMS) {
        contents.push(Vector::from(content));
        contents.push(content.iter().rev().copied().collect());
        contents.push(content.iter().map(|value| -value).collect());
    }
    contents
}
