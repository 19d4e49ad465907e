//! Shadows: models that score the requests of another model, to be compared with it before they answer any request.
//!
//! A shadow scores the same page with its own towers (and its own encoder, if it has another one) after the answer has been
//! computed, so it delays no answer. It scores only a few requests at once; requests that arrive while it is busy are left
//! out and counted, so its cost is bounded whatever the traffic. Its results go into two histograms and nowhere else.

use super::{Page, Pipeline, Waits, admission::Deadlines};
use crate::{
    bundle::{Model, Shadow},
    content::Open,
    domain::{Matrix, MidEmbResponse, Outputs, RowStatus, cosine},
    telemetry::events,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::OwnedSemaphorePermit;

/// No caller waits for a shadow; this only keeps a stuck one from holding its permit forever.
const PATIENCE: Duration = Duration::from_secs(2);

/// The shadow jobs of one request; usually none.
pub(super) struct Shadows {
    jobs: Vec<Job>,
    page: Option<Page>,
    outputs: Outputs,
}

struct Job {
    model: Arc<Model>,
    permit: OwnedSemaphorePermit,
}

impl Shadows {
    /// Takes one permit from each shadow that can accept another request, and keeps a copy of the page for them.
    pub(super) fn reserve<'a>(shadows: impl Iterator<Item = &'a Shadow>, page: &Page, outputs: Outputs) -> Self {
        // Only `mid_emb` and `cvr` are compared, and only if the request asks for them.
        let outputs = Outputs { user_emb: false, item_emb: false, ..outputs };
        let mut jobs = Vec::new();
        for Shadow { model, permits, .. } in shadows.filter(|_| outputs.needs_fusion()) {
            match Arc::clone(permits).try_acquire_owned() {
                Ok(permit) => jobs.push(Job { model: Arc::clone(model), permit }),
                Err(_) => events::shadow_request_finished(&model.reference.name, "left_out"),
            }
        }
        let page = if jobs.is_empty() { None } else { Some(page.clone()) };
        Shadows { jobs, page, outputs }
    }

    /// Scores the page in the background and compares the result with `answer`.
    pub(super) fn compare(self, pipeline: &Arc<Pipeline>, answer: &MidEmbResponse) {
        let Shadows { jobs, page: Some(page), outputs } = self else { return };
        let answered = Arc::new(ComparedOutputs::of(answer));
        for Job { model, permit } in jobs {
            let (pipeline, page, answered) = (Arc::clone(pipeline), page.clone(), Arc::clone(&answered));
            tokio::spawn(async move {
                let _permit = permit;
                let now = Instant::now();
                let waits = Waits { deadlines: Deadlines::split(now, now + PATIENCE), gate: &Open };
                let name = &model.reference.name;
                match pipeline.answer(&model, page, outputs, waits).await {
                    Ok(shadow_answer) => {
                        answered.compare(name, &ComparedOutputs::of(&shadow_answer));
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

/// The parts of an answer that are compared.
struct ComparedOutputs {
    statuses: Vec<RowStatus>,
    mid_emb: Option<Matrix>,
    cvr: Option<Vec<f32>>,
}

impl ComparedOutputs {
    fn of(answer: &MidEmbResponse) -> Self {
        let MidEmbResponse { statuses, mid_emb, cvr, .. } = answer;
        ComparedOutputs { statuses: statuses.clone(), mid_emb: mid_emb.clone(), cvr: cvr.clone() }
    }

    fn compare(&self, shadow_name: &str, shadow: &ComparedOutputs) {
        let mid_embs = self.mid_emb.as_ref().zip(shadow.mid_emb.as_ref());
        let cvrs = self.cvr.as_ref().zip(shadow.cvr.as_ref());
        for (row, (status, shadow_status)) in self.statuses.iter().zip(&shadow.statuses).enumerate() {
            if (*status, *shadow_status) != (RowStatus::Ok, RowStatus::Ok) {
                continue;
            }
            let cosine = mid_embs.map(|(a, b)| cosine_or_zero(a.row(row), b.row(row)));
            let cvr_difference = cvrs.map(|(a, b)| f64::from((a[row] - b[row]).abs()));
            events::shadow_row_compared(shadow_name, cosine, cvr_difference);
        }
    }
}

/// The cosine of two vectors, or 0 if one of them is all zeros.
fn cosine_or_zero(a: &[f32], b: &[f32]) -> f64 {
    let cosine = cosine(a, b);
    if cosine.is_nan() { 0.0 } else { cosine }
}

#[cfg(test)]
mod tests {
    use super::cosine_or_zero as cosine;

    #[test]
    fn the_cosine_depends_on_directions_only() {
        assert!((cosine(&[1.0, 2.0], &[3.0, 6.0]) - 1.0).abs() < 1e-12);
        assert!((cosine(&[1.0, 2.0], &[-1.0, -2.0]) + 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 4.0]).abs() < 1e-12);
        assert!(cosine(&[0.0, 0.0], &[1.0, 1.0]).abs() < 1e-12);
    }
}
