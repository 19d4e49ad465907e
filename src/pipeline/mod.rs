//! One request, one line per stage. Start here.
//!
//! ```text
//! hash ids ──> route ──> resolve text ──> user cache ──> item cache ──all found────────────────────> score ──> answer
//!                                                             └─missing─> content ─> item tower ──┘
//! ```
//!
//! [`admission`] admits requests and splits their deadlines, `user` looks up the user, `items` finds the record of every item, and
//! `score` runs the user tower and the CVR head. [`warm_up`] and [`replay`] fill the caches ahead of traffic, `shadow` compares
//! models, and [`item_trace`] records which items requests ask for.
//!
//! Invariants:
//! - One model answers a request; nothing in the answer comes from another model.
//! - Candidates are independent: one that fails loses only its own row.
//! - Nothing is computed here: encoding and scoring run on inference threads, and this code awaits them.
//! - A shadow scores a request after its answer has been computed, and no caller waits for it.

pub mod admission;
pub mod item_trace;
mod items;
pub mod replay;
mod rows;
mod score;
mod shadow;
mod user;
pub mod warm_up;

use crate::content::EncoderGate;
use crate::{
    bundle::{Model, Registry, registry::RoutingKey},
    cache::{Caches, known_items::HashedItem},
    content::{Content, Contents},
    domain::{
        Action, KnownItem, MidEmbRequest, MidEmbResponse, Outputs, Priority, RowStatus, Vector,
        error::{Error, ShedReason},
    },
    served_features::ServedFeatures,
    telemetry::events,
};
use admission::{Admission, Deadlines, Permit, check_wait, shed};
use item_trace::{ItemsToTrace, Recorder};
use score::ScoreJob;
use shadow::Shadows;
use std::{sync::Arc, time::Instant};

/// The state that all requests share.
#[derive(Debug)]
pub struct Pipeline {
    /// The models that serve.
    pub registry: Registry,
    /// Samples what is answered, if that is wanted. The services do, as they know a request's id and its answer's bytes.
    pub served_features: Option<Arc<ServedFeatures>>,
    caches: Arc<Caches>,
    admission: Admission,
    contents: Contents,
    trace: Option<Arc<Recorder>>,
}

/// How long a request waits, and whether it may wait for the encoder.
#[derive(Debug, Clone, Copy)]
struct Waits<'a> {
    deadlines: Deadlines,
    gate: &'a dyn EncoderGate,
}

/// One entry per item: the item where its text was sent or is known, otherwise its row's status.
type Resolved = Vec<Result<KnownItem, RowStatus>>;

/// One entry per item: its record, or the status that says why it has none.
type Records = Vec<Result<Vector, RowStatus>>;

/// A request that borrows nothing from its message any more.
#[derive(Debug)]
pub struct PreparedRequest {
    model: Option<String>,
    routing_key: RoutingKey,
    history: Vec<HashedItem>,
    history_actions: Vec<Action>,
    candidates: Vec<HashedItem>,
    /// The ids of the history and of the candidates, if they are recorded.
    to_trace: Option<[ItemsToTrace; 2]>,
    outputs: Outputs,
    deadline: Instant,
}

/// The part of a request that a model reads.
#[derive(Debug, Clone)]
struct Page {
    /// The number of items before `history` that are too old for the model.
    n_not_used: usize,
    /// Oldest first.
    history: Resolved,
    /// One per history item, or none at all.
    history_actions: Vec<Action>,
    candidates: Resolved,
}

impl Pipeline {
    /// Creates a pipeline without a model: requests are answered UNAVAILABLE until the registry has one.
    ///
    /// `max_in_flight` requests are worked on at once, and as many as `max_encoding` wait for the encoder besides.
    pub fn new(caches: Arc<Caches>, max_in_flight: usize, max_encoding: usize) -> Self {
        Pipeline {
            registry: Registry::default(),
            served_features: None,
            contents: Contents::new(Arc::clone(&caches)),
            caches,
            admission: Admission::new(max_in_flight, max_encoding),
            trace: None,
        }
    }

    /// Records which items requests ask for.
    pub fn with_trace(self, trace: Option<Arc<Recorder>>) -> Self {
        Pipeline { trace, ..self }
    }

    /// Samples what is answered.
    pub fn with_served_features(self, served_features: Option<Arc<ServedFeatures>>) -> Self {
        Pipeline { served_features, ..self }
    }

    /// Turns a request with this deadline away if it would not be admitted or not be served in time.
    ///
    /// Only the request's headers have arrived at this point, so the check is whether the least busy of the models with a
    /// share of the traffic could serve it in time.
    pub fn check_admission(&self, deadline: Instant) -> Result<(), Error> {
        self.admission.check()?;
        let models = self.registry.current()?;
        let with_share = models.live.iter().filter(|served| served.share > 0);
        let wait = with_share.map(|served| served.model.towers.expected_wait()).min().unwrap_or_default();
        check_wait(wait, deadline.saturating_duration_since(Instant::now()))
    }

    /// Admits a request whose message has arrived, or sheds it. [`Pipeline::get_mid_emb`] takes the permit.
    pub fn admit(&self) -> Result<Permit, Error> {
        self.admission.admit()
    }

    /// Takes from a request what is needed once its message is gone. Takes no lock that other requests wait for, so it may run on a
    /// thread that gives way.
    pub fn prepare(&self, request: MidEmbRequest<'_>) -> PreparedRequest {
        let MidEmbRequest { user_id, history, history_actions, candidates, model, outputs, deadline } = request;
        let is_traced = self.trace.as_ref().is_some_and(|trace| !trace.has_ended());
        PreparedRequest {
            model: model.map(str::to_owned),
            routing_key: RoutingKey::new(user_id, history.iter().map(|item| item.id)),
            to_trace: is_traced.then(|| [ItemsToTrace::from_ids(&history), ItemsToTrace::from_ids(&candidates)]),
            history: self.caches.known_items.hash(history),
            history_actions,
            candidates: self.caches.known_items.hash(candidates),
            outputs,
            deadline,
        }
    }

    /// Answers one admitted request. Calls `on_routed` with the model that answers as soon as it is chosen.
    ///
    /// Cancel-safe: queued encoding continues and its result is cached; scoring is skipped.
    pub async fn get_mid_emb(
        self: &Arc<Self>,
        permit: Permit,
        request: PreparedRequest,
        on_routed: impl FnOnce(&Model),
    ) -> Result<MidEmbResponse, Error> {
        let deadlines = Deadlines::split(Instant::now(), request.deadline);
        let models = self.registry.current()?;
        let model = models.route(request.model.as_deref(), &request.routing_key)?;
        on_routed(model);
        let (outputs, shadows) = (request.outputs, models.shadows_of(model, &request.routing_key));
        let page = self.resolve(request.history, request.history_actions, request.candidates, request.to_trace);
        let shadows = Shadows::reserve(shadows, &page, outputs);
        let answer = self.answer(model, page, outputs, Waits { deadlines, gate: &permit }).await?;
        shadows.compare(self, &answer);
        Ok(answer)
    }

    /// Answers a resolved page with `model`.
    async fn answer(
        &self,
        model: &Model,
        page: Page,
        outputs: Outputs,
        waits: Waits<'_>,
    ) -> Result<MidEmbResponse, Error> {
        let page = page.limit_history(model.manifest.user_tower.max_history);
        let user = self.look_up_user(model, &page);
        let mut items = self.embed_items(model, &page, &user, waits).await?;
        let user = user.into_source(model, &page, &mut items.history);
        let job = ScoreJob::new(user, &mut items.candidates, outputs);
        let scores = job.run(model, waits.deadlines.answer_by, &self.caches.users).await?;
        Ok(scores.into_response(model, &page, items))
    }

    /// Looks up the texts of items that were sent as ids, and remembers the texts that were sent.
    fn resolve(
        &self,
        history: Vec<HashedItem>,
        history_actions: Vec<Action>,
        candidates: Vec<HashedItem>,
        to_trace: Option<[ItemsToTrace; 2]>,
    ) -> Page {
        let start = Instant::now();
        let [history, candidates] = self.caches.known_items.resolve_lists([history, candidates], Priority::Request);
        if let Some((trace, [history_ids, candidate_ids])) = self.trace.as_deref().zip(to_trace) {
            trace.record(history_ids.with_digests(&history), candidate_ids.with_digests(&candidates));
        }
        events::stage_finished("resolve", start);
        Page { n_not_used: 0, history, history_actions, candidates }
    }
}

impl Page {
    /// Leaves the newest `max_history` history items.
    fn limit_history(mut self, max_history: usize) -> Self {
        self.n_not_used = self.history.len().saturating_sub(max_history);
        self.history.drain(..self.n_not_used);
        self.history_actions.drain(..self.n_not_used.min(self.history_actions.len()));
        self
    }

    /// What the user did with the history item at `position`.
    fn action(&self, position: usize) -> Action {
        self.history_actions.get(position).copied().unwrap_or_default()
    }
}

fn vector_or_status(content: &Content) -> Result<Vector, RowStatus> {
    content.vector().cloned().ok_or(match content {
        Content::NotInTime => RowStatus::NotInTime,
        Content::NoText => RowStatus::UnknownItem,
        Content::Shed(_) => RowStatus::Shed,
        _ => RowStatus::Failed,
    })
}

/// The error for a request without a single ready row, if one of its rows was shed or late. `shed_for` is why rows were shed, if
/// any were. Overload takes precedence over lateness, because the caller should back off.
fn no_row_ready(statuses: &[RowStatus], shed_for: Option<ShedReason>) -> Option<Error> {
    if statuses.contains(&RowStatus::Ok) {
        return None;
    }
    if let Some(reason) = shed_for {
        return Some(shed(reason));
    }
    statuses.contains(&RowStatus::NotInTime).then_some(Error::DeadlineExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::CacheLimits,
        domain::{Item, ItemText},
    };
    use std::time::Duration;

    fn pipeline() -> Arc<Pipeline> {
        let caches = Caches::new(CacheLimits {
            content_bytes: 1 << 20,
            item_bytes: 1 << 20,
            user_bytes: 1 << 20,
            known_items_bytes: 1 << 20,
            max_text_bytes: 100,
        });
        Arc::new(Pipeline::new(Arc::new(caches), 1, 1))
    }

    #[tokio::test]
    async fn without_a_model_requests_are_unavailable_and_release_their_permits() {
        let pipeline = pipeline();
        for _ in 0..2 {
            let request = MidEmbRequest {
                user_id: "u",
                history: Vec::new(),
                history_actions: Vec::new(),
                candidates: vec![Item { id: "a", text: None }],
                model: None,
                outputs: Outputs::default(),
                deadline: Instant::now() + Duration::from_secs(1),
            };
            let request = pipeline.prepare(request);
            let answer = pipeline.get_mid_emb(pipeline.admit().unwrap(), request, |_| ()).await;
            assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
        }
        let items = pipeline.prepare_items(vec![Item { id: "a", text: Some(Ok(ItemText::titled("a"))) }]);
        let warm_up = pipeline.remember(items);
        assert!(matches!(pipeline.warm(warm_up).await, Err(Error::Unavailable(_))));
        assert!(matches!(pipeline.check_admission(Instant::now()), Err(Error::Unavailable(_))));
    }

    #[test]
    fn overload_takes_precedence_over_lateness() {
        use RowStatus::{Failed, NotInTime, Ok, Shed};
        for reason in [ShedReason::Encoding, ShedReason::EncoderQueue] {
            let error = no_row_ready(&[NotInTime, Shed], Some(reason)).unwrap();
            assert!(matches!(error, Error::Shed { reason: found, .. } if found == reason), "{reason:?}: {error:?}");
            assert!(no_row_ready(&[Ok, Shed, NotInTime], Some(reason)).is_none());
        }
        assert!(matches!(no_row_ready(&[Failed, NotInTime], None), Some(Error::DeadlineExceeded)));
        assert!(no_row_ready(&[Failed], None).is_none());
    }
}
