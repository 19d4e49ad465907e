//! The pages that are asked again and again, what each of two configs answers to them, and whether an answer is one of the two.

use crate::{
    cli::{
        bench::{
            Args,
            traffic::{self, Client},
        },
        client::{numbers, refused},
    },
    wire::proto::{GetMidEmbRequest, GetMidEmbResponse, Item, ModelRef, Output, RowStatus, Tensor},
};
use anyhow::{Context, ensure};
use fastrand::Rng;

/// How far a number may be from its reference: what other batches may round otherwise, and far below what two bundles differ
/// by.
pub(super) const TOLERANCE: f32 = 1e-4;
/// Two references that are as close as that in most rows could not show which of them an answer was made from.
const CLEARLY: f32 = 10.0 * TOLERANCE;

/// Pages as w1-hot sends them, each with a user and a history of its own.
pub(super) fn draw(args: &Args, items: &[Item]) -> Vec<GetMidEmbRequest> {
    let mut rng = Rng::with_seed(args.seed);
    let page = |i| GetMidEmbRequest {
        user_id: format!("bench-user-{i}"),
        outputs: [Output::MidEmb, Output::Cvr].map(i32::from).to_vec(),
        ..traffic::request(args, items, &mut rng)
    };
    (0..args.reload.different_pages).map(page).collect()
}

/// What the config in force answers; an error where a row of it is not OK.
pub(super) async fn ask_all(server: &Client, pages: &[GetMidEmbRequest]) -> anyhow::Result<Vec<Reference>> {
    let mut answers = Vec::with_capacity(pages.len());
    for page in pages {
        let answer = server.clone().get_mid_emb(page.clone()).await.map_err(refused("GetMidEmb"))?.into_inner();
        answers.push(Reference::of(&answer, page.candidates.len())?);
    }
    Ok(answers)
}

/// What one config answers to one page.
#[derive(Debug, Clone)]
pub(super) struct Reference {
    pub(super) model: ModelRef,
    history_used: u32,
    mid_emb: Numbers,
    cvr: Numbers,
}

/// A tensor that was read.
#[derive(Debug, Clone)]
struct Numbers {
    shape: Vec<u32>,
    values: Vec<f32>,
}

impl Numbers {
    /// None where the data is not what the shape says.
    fn of(tensor: Option<&Tensor>) -> Option<Self> {
        let tensor = tensor?;
        let numbers = Numbers { shape: tensor.shape.clone(), values: numbers(tensor) };
        (numbers.shape.iter().product::<u32>() as usize == numbers.values.len()).then_some(numbers)
    }

    fn row(&self, i: usize) -> &[f32] {
        let width: u32 = self.shape.iter().skip(1).product();
        &self.values[i * width as usize..][..width as usize]
    }

    /// Whether no number of this row is further away than that; one that is not finite always is.
    fn is_near(&self, other: &Self, i: usize, tolerance: f32) -> bool {
        self.row(i).iter().zip(other.row(i)).all(|(x, y)| (x - y).abs() <= tolerance)
    }
}

impl Reference {
    fn of(answer: &GetMidEmbResponse, n_candidates: usize) -> anyhow::Result<Self> {
        let n_not_ok = n_late_history(answer) + n_not_ok(answer);
        ensure!(n_not_ok == 0, "{n_not_ok} rows of a page are not OK, though all its items are warm");
        let mid_emb = Numbers::of(answer.mid_emb.as_ref()).context("an answer without mid_emb")?;
        let cvr = Numbers::of(answer.cvr.as_ref()).context("an answer without cvr")?;
        let n_rows = Some(n_candidates as u32);
        let has_rows = |numbers: &Numbers| numbers.shape.first().copied() == n_rows;
        let fits = answer.statuses.len() == n_candidates && has_rows(&mid_emb) && has_rows(&cvr);
        ensure!(fits, "an answer that has not a row a candidate");
        let model = answer.model.clone().context("an answer that names no model")?;
        Ok(Reference { model, history_used: answer.history_used, mid_emb, cvr })
    }

    /// Whether an answer that mixes the two would be near neither of them.
    fn is_clearly_other_than(&self, other: &Self) -> bool {
        if self.model.digest == other.model.digest {
            return false;
        }
        if self.mid_emb.shape != other.mid_emb.shape {
            return true;
        }
        let n_rows = self.cvr.values.len();
        let n_apart = (0..n_rows).filter(|i| !self.mid_emb.is_near(&other.mid_emb, *i, CLEARLY)).count();
        2 * n_apart > n_rows
    }
}

/// Candidates.
fn n_not_ok(answer: &GetMidEmbResponse) -> u64 {
    answer.statuses().filter(|status| *status != RowStatus::Ok).count() as u64
}

/// History items that should have been read and were not.
fn n_late_history(answer: &GetMidEmbResponse) -> u64 {
    let fine = |status: &RowStatus| matches!(status, RowStatus::Ok | RowStatus::NotUsed);
    answer.history_statuses().filter(|status| !fine(status)).count() as u64
}

/// What an answer is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// What the config answers alone that it names the model of; rows that are not OK are not looked at.
    Whole {
        /// Candidates and history items that are not OK.
        n_rows_not_ok: u64,
    },
    /// It matches no reference.
    Mixed(String),
}

/// Requests, and what each of the configs answers.
pub(super) struct Pages {
    pub(super) requests: Vec<GetMidEmbRequest>,
    /// By config, then by page.
    answers: Vec<Vec<Reference>>,
}

impl Pages {
    /// An error unless all can be told apart.
    pub(super) fn new(requests: Vec<GetMidEmbRequest>, answers: Vec<Vec<Reference>>) -> anyhow::Result<Self> {
        for (i, a) in answers.iter().enumerate() {
            for b in &answers[i + 1..] {
                let n_alike = a.iter().zip(b).filter(|(a, b)| !a.is_clearly_other_than(b)).count();
                ensure!(
                    n_alike == 0,
                    "two bundles answer alike: {n_alike} of {} pages cannot tell them apart",
                    a.len()
                );
            }
        }
        Ok(Pages { requests, answers })
    }

    /// How many configs there are.
    pub(super) fn n_configs(&self) -> usize {
        self.answers.len()
    }

    /// What `config` answers to the page.
    pub(super) fn reference(&self, config: usize, page: usize) -> &Reference {
        &self.answers[config][page]
    }

    pub(super) fn check(&self, page: usize, answer: &GetMidEmbResponse) -> Verdict {
        let candidates = (0..self.answers.len()).map(|config| self.reference(config, page));
        let model = answer.model.clone().unwrap_or_default();
        let Some(reference) = candidates.into_iter().find(|reference| reference.model == model) else {
            return Verdict::Mixed(format!("page {page} was answered by {model:?}"));
        };
        match reference.compare(answer) {
            Ok(n_rows_not_ok) => Verdict::Whole { n_rows_not_ok },
            Err(reason) => Verdict::Mixed(format!("page {page}, which names {:.12}: {reason}", model.digest)),
        }
    }
}

impl Reference {
    /// How many rows are not OK, or what in the answer is not this reference's.
    fn compare(&self, answer: &GetMidEmbResponse) -> Result<u64, String> {
        let n_late = n_late_history(answer);
        let n_rows_not_ok = n_not_ok(answer) + n_late;
        let (Some(mid_emb), Some(cvr)) = (Numbers::of(answer.mid_emb.as_ref()), Numbers::of(answer.cvr.as_ref()))
        else {
            return Err("a tensor is missing, or is not as long as its shape says".to_owned());
        };
        if (&mid_emb.shape, &cvr.shape) != (&self.mid_emb.shape, &self.cvr.shape) {
            return Err(format!("mid_emb is {:?} and cvr {:?}", mid_emb.shape, cvr.shape));
        }
        if answer.statuses.len() != self.cvr.values.len() {
            return Err(format!("{} rows have a status", answer.statuses.len()));
        }
        // Another history is another user: nothing of it can be compared.
        if n_late > 0 {
            return Ok(n_rows_not_ok);
        }
        if answer.history_used != self.history_used {
            return Err(format!("{} history items were read", answer.history_used));
        }
        let is_ok = |(_, status): &(usize, RowStatus)| *status == RowStatus::Ok;
        for (i, _) in answer.statuses().enumerate().filter(is_ok) {
            let is_near = mid_emb.is_near(&self.mid_emb, i, TOLERANCE) && cvr.is_near(&self.cvr, i, TOLERANCE);
            if !is_near {
                return Err(format!("row {i} is not what that model answers alone"));
            }
        }
        Ok(n_rows_not_ok)
    }
}
