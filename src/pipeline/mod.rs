//! One request, one line per stage. Start here.
//!
//! ```text
//! admit ──> route ──> resolve text ──> user cache ──> content (history) ──┐
//!                                 └──> item cache ──> content ──> item tower ──> score ──> answer
//! ```
//!
//! [`admission`] admits and splits the deadline, `candidates` and `user` gather the two sides of a request, `score` runs them
//! through towers and CVR head. [`warm_up`] and [`replay`] fill the caches ahead of traffic; `shadow` compares models;
//! [`item_trace`] records which items requests ask for.
//!
//! Invariants:
//! - A request reads one snapshot of one model; nothing in its answer comes from another.
//! - Candidates are independent: one that cannot be answered costs its own row.
//! - Nothing here computes: encoding and scoring run on inference threads, this code waits for them.
//! - A shadow scores a request after it was answered, and nobody waits for it.

pub mod admission;
mod candidates;
pub mod item_trace;
pub mod replay;
mod score;
mod shadow;
mod user;
pub mod warm_up;

use crate::{
    bundle::{Model, Registry},
    cache::Caches,
    content::{Content, Contents},
    domain::{
        Item, KnownItem, MidEmbRequest, MidEmbResponse, Outputs, Priority, RowStatus, Vector,
        error::{Error, ShedReason},
    },
    telemetry::events,
};
use admission::{Admission, Deadlines, Permit, check_wait, shed};
use item_trace::{Recorder, Traced};
use score::ScoreJob;
use shadow::Shadows;
use std::{sync::Arc, time::Instant};
use user::User;

/// Everything that requests share.
#[derive(Debug)]
pub struct Pipeline {
    /// Which models serve.
    pub registry: Registry,
    caches: Arc<Caches>,
    admission: Admission,
    contents: Contents,
    trace: Option<Arc<Recorder>>,
}

/// Items whose text was sent or is known; for the others, their rows' status.
type Resolved = Vec<Result<KnownItem, RowStatus>>;

/// A vector per row, or why there is none.
type Rows = Vec<Result<Vector, RowStatus>>;

/// What one request shows to a model.
#[derive(Debug, Clone)]
struct Page {
    /// Oldest first.
    history: Resolved,
    candidates: Resolved,
}

impl Pipeline {
    /// A pipeline without a model: requests are answered UNAVAILABLE until the registry has one.
    pub fn new(caches: Arc<Caches>, max_in_flight: usize) -> Self {
        Pipeline {
            registry: Registry::default(),
            contents: Contents::new(Arc::clone(&caches)),
            caches,
            admission: Admission::new(max_in_flight),
            trace: None,
        }
    }

    /// Records which items requests ask for.
    pub fn with_trace(self, trace: Option<Arc<Recorder>>) -> Self {
        Pipeline { trace, ..self }
    }

    /// Admits a request that has until `deadline`, or turns it away. The permit is held until the request is answered.
    ///
    /// Only the request's headers are known by then, so the question is whether the least busy of the models that have a share
    /// could serve it in time.
    pub fn admit(&self, deadline: Instant) -> Result<Permit, Error> {
        let permit = self.admission.admit()?;
        let snapshot = self.registry.current()?;
        let with_share = snapshot.models.iter().filter(|served| served.share > 0);
        let wait = with_share.map(|served| served.model.towers.expected_wait()).min().unwrap_or_default();
        check_wait(wait, deadline.saturating_duration_since(Instant::now()))?;
        Ok(permit)
    }

    /// Answers one admitted request. Calls `routed` with the model that answers, as soon as that is known.
    ///
    /// Cancel-safe: encoding that was queued goes on, and its result is cached; scoring is skipped.
    pub async fn get_mid_emb(
        self: &Arc<Self>,
        request: MidEmbRequest,
        routed: impl FnOnce(&Model),
    ) -> Result<MidEmbResponse, Error> {
        let deadlines = Deadlines::split(Instant::now(), request.deadline);
        let snapshot = self.registry.current()?;
        let model = snapshot.route(request.model.as_deref(), &request.user_id)?;
        routed(model);
        let page = self.resolve(request.history, request.candidates);
        let shadows = Shadows::of(snapshot.shadows_of(model, &request.user_id), &page, request.outputs);
        let answer = self.answer(model, page, request.outputs, deadlines).await?;
        shadows.compare(self, &answer);
        Ok(answer)
    }

    /// What `model` answers to a page whose texts are known.
    async fn answer(
        &self,
        model: &Model,
        page: Page,
        outputs: Outputs,
        deadlines: Deadlines,
    ) -> Result<MidEmbResponse, Error> {
        let Page { history, candidates } = page.within_window_of(model);
        let (user, mut candidates) = tokio::try_join!(
            async { Ok(self.embed_history(model, history, deadlines).await) },
            self.embed_candidates(model, candidates, deadlines),
        )?;
        let User { history, source } = user;
        let job = ScoreJob::new(source, &mut candidates, outputs);
        let scores = job.run(model, deadlines.answer_by, &self.caches.users).await?;
        Ok(scores.into_response(model, history, candidates))
    }

    /// Text for ids.
    fn resolve(&self, history: Vec<Item>, candidates: Vec<Item>) -> Page {
        let start = Instant::now();
        let trace = self.trace.as_deref().filter(|trace| !trace.has_ended());
        let traced = trace.map(|trace| (trace, Traced::ids(&history), Traced::ids(&candidates)));
        let history = self.caches.known_items.resolve(history, Priority::Request);
        let candidates = self.caches.known_items.resolve(candidates, Priority::Request);
        if let Some((trace, history_ids, candidate_ids)) = traced {
            trace.record(history_ids.resolved(&history), candidate_ids.resolved(&candidates));
        }
        events::stage_finished("resolve", start);
        Page { history, candidates }
    }
}

impl Page {
    /// Marks history items older than the model's window as not used.
    fn within_window_of(mut self, model: &Model) -> Self {
        let n_too_old = self.history.len().saturating_sub(model.manifest.user_tower.max_history);
        self.history[..n_too_old].fill(Err(RowStatus::NotUsed));
        self
    }
}

fn vector_or_status(content: &Content) -> Result<Vector, RowStatus> {
    content.vector().cloned().ok_or(match content {
        Content::NotInTime => RowStatus::NotInTime,
        Content::NoText => RowStatus::UnknownItem,
        _ => RowStatus::Failed,
    })
}

/// The error of a request none of whose rows is ready. Overload is reported before lateness, because the caller should back off.
fn nothing_ready(n_shed: usize) -> Error {
    if n_shed > 0 { shed(ShedReason::EncoderQueue) } else { Error::DeadlineExceeded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::CacheLimits;
    use std::time::Duration;

    fn pipeline() -> Arc<Pipeline> {
        let caches = Caches::new(CacheLimits {
            content_bytes: 1 << 20,
            item_bytes: 1 << 20,
            user_bytes: 1 << 20,
            known_items_bytes: 1 << 20,
            max_text_bytes: 100,
        });
        Arc::new(Pipeline::new(Arc::new(caches), 1))
    }

    #[tokio::test]
    async fn a_server_without_a_model_is_unavailable_and_gives_its_permit_back() {
        let pipeline = pipeline();
        for _ in 0..2 {
            let request = MidEmbRequest {
                user_id: "u".to_owned(),
                history: Vec::new(),
                candidates: vec![Item { id: "a".to_owned(), text: None }],
                model: None,
                outputs: Outputs::default(),
                deadline: Instant::now() + Duration::from_secs(1),
            };
            let answer = pipeline.get_mid_emb(request, |_| ()).await;
            assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
        }
        assert!(matches!(pipeline.warm(pipeline.remember(Vec::new())).await, Err(Error::Unavailable(_))));
        assert!(matches!(pipeline.admit(Instant::now()), Err(Error::Unavailable(_))), "the one permit was lost");
        assert!(matches!(pipeline.admit(Instant::now()), Err(Error::Unavailable(_))), "the one permit was lost");
    }

    #[test]
    fn overload_is_reported_before_lateness() {
        assert!(matches!(nothing_ready(1), Error::Shed { reason: ShedReason::EncoderQueue, .. }));
        assert!(matches!(nothing_ready(0), Error::DeadlineExceeded));
    }
}
