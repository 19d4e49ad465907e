//! One request, one line a stage. Start here.
//!
//! ```text
//! admit ──> route ──> resolve text ──> user cache ──> content (history) ──┐
//!                                 └──> item cache ──> content ──> item tower ──> score ──> answer
//! ```
//!
//! Invariants:
//! - A request reads one snapshot of one model; nothing in its answer comes from another.
//! - Candidates are independent: one that cannot be answered costs its own row.
//! - Nothing here computes: encoding and scoring run on inference threads, this code waits for them.
//! - A shadow scores after its request was answered, and nobody waits for it.

mod candidates;
pub mod replay;
mod score;
mod shadow;
mod user;

use crate::{
    admission::{Admission, Deadlines, Permit, check_wait, shed},
    bounded_cache::Contents as CacheContents,
    bundle::{Model, Registry},
    cache_snapshot::Caches,
    content::{Content, Contents, KnownItem, Wanted, batcher::Priority},
    domain::{Item, MidEmbRequest, MidEmbResponse, Outputs, RowStatus, Vector, WarmSummary},
    error::{Error, ShedReason},
    item_trace::{Recorder, Traced},
    known_items::KnownItems,
    telemetry::events,
    towers::{ItemKey, UserCache, user_cache},
    vector_cache::VectorCache,
};
use candidates::unique;
use score::ScoreJob;
use shadow::Shadows;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use user::User;

/// Bounds of the state that requests share.
#[derive(Debug, Clone, Copy)]
pub struct PipelineConfig {
    /// Bytes of content embeddings.
    pub content_cache_bytes: u64,
    /// Bytes of item embeddings.
    pub item_cache_bytes: u64,
    /// Bytes of user embeddings.
    pub user_cache_bytes: u64,
    /// Bytes of remembered text.
    pub known_items_bytes: u64,
    /// Bytes of one item's text.
    pub max_text_bytes: usize,
    /// Requests at once.
    pub max_in_flight: usize,
}

/// Everything that requests share.
#[derive(Debug)]
pub struct Pipeline {
    /// Which models serve.
    pub registry: Registry,
    admission: Admission,
    known_items: KnownItems,
    contents: Contents,
    items: VectorCache<ItemKey>,
    users: UserCache,
    trace: Option<Arc<Recorder>>,
}

/// Rows on their way to being scored: a vector, or why there is none.
type Rows = Vec<Result<Vector, RowStatus>>;

/// Items of a warm-up stream that are under way at once.
const WARM_UP_CHUNK: usize = 256;
/// Warm-up has no deadline of its own; this only keeps a stuck encoder from holding a stream for ever.
const WARM_UP_PATIENCE: Duration = Duration::from_secs(3600);

impl Pipeline {
    /// Empty caches and no model: requests are answered UNAVAILABLE until the registry has one.
    pub fn new(config: PipelineConfig) -> Self {
        Pipeline {
            registry: Registry::default(),
            admission: Admission::new(config.max_in_flight),
            known_items: KnownItems::new(config.known_items_bytes, config.max_text_bytes),
            contents: Contents::new(config.content_cache_bytes),
            items: VectorCache::new("item", config.item_cache_bytes),
            users: UserCache::new(config.user_cache_bytes),
            trace: None,
        }
    }

    /// Records which items requests ask for.
    pub fn with_trace(self, trace: Option<Arc<Recorder>>) -> Self {
        Pipeline { trace, ..self }
    }

    /// Lets a request in that has until `deadline`, or turns it away. The permit is held until it is answered.
    ///
    /// Known of the request are its headers alone, so what is asked is whether the least busy of the models that have a share
    /// could serve it in time.
    pub fn admit(&self, deadline: Instant) -> Result<Permit, Error> {
        let permit = self.admission.admit()?;
        let snapshot = self.registry.current()?;
        let shared = snapshot.models.iter().filter(|served| served.share > 0);
        let wait = shared.map(|served| served.model.towers.expected_wait()).min().unwrap_or_default();
        check_wait(wait, deadline.saturating_duration_since(Instant::now()))?;
        Ok(permit)
    }

    /// Answers one request, which was admitted. `routed` is told which model answers as soon as that is known.
    ///
    /// Cancel-safe: encoding that was queued goes on and is cached, scoring is skipped.
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

    /// What `model` says to a page whose texts are known.
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
        let scores = job.run(model, deadlines.answer_by, &self.users).await?;
        Ok(scores.into_response(model, history, candidates))
    }

    /// Remembers the texts of a warm-up, as the newest of their ids; [`Pipeline::warm`] takes it from there.
    pub fn remember(&self, items: Vec<Item>) -> WarmUp {
        let n_items = items.len();
        let usable = |item: &Item| item.text.is_some() && !item.id.is_empty();
        let resolved = self.known_items.resolve(items.into_iter().filter(usable).collect(), Priority::WarmUp);
        WarmUp { n_items, known: resolved.into_iter().flatten().collect() }
    }

    /// Encodes and caches what was remembered for every model that serves.
    ///
    /// Cancel-safe: what was queued goes on and is cached.
    pub async fn warm(&self, warm_up: WarmUp) -> Result<WarmSummary, Error> {
        let snapshot = self.registry.current()?;
        let WarmUp { n_items, known } = warm_up;
        let n_invalid = (n_items - known.len()) as u64;
        let mut summary = WarmSummary { n_items: n_items as u64, n_invalid, ..WarmSummary::default() };
        for known in known.chunks(WARM_UP_CHUNK) {
            let mut worst = vec![Warmth::Cached; known.len()];
            for model in snapshot.all() {
                let warmths = self.warm_for(model, known).await;
                worst.iter_mut().zip(warmths).for_each(|(worst, warmth)| *worst = warmth.max(*worst));
            }
            let count = |warmth| worst.iter().filter(|w| **w == warmth).count() as u64;
            summary.n_cached += count(Warmth::Cached);
            summary.n_encoded += count(Warmth::Encoded);
            summary.n_failed += count(Warmth::Failed);
        }
        Ok(summary)
    }

    /// The caches that outlive a restart.
    pub fn caches(&self) -> Caches<'_> {
        Caches { contents: self.contents.cache(), items: &self.items, known_items: &self.known_items }
    }

    /// What each cache holds.
    pub fn measure(&self) -> [CacheContents; 4] {
        let (content, item) = (self.contents.cache().measure(), self.items.measure());
        let measured = [content, item, self.users.measure(), self.known_items.measure()];
        measured.iter().for_each(|c| events::cache_measured(c.cache, c.n_entries, c.n_bytes));
        measured
    }

    /// Empties the cache called `name`, or all of them; `None` where there is no such cache.
    pub fn flush(&self, name: Option<&str>) -> Option<u64> {
        match name {
            Some("content") => Some(self.contents.cache().flush()),
            Some("item") => Some(self.items.flush()),
            Some(user_cache::NAME) => Some(self.users.flush()),
            Some(crate::known_items::NAME) => Some(self.known_items.flush()),
            Some(_) => None,
            None => {
                Some(self.contents.cache().flush() + self.items.flush() + self.users.flush() + self.known_items.flush())
            }
        }
    }

    /// Text for ids.
    fn resolve(&self, history: Vec<Item>, candidates: Vec<Item>) -> Page {
        let start = Instant::now();
        let trace = self.trace.as_deref().filter(|trace| !trace.has_ended());
        let traced = trace.map(|trace| (trace, Traced::ids(&history), Traced::ids(&candidates)));
        let history = self.known_items.resolve(history, Priority::Request);
        let candidates = self.known_items.resolve(candidates, Priority::Request);
        if let Some((trace, history_ids, candidate_ids)) = traced {
            trace.record(history_ids.resolved(&history), candidate_ids.resolved(&candidates));
        }
        events::stage_finished("resolve", start);
        Page { history, candidates }
    }

    fn wanted<'a>(&'a self, items: &'a [KnownItem], priority: Priority, until: Instant) -> Wanted<'a> {
        Wanted { items, texts: &self.known_items, priority, until }
    }

    async fn warm_for(&self, model: &Model, known: &[KnownItem]) -> Vec<Warmth> {
        let (wanted, places) = unique(known.iter());
        let until = Instant::now() + WARM_UP_PATIENCE;
        let contents = self.contents.embed(&model.encoder, self.wanted(&wanted, Priority::WarmUp, until)).await;
        let is_cached =
            |item: &KnownItem| self.items.contains(&ItemKey { tower: model.tower_digest, text: item.digest });
        let cached: Vec<bool> = wanted.iter().map(is_cached).collect();
        let missing = |i: &usize| !cached[*i];
        let missing: Vec<usize> = (0..wanted.len()).filter(missing).collect();
        let of_missing = |i: &usize| (wanted[*i].clone(), contents[*i].clone());
        let (items, item_contents): (Vec<KnownItem>, Vec<Content>) = missing.iter().map(of_missing).unzip();
        let mut is_embedded = cached;
        let wanted_ahead = self.wanted(&items, Priority::WarmUp, until);
        if let Ok(rows) = self.run_item_tower(model, wanted_ahead, &item_contents).await {
            missing.iter().zip(rows).for_each(|(i, row)| is_embedded[*i] = row.is_ok());
        }
        let warmth = |i: usize| match &contents[i] {
            _ if !is_embedded[i] => Warmth::Failed,
            // What another chunk or call is encoding is that one's to count.
            Content::Cached(_) | Content::Joined(_) => Warmth::Cached,
            Content::Encoded(_) => Warmth::Encoded,
            _ => Warmth::Failed,
        };
        places.into_iter().map(warmth).collect()
    }
}

/// Items of a warm-up whose texts are remembered, and that wait to be encoded.
#[derive(Debug)]
pub struct WarmUp {
    /// All that were sent.
    n_items: usize,
    /// Those that can be encoded.
    known: Vec<KnownItem>,
}

/// Items whose text was sent or known, else the row's status.
type Resolved = Vec<Result<KnownItem, RowStatus>>;

/// What one request shows to a model.
#[derive(Debug, Clone)]
struct Page {
    /// Oldest first.
    history: Resolved,
    candidates: Resolved,
}

impl Page {
    /// History items older than the model's window are known, too, but not used.
    fn within_window_of(mut self, model: &Model) -> Self {
        let n_too_old = self.history.len().saturating_sub(model.manifest.user_tower.max_history);
        self.history[..n_too_old].fill(Err(RowStatus::NotUsed));
        self
    }
}

/// How an item was found by warm-up, for all models together: the worst counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Warmth {
    Cached,
    Encoded,
    Failed,
}

fn vector_or_status(content: &Content) -> Result<Vector, RowStatus> {
    content.vector().cloned().ok_or(match content {
        Content::NotInTime => RowStatus::NotInTime,
        Content::NoText => RowStatus::UnknownItem,
        _ => RowStatus::Failed,
    })
}

/// The error of a request none of whose rows is ready: overload before lateness, as the caller should back off.
fn nothing_ready(n_shed: usize) -> Error {
    if n_shed > 0 { shed(ShedReason::EncoderQueue) } else { Error::DeadlineExceeded }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pipeline() -> Arc<Pipeline> {
        Arc::new(Pipeline::new(PipelineConfig {
            content_cache_bytes: 1 << 20,
            item_cache_bytes: 1 << 20,
            user_cache_bytes: 1 << 20,
            known_items_bytes: 1 << 20,
            max_text_bytes: 100,
            max_in_flight: 1,
        }))
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
    fn overload_is_told_before_lateness() {
        assert!(matches!(nothing_ready(1), Error::Shed { reason: ShedReason::EncoderQueue, .. }));
        assert!(matches!(nothing_ready(0), Error::DeadlineExceeded));
    }

    #[test]
    fn a_cache_that_is_not_there_cannot_be_flushed() {
        assert_eq!(pipeline().flush(Some("contents")), None);
        assert_eq!(pipeline().flush(None), Some(0));
    }
}
