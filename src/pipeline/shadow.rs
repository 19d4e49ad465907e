//! Shadows: models that score what another one answers, to be compared with it before they answer anybody.
//!
//! A shadow reads the same page through its own towers (and its own encoder, where that is another one), after the answer is
//! on its way. It has room for a few requests at once; what comes while it is busy is left out and counted, so that it costs
//! the machine a bounded part however much traffic there is. Its results go into two histograms and nowhere else.

use super::{Page, Pipeline, admission::Deadlines};
use crate::{
    bundle::{Model, Shadow},
    domain::{Matrix, MidEmbResponse, Outputs, RowStatus, cosine},
    telemetry::events,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::OwnedSemaphorePermit;

/// Nobody waits for a shadow; this only keeps a stuck one from holding its room for ever.
const PATIENCE: Duration = Duration::from_secs(2);

/// The shadows of one request; mostly none.
pub(super) struct Shadows {
    jobs: Vec<(Arc<Model>, OwnedSemaphorePermit)>,
    page: Option<Page>,
    outputs: Outputs,
}

impl Shadows {
    /// Those of `shadows` that have room for another request, and what they are to read.
    pub(super) fn of<'a>(shadows: impl Iterator<Item = &'a Shadow>, page: &Page, outputs: Outputs) -> Self {
        // Only what was asked for is there to be compared.
        let outputs = Outputs { user_emb: false, item_emb: false, ..outputs };
        let mut jobs = Vec::new();
        for Shadow { model, room, .. } in shadows.filter(|_| outputs.needs_fusion()) {
            match Arc::clone(room).try_acquire_owned() {
                Ok(permit) => jobs.push((Arc::clone(model), permit)),
                Err(_) => events::shadow_request_finished(&model.reference.name, "left_out"),
            }
        }
        let page = (!jobs.is_empty()).then(|| page.clone());
        Shadows { jobs, page, outputs }
    }

    /// Scores the page in the background and compares the result with `answer`.
    pub(super) fn compare(self, pipeline: &Arc<Pipeline>, answer: &MidEmbResponse) {
        let Shadows { jobs, page: Some(page), outputs } = self else { return };
        let answered = Arc::new(Answered::of(answer));
        for (model, permit) in jobs {
            let (pipeline, page, answered) = (Arc::clone(pipeline), page.clone(), Arc::clone(&answered));
            tokio::spawn(async move {
                let _permit = permit;
                let now = Instant::now();
                let name = &model.reference.name;
                match pipeline.answer(&model, page, outputs, Deadlines::split(now, now + PATIENCE)).await {
                    Ok(found) => {
                        answered.compare(name, &Answered::of(&found));
                        events::shadow_request_finished(name, "compared");
                    }
                    Err(error) => {
                        events::shadow_failed(name, &error);
                        events::shadow_request_finished(name, "failed");
                    }
                }
            });
        }
    }
}

/// What of an answer is compared.
struct Answered {
    statuses: Vec<RowStatus>,
    mid_emb: Option<Matrix>,
    cvr: Option<Vec<f32>>,
}

impl Answered {
    fn of(answer: &MidEmbResponse) -> Self {
        let MidEmbResponse { statuses, mid_emb, cvr, .. } = answer;
        Answered { statuses: statuses.clone(), mid_emb: mid_emb.clone(), cvr: cvr.clone() }
    }

    fn compare(&self, name: &str, found: &Answered) {
        let is_ok = |statuses: &[RowStatus], row: usize| statuses.get(row) == Some(&RowStatus::Ok);
        for row in (0..self.statuses.len()).filter(|row| is_ok(&self.statuses, *row) && is_ok(&found.statuses, *row)) {
            let mid_embs = self.mid_emb.as_ref().zip(found.mid_emb.as_ref());
            let cvrs = self.cvr.as_ref().zip(found.cvr.as_ref());
            let difference = |(a, b): (&Vec<f32>, &Vec<f32>)| f64::from((a[row] - b[row]).abs());
            let cosine = mid_embs.map(|(a, b)| cosine_or_zero(a.row(row), b.row(row)));
            events::shadow_row_compared(name, cosine, cvrs.map(difference));
        }
    }
}

/// 0 where one of the two is all zeros.
fn cosine_or_zero(a: &[f32], b: &[f32]) -> f64 {
    let cosine = cosine(a, b);
    if cosine.is_nan() { 0.0 } else { cosine }
}

#[cfg(test)]
mod tests {
    use super::cosine_or_zero as cosine;

    #[test]
    fn a_cosine_is_of_directions_alone() {
        assert!((cosine(&[1.0, 2.0], &[3.0, 6.0]) - 1.0).abs() < 1e-12);
        assert!((cosine(&[1.0, 2.0], &[-1.0, -2.0]) + 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 4.0]).abs() < 1e-12);
        assert!(cosine(&[0.0, 0.0], &[1.0, 1.0]).abs() < 1e-12);
    }
}
