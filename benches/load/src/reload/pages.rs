//! The pages that are asked again and again, what each config answers to them, and whether an answer is one of these.

use crate::{
    args::Args,
    traffic::{self, Service},
};
use anyhow::{Context, ensure};
use fastrand::Rng;
use midemb_client::{
    Error, Matrix,
    proto::{GetMidEmbRequest, GetMidEmbResponse, Item, ModelRef, Output, RowStatus, Tensor},
};

/// How far a number may be from its reference. Other batches may be rounded otherwise; two bundles differ by far more.
const TOLERANCE: f32 = 1e-4;
/// Two references must differ by more than this in most rows, or they could not show which of them an answer was made from.
const CLEAR_DIFFERENCE: f32 = 10.0 * TOLERANCE;

/// Pages as in w1-hot, each with a user and a history of its own.
pub(super) fn draw(args: &Args, items: &[Item]) -> Vec<GetMidEmbRequest> {
    let mut rng = Rng::with_seed(args.seed);
    let page = |i| GetMidEmbRequest {
        user_id: format!("bench-user-{i}"),
        outputs: [Output::MidEmb, Output::Cvr].map(i32::from).to_vec(),
        ..traffic::draw_page(args, items, &mut rng)
    };
    (0..args.reload.different_pages).map(page).collect()
}

/// The answers of the config in force; an error where a row is not OK.
pub(super) async fn ask_all(server: &Service, pages: &[GetMidEmbRequest]) -> anyhow::Result<Vec<Reference>> {
    let mut answers = Vec::with_capacity(pages.len());
    for page in pages {
        let answer = server.clone().get_mid_emb(page.clone()).await.map_err(Error::failed("GetMidEmb"))?.into_inner();
        answers.push(Reference::new(&answer, page.candidates.len())?);
    }
    Ok(answers)
}

/// What one config answers to one page.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) model: ModelRef,
    history_used: u32,
    mid_emb: Matrix<'static>,
    cvr: Matrix<'static>,
}

fn read(name: &str, tensor: Option<&Tensor>) -> anyhow::Result<Matrix<'static>> {
    let tensor = tensor.with_context(|| format!("an answer without {name}"))?;
    Ok(tensor.matrix().context(name.to_owned())?.into_owned())
}

/// Whether no number of row `i` is further away than that. A number that is not finite always is.
fn is_near(a: &Matrix<'_>, b: &Matrix<'_>, i: usize, tolerance: f32) -> bool {
    match (a.row(i), b.row(i)) {
        (Some(a), Some(b)) => a.iter().zip(b).all(|(x, y)| (x - y).abs() <= tolerance),
        _ => false,
    }
}

fn shape(matrix: &Matrix<'_>) -> (usize, usize) {
    (matrix.rows().len(), matrix.n_columns)
}

impl Reference {
    fn new(answer: &GetMidEmbResponse, n_candidates: usize) -> anyhow::Result<Self> {
        let n_not_ok = n_late_history(answer) + n_not_ok(answer);
        ensure!(n_not_ok == 0, "{n_not_ok} rows of a page are not OK, though all its items are warm");
        let mid_emb = read("mid_emb", answer.mid_emb.as_ref())?;
        let cvr = read("cvr", answer.cvr.as_ref())?;
        let n_rows = [answer.statuses.len(), mid_emb.rows().len(), cvr.rows().len()];
        ensure!(n_rows == [n_candidates; 3], "an answer that does not have one row per candidate");
        let model = answer.model.clone().context("an answer that names no model")?;
        Ok(Reference { model, history_used: answer.history_used, mid_emb, cvr })
    }

    /// Whether an answer that mixes the two would be near neither of them.
    fn is_distinct_from(&self, other: &Self) -> bool {
        if self.model.digest == other.model.digest {
            return false;
        }
        if shape(&self.mid_emb) != shape(&other.mid_emb) {
            return true;
        }
        let n_rows = self.cvr.rows().len();
        let is_apart = |i: &usize| !is_near(&self.mid_emb, &other.mid_emb, *i, CLEAR_DIFFERENCE);
        2 * (0..n_rows).filter(is_apart).count() > n_rows
    }
}

/// Candidates that are not OK.
fn n_not_ok(answer: &GetMidEmbResponse) -> u64 {
    answer.statuses().filter(|status| *status != RowStatus::Ok).count() as u64
}

/// History items that the model should have read and did not.
fn n_late_history(answer: &GetMidEmbResponse) -> u64 {
    let is_late = |status: &RowStatus| !matches!(status, RowStatus::Ok | RowStatus::NotUsed);
    answer.history_statuses().filter(is_late).count() as u64
}

/// What an answer was made from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The model that it names, and no other. Rows that are not OK are not compared.
    Whole {
        /// Candidates and history items that are not OK.
        n_rows_not_ok: u64,
    },
    /// Not one config's answer, and why.
    Mixed(String),
}

/// Requests, and each config's answers.
pub(super) struct Pages {
    pub(super) requests: Vec<GetMidEmbRequest>,
    /// By config, then by page.
    answers: Vec<Vec<Reference>>,
}

impl Pages {
    /// An error where two configs answer alike.
    pub(super) fn new(requests: Vec<GetMidEmbRequest>, answers: Vec<Vec<Reference>>) -> anyhow::Result<Self> {
        for (i, a) in answers.iter().enumerate() {
            for b in &answers[i + 1..] {
                let n_alike = a.iter().zip(b).filter(|(a, b)| !a.is_distinct_from(b)).count();
                ensure!(
                    n_alike == 0,
                    "two bundles answer alike: {n_alike} of {} pages cannot tell them apart",
                    a.len()
                );
            }
        }
        Ok(Pages { requests, answers })
    }

    pub(super) fn n_configs(&self) -> usize {
        self.answers.len()
    }

    /// The answer of `config` to the page.
    pub(super) fn reference(&self, config: usize, page: usize) -> &Reference {
        &self.answers[config][page]
    }

    pub(super) fn check(&self, page: usize, answer: &GetMidEmbResponse) -> Verdict {
        let model = answer.model.clone().unwrap_or_default();
        let mut references = (0..self.n_configs()).map(|config| self.reference(config, page));
        let Some(reference) = references.find(|reference| reference.model == model) else {
            return Verdict::Mixed(format!("page {page} was answered by a model of no config, {:?}", model.digest));
        };
        match reference.compare(answer) {
            Verdict::Mixed(reason) => {
                Verdict::Mixed(format!("page {page}, whose answer names model {:.12}: {reason}", model.digest))
            }
            whole => whole,
        }
    }
}

impl Reference {
    fn compare(&self, answer: &GetMidEmbResponse) -> Verdict {
        let n_late_history = n_late_history(answer);
        let whole = Verdict::Whole { n_rows_not_ok: n_not_ok(answer) + n_late_history };
        let tensors = (read("mid_emb", answer.mid_emb.as_ref()), read("cvr", answer.cvr.as_ref()));
        let (mid_emb, cvr) = match tensors {
            (Ok(mid_emb), Ok(cvr)) => (mid_emb, cvr),
            (Err(error), _) | (_, Err(error)) => return Verdict::Mixed(format!("{error:#}")),
        };
        if (shape(&mid_emb), shape(&cvr)) != (shape(&self.mid_emb), shape(&self.cvr)) {
            return Verdict::Mixed(format!("mid_emb is {:?} and cvr {:?}", shape(&mid_emb), shape(&cvr)));
        }
        if answer.statuses.len() != cvr.rows().len() {
            return Verdict::Mixed(format!("{} rows have a status", answer.statuses.len()));
        }
        // With another history it is another user: no number can be compared.
        if n_late_history > 0 {
            return whole;
        }
        if answer.history_used != self.history_used {
            return Verdict::Mixed(format!("{} history items were read", answer.history_used));
        }
        for (i, status) in answer.statuses().enumerate() {
            let is_same = is_near(&mid_emb, &self.mid_emb, i, TOLERANCE) && is_near(&cvr, &self.cvr, i, TOLERANCE);
            if status == RowStatus::Ok && !is_same {
                return Verdict::Mixed(format!("row {i} is not what that model answers alone"));
            }
        }
        whole
    }
}
