//! `MidEmbService`: decodes requests, runs the pipeline, encodes answers.

use super::{
    answer,
    body::HeldRoom,
    budget::Held,
    decode::{self, Decoded},
    drain_began, encode,
    layer::CallContext,
    proto,
    raw::RawMessage,
    receive::{Budgets, shed},
    status::to_status,
};
use crate::{
    bundle::{Model, ServedModel, Shadow},
    config::settings::Limits,
    domain::WarmSummary,
    domain::error::{Error, ShedReason},
    inference::background::{self, Urgency},
    pipeline::Pipeline,
    telemetry::events,
};
use prost::Message;
use proto::mid_emb_service_server::MidEmbService;
use std::sync::Arc;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tonic::{Request, Response, Status, Streaming};

/// Messages of one warm-up stream that are processed at once, so that the encoder never waits for the next message.
const CHUNKS_AT_ONCE: usize = 8;

/// The most warm-up streams that may be open. A few keep the encoder busy.
const MAX_WARM_UP_STREAMS: usize = 64;
/// A message of more bytes is not decoded on an I/O thread. Below, even the most expensive one takes a few milliseconds.
const MAX_INLINE_BYTES: usize = 1 << 20;

/// The handlers of `MidEmbService`.
#[derive(Debug, Clone)]
pub struct MidEmb {
    pipeline: Arc<Pipeline>,
    limits: Limits,
    draining: watch::Receiver<bool>,
    budgets: Budgets,
    /// The permit to decode a large message.
    large_decodes: Arc<Semaphore>,
    /// One permit per warm-up stream that may be open.
    warm_up_streams: Arc<Semaphore>,
}

impl MidEmb {
    /// Creates the handlers. Streams end when `draining` becomes true.
    pub fn new(pipeline: Arc<Pipeline>, limits: Limits, budgets: Budgets, draining: watch::Receiver<bool>) -> Self {
        let (large_decodes, warm_up_streams) = (Semaphore::new(1), Semaphore::new(MAX_WARM_UP_STREAMS));
        MidEmb {
            pipeline,
            limits,
            draining,
            budgets,
            large_decodes: Arc::new(large_decodes),
            warm_up_streams: Arc::new(warm_up_streams),
        }
    }

    /// The turn to decode `message`, if it needs one: a large one is decoded on a thread that gives way, and only one at a time.
    /// I/O threads answer everybody else meanwhile.
    async fn turn(&self, message: &RawMessage) -> Option<OwnedSemaphorePermit> {
        if message.0.len() <= MAX_INLINE_BYTES {
            return None;
        }
        Arc::clone(&self.large_decodes).acquire_owned().await.ok()
    }

    /// Decodes `message` in its `turn`, and then drops `held`. A thread ends what it has begun, also for a caller that has left.
    async fn decode<T: Send + 'static, H: Send + 'static>(
        &self,
        message: RawMessage,
        turn: Option<OwnedSemaphorePermit>,
        held: H,
        decode: impl FnOnce(&RawMessage, &Limits) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let Some(turn) = turn else { return decode(&message, &self.limits) };
        let limits = self.limits;
        let work = move || {
            let decoded = decode(&message, &limits);
            drop((message, held, turn));
            decoded
        };
        let decoded = background::run(Urgency::GivesWay, work).await;
        decoded.unwrap_or_else(|error| Err(Error::internal("decoding", error)))
    }
}

/// What a decoded item takes in memory besides its bytes of the message.
const ITEM_BYTES: u64 = 200;

#[tonic::async_trait]
impl MidEmbService for MidEmb {
    async fn get_mid_emb(&self, request: Request<RawMessage>) -> Result<Response<proto::GetMidEmbResponse>, Status> {
        let to_status = to_status("GetMidEmb");
        let context = request.extensions().get::<CallContext>().cloned().unwrap_or_default();
        let deadline = context.deadline_or(self.limits.default_deadline);
        // The message counts against `limits.max_receiving_mb` until it is decoded.
        let held = request.extensions().get::<Arc<Held>>().cloned();
        let (metadata, _extensions, message) = request.into_parts();
        let n_message_bytes = message.0.len() as u64;
        // Whoever waits for a turn is not in flight yet.
        let turn = self.turn(&message).await;
        let permit = self.pipeline.admit().map_err(&to_status)?;
        let (pipeline, budget, share) =
            (Arc::clone(&self.pipeline), self.budgets.decoded.clone(), context.peer.shares.decoded.clone());
        let decode = move |message: &RawMessage, limits: &Limits| {
            let Decoded { request, dtype } = decode::request(message, deadline, limits)?;
            let n_items = request.history.len() + request.candidates.len();
            let n_decoded_bytes = n_message_bytes + ITEM_BYTES * n_items as u64;
            let decoded_bytes = budget.take(&share, n_decoded_bytes).ok_or_else(|| shed(ShedReason::Decoded))?;
            let features = pipeline.served_features.as_ref();
            let sampled =
                features.and_then(|features| features.sample(&request, decode::request_id(metadata.as_ref())));
            Ok((pipeline.prepare(request), sampled, dtype, decoded_bytes))
        };
        let (request, sampled, dtype, _decoded_bytes) =
            self.decode(message, turn, held, decode).await.map_err(&to_status)?;
        let on_routed = |model: &Model| context.set_model(&model.reference);
        let answer = self.pipeline.get_mid_emb(permit, request, on_routed).await.map_err(&to_status)?;
        let statuses = answer.statuses.clone();
        let (answer, sample) = match sampled {
            None => (encode::response(answer, dtype), None),
            Some(request) => {
                let (answer, sampled) = encode::sampled_response(answer, dtype);
                (answer, Some((request, sampled)))
            }
        };
        let mut response = Response::new(answer);
        let n_bytes = response.get_ref().encoded_len() as u64;
        let held = self.budgets.unsent.take(&context.peer.shares.unsent, n_bytes);
        answer::hold(&mut response, held.ok_or_else(|| to_status(shed(ShedReason::UnsentAnswers)))?);
        events::rows_answered(&statuses);
        if let Some((request, answer)) = sample {
            tell_request_id(&mut response, &request.request_id);
            if let Some(features) = &self.pipeline.served_features {
                features.offer(*request, answer);
            }
        }
        Ok(response)
    }

    async fn warm_items(
        &self,
        request: Request<Streaming<RawMessage>>,
    ) -> Result<Response<proto::WarmItemsResponse>, Status> {
        let to_status = to_status("WarmItems");
        let one_stream = self.warm_up_streams.try_acquire();
        let _stream = one_stream.map_err(|_none_left| to_status(shed(ShedReason::Streams)))?;
        let room = request.extensions().get::<HeldRoom>().cloned().unwrap_or_default();
        let mut chunks = request.into_inner();
        let mut draining = self.draining.clone();
        // Until a model serves, the caches may still be restored from a snapshot, and warm-up must not fill them first.
        self.pipeline.registry.current().map_err(&to_status)?;
        let mut summary = WarmSummary::default();
        // Its tasks end with this call; items that are already queued are still encoded and cached.
        let mut warming = JoinSet::new();
        let mut is_open = true;
        while is_open || !warming.is_empty() {
            tokio::select! {
                // Cancel-safe, as is `join_next`: a branch that another one interrupts continues in the next iteration.
                chunk = chunks.message(), if is_open && warming.len() < CHUNKS_AT_ONCE => match chunk? {
                    Some(chunk) => {
                        // Here rather than in the task, to keep the stream's order: the newest text of an id wins.
                        let room = room.take();
                        let turn = self.turn(&chunk).await;
                        let pipeline = Arc::clone(&self.pipeline);
                        let prepare = move |chunk: &RawMessage, limits: &Limits| {
                            decode::warm_items(chunk, limits).map(|items| pipeline.prepare_items(items))
                        };
                        let items = self.decode(chunk, turn, (), prepare).await.map_err(&to_status)?;
                        let warm_up = self.pipeline.remember(items);
                        let pipeline = Arc::clone(&self.pipeline);
                        warming.spawn(async move {
                            let warmed = pipeline.warm(warm_up).await;
                            drop(room);
                            warmed
                        });
                    }
                    None => is_open = false,
                },
                Some(warmed) = warming.join_next() => {
                    let warmed = warmed.unwrap_or_else(|panicked| Err(Error::internal("warming", panicked)));
                    summary += warmed.map_err(&to_status)?;
                }
                // A stream may be endless, so a drain ends it. Items that are already queued are still encoded and cached.
                () = drain_began(&mut draining) => return Err(to_status(Error::Unavailable("draining"))),
            }
        }
        Ok(Response::new(encode::warm_summary(summary)))
    }

    async fn get_model_info(
        &self,
        _request: Request<proto::GetModelInfoRequest>,
    ) -> Result<Response<proto::GetModelInfoResponse>, Status> {
        let models = self.pipeline.registry.current().map_err(to_status("GetModelInfo"))?;
        Ok(Response::new(proto::GetModelInfoResponse {
            models: models.live.iter().map(model_info).collect(),
            limits: Some(limits(&self.limits)),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }
}

/// Tells the caller under which id its answer is kept. It may not know it even if one was sent: proxies make some, too.
fn tell_request_id<T>(response: &mut Response<T>, id: &str) {
    if let Ok(value) = id.parse() {
        response.metadata_mut().insert(decode::REQUEST_ID, value);
    }
}

/// The public description of a live model.
pub(super) fn model_info(served: &ServedModel) -> proto::ModelInfo {
    proto::ModelInfo { share: u32::from(served.share), ..info(&served.model) }
}

/// The public description of a shadow.
pub(super) fn shadow_info(shadow: &Shadow) -> proto::ModelInfo {
    let shadow_percent = u32::from(shadow.percent);
    proto::ModelInfo { shadow_of: shadow.shadow_of.clone(), shadow_percent, ..info(&shadow.model) }
}

fn info(model: &Model) -> proto::ModelInfo {
    let manifest = &model.manifest;
    proto::ModelInfo {
        model: Some(encode::model(&model.reference)),
        encoder_digest: model.encoder.digest().to_string(),
        tower_digest: model.tower_digest.to_string(),
        content_dim: manifest.encoder.dim as u32,
        user_dim: manifest.user_tower.dim as u32,
        item_dim: manifest.item_tower.dim as u32,
        mid_dim: manifest.cvr.dim as u32,
        max_history: manifest.user_tower.max_history as u32,
        max_tokens: manifest.item_text.max_tokens as u32,
        provider: model.provider.as_str().to_owned(),
        adapted_dim: manifest.item_tower.adapted_dim as u32,
        history_actions: manifest.history.actions.iter().map(|action| encode::action(*action).into()).collect(),
        history_keeps: manifest.history.keeps.as_str().to_owned(),
        history_liked_from: manifest.history.liked_from,
        history_disliked_to: manifest.history.disliked_to,
        ..proto::ModelInfo::default()
    }
}

fn limits(limits: &Limits) -> proto::Limits {
    proto::Limits {
        max_candidates: limits.max_candidates as u32,
        max_history: limits.max_history as u32,
        max_text_bytes: limits.max_text_bytes as u64,
        max_in_flight: limits.max_in_flight as u32,
        default_deadline_ms: limits.default_deadline.as_millis() as u64,
        max_message_bytes: limits.max_message_bytes as u64,
    }
}
