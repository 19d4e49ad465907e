//! The golden check: compares the graphs' results on this machine with PyTorch's results from training, stage by stage.
//!
//! Each stage starts from the previous stage's golden result, so a mismatch is reported for the stage that causes it.

use super::{BundleError, Manifest, files};
use crate::{
    content::EncoderModel,
    domain::{Action, ActionCodes, ItemText, Tolerance, Vector, cosine},
    inference::{Graph, GraphError},
    towers::{TowerGraphs, fusion, fusion::FusionDims, item_tower, user_tower, user_tower::History},
};
use serde::Deserialize;
use std::{fmt, path::Path};

/// The golden vectors, written by the trainer from PyTorch.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    items: Vec<GoldenItem>,
    users: Vec<GoldenUser>,
    pairs: Vec<GoldenPair>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GoldenItem {
    text: ItemText,
    prompt: String,
    token_ids: Vec<i64>,
    content: Vec<f32>,
    item: Vec<f32>,
    adapted: Vec<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GoldenUser {
    history: Vec<usize>,
    /// One per history item, or none at all.
    #[serde(default)]
    actions: Vec<Action>,
    user: Vec<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GoldenPair {
    user: usize,
    item: usize,
    mid_emb: Vec<f32>,
    cvr: f32,
}

/// The largest differences of one stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageReport {
    /// The stage's name.
    pub stage: &'static str,
    /// The number of vectors compared.
    pub n_vectors: usize,
    /// The largest difference of a single value.
    pub max_absolute: f32,
    /// The smallest cosine; 1 for stages of single numbers.
    pub min_cosine: f64,
}

/// A result that differs from its golden counterpart.
#[derive(Debug, Clone, PartialEq)]
pub struct Mismatch {
    /// The stage and the index of the result, such as "content 3".
    pub subject: String,
    /// How it differs; the predicate of a sentence about `subject`.
    pub problem: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.subject, self.problem)
    }
}

/// Collects the comparisons of one stage.
struct StageCheck {
    report: StageReport,
    tolerance: Tolerance,
}

impl StageCheck {
    fn new(stage: &'static str) -> Self {
        StageCheck::within(Tolerance::SINGLE_PRECISION, stage)
    }

    fn within(tolerance: Tolerance, stage: &'static str) -> Self {
        StageCheck { report: StageReport { stage, n_vectors: 0, max_absolute: 0.0, min_cosine: 1.0 }, tolerance }
    }

    fn compare(&mut self, index: usize, found: &[f32], expected: &[f32]) -> Result<(), Mismatch> {
        let subject = || format!("{} {index}", self.report.stage);
        let mismatch = |problem: String| Err(Mismatch { subject: subject(), problem });
        if found.len() != expected.len() {
            return mismatch(format!("has {} values, golden has {}", found.len(), expected.len()));
        }
        if let Some(value) = found.iter().find(|x| !x.is_finite()) {
            return mismatch(format!("is not finite: it contains {value}"));
        }
        // `f32::max` ignores NaN, so the golden values must be checked, too.
        if let Some(value) = expected.iter().find(|x| !x.is_finite()) {
            return mismatch(format!("cannot be checked: golden contains {value}"));
        }
        let absolute = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let cosine = if expected.len() > 1 { cosine(found, expected) } else { 1.0 };
        // The cosine with a zero vector is NaN, which counts as a mismatch.
        if !self.tolerance.holds(absolute, cosine) {
            let Tolerance { absolute: max_absolute, cosine: min_cosine } = self.tolerance;
            return mismatch(format!(
                "differs from golden by {absolute:.2e} (at most {max_absolute:e}), cosine {cosine:.6} (above {min_cosine})"
            ));
        }
        self.report.n_vectors += 1;
        self.report.max_absolute = self.report.max_absolute.max(absolute);
        self.report.min_cosine = self.report.min_cosine.min(cosine);
        Ok(())
    }
}

/// Reads the golden file of a bundle.
pub(crate) fn read(folder: &Path, manifest: &Manifest) -> Result<Golden, BundleError> {
    let json = files::read_used(folder, manifest, &manifest.golden.file)?;
    parse(&json, &folder.join(&manifest.golden.file))
}

/// Reads golden vectors and checks that their indices are in range. `path` is for messages.
pub fn parse(json: &[u8], path: &Path) -> Result<Golden, BundleError> {
    let invalid = |reason: String| BundleError::GoldenFile { path: path.to_path_buf(), reason };
    let golden: Golden = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
    let (n_items, n_users) = (golden.items.len(), golden.users.len());
    let histories = golden.users.iter().flat_map(|user| &user.history);
    if histories.chain(golden.pairs.iter().map(|p| &p.item)).any(|i| *i >= n_items)
        || golden.pairs.iter().any(|pair| pair.user >= n_users)
    {
        return Err(invalid("an index is out of range".to_owned()));
    }
    let has_its_actions = |user: &GoldenUser| user.actions.is_empty() || user.actions.len() == user.history.len();
    if !golden.users.iter().all(has_its_actions) {
        return Err(invalid("a user has neither no actions nor one per history item".to_owned()));
    }
    if n_items == 0 || n_users == 0 || golden.pairs.is_empty() {
        return Err(invalid("it has no items, no users or no pairs, at least one of each is required".to_owned()));
    }
    Ok(golden)
}

impl Golden {
    /// The texts of the golden items.
    pub fn texts(&self) -> impl Iterator<Item = &ItemText> {
        self.items.iter().map(|item| &item.text)
    }

    /// The token ids of the golden items.
    pub fn token_ids(&self) -> impl Iterator<Item = &[i64]> + Clone {
        self.items.iter().map(|item| item.token_ids.as_slice())
    }

    /// The content embeddings of the golden items.
    pub fn contents(&self) -> impl Iterator<Item = &[f32]> {
        self.items.iter().map(|item| item.content.as_slice())
    }

    /// Compares content embeddings, one per golden item, with the golden ones.
    pub fn check_contents<'a>(
        &self,
        found: impl Iterator<Item = &'a [f32]>,
        tolerance: Tolerance,
    ) -> Result<StageReport, BundleError> {
        let mut stage = StageCheck::within(tolerance, "content");
        for (i, (found, item)) in found.zip(&self.items).enumerate() {
            stage.compare(i, found, &item.content)?;
        }
        Ok(stage.report)
    }
}

/// Runs every golden vector through the towers and the CVR head.
pub fn check_towers(
    golden: &Golden,
    manifest: &Manifest,
    towers: &mut TowerGraphs,
) -> Result<Vec<StageReport>, BundleError> {
    let mut reports = Vec::from(check_items(golden, manifest, towers)?);
    reports.push(check_users(golden, manifest, towers)?);
    reports.extend(check_pairs(golden, manifest, towers)?);
    Ok(reports)
}

/// Compares the template's prompts and the tokenizer's ids with the golden ones.
pub fn check_tokens(golden: &Golden, model: &EncoderModel) -> Result<StageReport, BundleError> {
    let mut stage = StageCheck::new("token_ids");
    for (i, item) in golden.items.iter().enumerate() {
        let prompt = model.template.render(&item.text).map_err(|e| BundleError::Encode(e.into()))?;
        if prompt != item.prompt {
            return Err(Mismatch {
                subject: format!("prompt {i}"),
                problem: format!("is {prompt:?}, golden is {:?}", item.prompt),
            }
            .into());
        }
        let ids = model.tokenize(&item.text)?;
        if ids != item.token_ids {
            return Err(Mismatch {
                subject: format!("token_ids {i}"),
                problem: format!("are {ids:?}, golden are {:?}", item.token_ids),
            }
            .into());
        }
        stage.report.n_vectors += 1;
    }
    Ok(stage.report)
}

/// Runs every golden text's token ids through the encoder. Returns the report and the computed content embeddings.
pub fn check_content(
    golden: &Golden,
    model: &EncoderModel,
    tolerance: Tolerance,
    graph: &mut Graph,
) -> Result<(StageReport, Vec<Vector>), BundleError> {
    let mut stage = StageCheck::within(tolerance, "content");
    let mut computed = Vec::with_capacity(golden.items.len());
    // Once in one batch and once one by one: a graph whose results depend on padding could pass one of the two.
    let batch: Vec<&[i64]> = golden.items.iter().map(|item| item.token_ids.as_slice()).collect();
    let together = model.encode(graph, &batch)?;
    for (i, item) in golden.items.iter().enumerate() {
        stage.compare(i, &together[i * model.dim..(i + 1) * model.dim], &item.content)?;
        let alone = model.encode(graph, &[&item.token_ids])?;
        stage.compare(i, &alone, &item.content)?;
        computed.push(alone.into());
    }
    Ok((stage.report, computed))
}

fn check_items(
    golden: &Golden,
    manifest: &Manifest,
    graphs: &mut TowerGraphs,
) -> Result<[StageReport; 2], BundleError> {
    let (mut items, mut adapted) = (StageCheck::new("item"), StageCheck::new("adapted"));
    let contents: Vec<Vector> = golden.items.iter().map(|item| item.content.as_slice().into()).collect();
    let dims = manifest.item_tower.record_dims();
    let records = item_tower::embed(graphs, &contents, dims)?;
    for (i, (record, golden)) in records.iter().zip(&golden.items).enumerate() {
        items.compare(i, &record[..dims.item], &golden.item)?;
        adapted.compare(i, &record[dims.item..], &golden.adapted)?;
    }
    Ok([items.report, adapted.report])
}

/// Refuses a bundle with an action that no golden user has: a list in another order than the trainer's would pass the check.
fn check_actions(golden: &Golden, manifest: &Manifest) -> Result<(), Mismatch> {
    for action in &manifest.history.actions {
        if !golden.users.iter().any(|user| user.actions.contains(action)) {
            let problem = format!("cannot be checked: no golden user has the action {action}");
            return Err(Mismatch { subject: "history.actions".to_owned(), problem });
        }
    }
    Ok(())
}

fn check_users(golden: &Golden, manifest: &Manifest, graphs: &mut TowerGraphs) -> Result<StageReport, BundleError> {
    let mut stage = StageCheck::new("user");
    check_actions(golden, manifest)?;
    let dims = manifest.user_dims();
    let codes = ActionCodes::of(&manifest.history.actions);
    let history = |user: &GoldenUser| History {
        adapted: user.history.iter().flat_map(|j| &golden.items[*j].adapted).copied().collect(),
        actions: codes.map_or_else(Vec::new, |codes| codes.of_history(&user.actions, user.history.len())),
    };
    let histories: Vec<History> = golden.users.iter().map(history).collect();
    // Once in one batch and once one by one: a tower that reads another user's items, or padding, could pass the latter.
    let together = user_tower::embed(graphs, histories.clone(), dims)?;
    for (i, (history, user)) in histories.into_iter().zip(&golden.users).enumerate() {
        stage.compare(i, &together[i * dims.user..(i + 1) * dims.user], &user.user)?;
        stage.compare(i, &user_tower::embed(graphs, vec![history], dims)?, &user.user)?;
    }
    Ok(stage.report)
}

fn check_pairs(
    golden: &Golden,
    manifest: &Manifest,
    graphs: &mut TowerGraphs,
) -> Result<[StageReport; 2], BundleError> {
    let (mut mid_emb, mut cvr) = (StageCheck::new("mid_emb"), StageCheck::new("cvr"));
    let dims = FusionDims { embedding: manifest.user_tower.dim, mid: manifest.cvr.dim };
    // Once in one batch and once one by one: in a batch each row must read its own user.
    let users: Vec<f32> = golden.users.iter().flat_map(|user| &user.user).copied().collect();
    let items: Vec<f32> = golden.pairs.iter().flat_map(|pair| &golden.items[pair.item].item).copied().collect();
    let owners: Vec<i64> = golden.pairs.iter().map(|pair| pair.user as i64).collect();
    let together = fusion::fuse(graphs, &users, &items, &owners, dims)?;
    for (i, pair) in golden.pairs.iter().enumerate() {
        let (user, item) = (&golden.users[pair.user].user, &golden.items[pair.item].item);
        let alone = fusion::fuse(graphs, user, item, &[0], dims)?;
        for (fused, row) in [(&together, i), (&alone, 0)] {
            mid_emb.compare(i, fused.mid_emb.row(row), &pair.mid_emb)?;
            cvr.compare(i, &fused.cvr[row..=row], &[pair.cvr])?;
        }
    }
    Ok([mid_emb.report, cvr.report])
}

impl From<Mismatch> for BundleError {
    fn from(mismatch: Mismatch) -> Self {
        BundleError::Golden(mismatch)
    }
}

impl From<GraphError> for BundleError {
    fn from(error: GraphError) -> Self {
        BundleError::Graph(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mismatch_is_reported_with_its_size() {
        let mut stage = StageCheck::new("content");
        assert_eq!(stage.compare(0, &[1.0, 0.0], &[1.0, 5e-5]), Ok(()));
        let off = stage.compare(3, &[1.0, 0.0], &[1.0, 0.01]).unwrap_err().to_string();
        assert!(off.starts_with("content 3 differs from golden by 1.00e-2"), "{off}");
        let turned = stage.compare(3, &[1e-5, 0.0], &[0.0, 1e-5]).unwrap_err().to_string();
        assert!(turned.contains("cosine 0.000000"), "{turned}");
        let nan = stage.compare(4, &[f32::NAN], &[0.1]).unwrap_err().to_string();
        assert_eq!(nan, "content 4 is not finite: it contains NaN");
        assert!(stage.compare(5, &[0.1], &[f32::NAN]).is_err());
        assert!(stage.compare(5, &[0.1], &[0.1, 0.2]).is_err());
    }
}
