//! The encoder: its model (template, tokenizer, graph) and the threads that run the model.

use super::{
    Tokenizer, TokenizerError,
    batcher::{BatchLimits, Batcher, Queued, Work},
    flight::Flight,
};
use crate::{
    domain::{
        EncoderDigest, ItemText, Priority, all_finite,
        item_text::{Template, TemplateError},
    },
    inference::{Graph, GraphError, Input, Provider, background::give_way, job::run_guarded},
    telemetry::events::{self, QueueStay},
};
use serde::Deserialize;
use std::{
    io, mem,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Why a text could not be encoded.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The prompt could not be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The prompt could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The graph failed.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Which texts may share a run of the encoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Batching {
    /// Any: a text's vector does not depend on its batch.
    #[default]
    Together,
    /// Each text has a run of its own, because the graph scales its activations over the whole batch.
    Alone,
}

/// Everything that turns text into vectors except the graph, of which each thread has its own.
#[derive(Debug)]
pub struct EncoderModel {
    /// Renders a text as a prompt.
    pub template: Template,
    /// Turns a prompt into token ids.
    pub tokenizer: Tokenizer,
    /// Pads rows to the longest of a batch. The graph ignores padding.
    pub pad_id: i64,
    /// `C`, the width of a content embedding.
    pub dim: usize,
    /// Which texts may share a run.
    pub batching: Batching,
    /// Identifies the encoder in cache keys.
    pub digest: EncoderDigest,
}

impl EncoderModel {
    /// The token ids of `text`.
    pub fn tokenize(&self, text: &ItemText) -> Result<Vec<i64>, EncodeError> {
        Ok(self.tokenizer.encode(&self.template.render(text)?)?)
    }

    /// What the longest text counts against the queue's limits: at most 2^20 tokens, as many as a manifest may allow.
    fn max_cost(&self) -> usize {
        self.tokenizer.max_tokens().clamp(1, 1 << 20)
    }

    /// Runs the graph over one batch of token ids. Returns `[n, C]`, row-major, L2-normalised by the graph.
    pub fn encode(&self, graph: &mut Graph, batch: &[&[i64]]) -> Result<Vec<f32>, GraphError> {
        match self.batching {
            Batching::Together => self.run(graph, batch),
            Batching::Alone => {
                let mut vectors = Vec::with_capacity(batch.len() * self.dim);
                for ids in batch {
                    vectors.extend(self.run(graph, &[ids])?);
                }
                Ok(vectors)
            }
        }
    }

    fn run(&self, graph: &mut Graph, batch: &[&[i64]]) -> Result<Vec<f32>, GraphError> {
        let n_columns = batch.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut ids = vec![self.pad_id; batch.len() * n_columns];
        let mut mask = vec![0_i64; batch.len() * n_columns];
        for (row, tokens) in batch.iter().enumerate() {
            let start = row * n_columns;
            ids[start..start + tokens.len()].copy_from_slice(tokens);
            mask[start..start + tokens.len()].fill(1);
        }
        let shape = [batch.len(), n_columns];
        let inputs = [Input::I64 { shape: &shape, data: &ids }, Input::I64 { shape: &shape, data: &mask }];
        let mut outputs = graph.run(&inputs, &[&[batch.len(), self.dim]])?;
        Ok(mem::take(&mut outputs[0]))
    }
}

/// The job to encode one text.
#[derive(Debug)]
pub(super) struct EncodeJob {
    text: Arc<ItemText>,
    tokens: Vec<i64>,
    flight: Flight,
    stay: Option<QueueStay>,
    _place: Place,
}

/// A place in the encoder's queue. Held until the job is done.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its drop, never read")]
pub(super) struct Place(OwnedSemaphorePermit);

impl EncodeJob {
    pub(super) fn new(text: Arc<ItemText>, flight: Flight, place: Place) -> Self {
        EncodeJob { text, tokens: Vec::new(), flight, stay: None, _place: place }
    }
}

impl Queued for EncodeJob {
    /// A job has the priority of a request as long as a request waits for it, even if warm-up queued it.
    fn priority(&self) -> Priority {
        if self.flight.has_waiting_request() { Priority::Request } else { Priority::WarmUp }
    }

    fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    fn time_left(&self) -> Duration {
        self.flight.time_left()
    }
}

/// Requests may queue this many texts of the maximum length, or several times as many short ones: a page or two of cold items,
/// a minute of work for a few cores. Jobs whose requests have run out of time are done after the others.
const MAX_REQUEST_TEXTS: usize = 2048;
/// The same for warm-up: enough for full batches, few enough to keep little text in memory.
const MAX_WARM_UP_TEXTS: usize = 256;
/// The cost of a text is estimated before it is tokenized, as its bytes divided by `BYTES_PER_TOKEN` plus `TEMPLATE_TOKENS`. The
/// estimate limits the time that it takes to work off a full queue.
const BYTES_PER_TOKEN: usize = 4;
const TEMPLATE_TOKENS: usize = 16;
const QUEUE: &str = "encoder";

fn batch_limits(provider: Provider, batching: Batching) -> BatchLimits {
    match provider {
        _ if batching == Batching::Alone => BatchLimits { max_items: 1, max_tokens: 512 },
        // A few short texts keep one core busy; larger batches do not fit into its cache.
        Provider::Cpu => BatchLimits { max_items: 16, max_tokens: 512 },
        Provider::Cuda => BatchLimits { max_items: 256, max_tokens: 16_384 },
    }
}

/// A running encoder: a queue and the threads that work on it. The threads end when it is dropped and the queue is empty.
#[derive(Debug)]
pub struct Encoder {
    model: Arc<EncoderModel>,
    batcher: Arc<Batcher<EncodeJob>>,
    /// One permit per token that requests may still queue.
    request_room: Arc<Semaphore>,
    /// One permit per token that warm-up may still queue.
    warm_up_room: Arc<Semaphore>,
}

impl Encoder {
    /// Starts one thread per graph.
    pub fn start(model: EncoderModel, graphs: Vec<Graph>, provider: Provider) -> io::Result<Self> {
        let model = Arc::new(model);
        let max_cost = model.max_cost();
        let batcher = Arc::new(Batcher::new(batch_limits(provider, model.batching)));
        let encoder = Encoder {
            model: Arc::clone(&model),
            batcher: Arc::clone(&batcher),
            request_room: Arc::new(Semaphore::new(MAX_REQUEST_TEXTS * max_cost)),
            warm_up_room: Arc::new(Semaphore::new(MAX_WARM_UP_TEXTS * max_cost)),
        };
        for (i, graph) in graphs.into_iter().enumerate() {
            let (model, batcher) = (Arc::clone(&model), Arc::clone(&batcher));
            let run = move || {
                give_way();
                work(&model, graph, &batcher);
            };
            thread::Builder::new().name(format!("{QUEUE}-{i}")).spawn(run)?;
        }
        Ok(encoder)
    }

    /// Identifies the encoder in cache keys.
    pub fn digest(&self) -> EncoderDigest {
        self.model.digest
    }

    /// The encoder's model.
    pub fn model(&self) -> &EncoderModel {
        &self.model
    }

    /// `C`, the width of its vectors.
    pub fn dim(&self) -> usize {
        self.model.dim
    }

    /// Reserves a place for `text` in the queue, if there is room. Requests and warm-up have separate room.
    pub(super) fn try_reserve(&self, text: &ItemText, priority: Priority) -> Option<Place> {
        let room = match priority {
            Priority::Request => &self.request_room,
            Priority::WarmUp => &self.warm_up_room,
        };
        Arc::clone(room).try_acquire_many_owned(self.cost(text)).ok().map(Place)
    }

    /// Waits until there is room for a warm-up `text`, then reserves its place. Cancel-safe.
    pub(super) async fn reserve_warm_up(&self, text: &ItemText) -> Place {
        loop {
            // The semaphore is never closed, so the first attempt succeeds.
            if let Ok(permit) = Arc::clone(&self.warm_up_room).acquire_many_owned(self.cost(text)).await {
                return Place(permit);
            }
        }
    }

    /// An estimate of the number of tokens of `text`, capped at `max_cost` so that it always fits into an empty queue.
    fn cost(&self, text: &ItemText) -> u32 {
        (TEMPLATE_TOKENS + text.n_bytes() / BYTES_PER_TOKEN).min(self.model.max_cost()) as u32
    }

    pub(super) fn submit(&self, mut jobs: Vec<EncodeJob>) {
        if !jobs.is_empty() {
            for job in &mut jobs {
                job.stay = Some(QueueStay::begin(QUEUE));
            }
            self.batcher.push(jobs);
        }
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        self.batcher.close();
    }
}

fn work(model: &EncoderModel, mut graph: Graph, batcher: &Batcher<EncodeJob>) {
    while let Some(work) = batcher.next() {
        // A panic drops the jobs and with them their flights, so everyone who waits learns of the failure.
        let _ = run_guarded(QUEUE, || match work {
            Work::Tokenize(jobs) => batcher.push_tokenized(tokenize(model, jobs)),
            Work::Encode(jobs) => encode(model, &mut graph, jobs, batcher),
        });
    }
}

/// Tokenizes jobs. A job whose text cannot be tokenized is dropped, which fails it.
fn tokenize(model: &EncoderModel, jobs: Vec<EncodeJob>) -> Vec<EncodeJob> {
    let start = Instant::now();
    let mut tokenized = Vec::with_capacity(jobs.len());
    for mut job in jobs {
        match model.tokenize(&job.text) {
            Ok(tokens) => {
                job.tokens = tokens;
                tokenized.push(job);
            }
            Err(error) => events::encode_failed(1, &error),
        }
    }
    events::stage_finished("tokenize", start);
    tokenized
}

/// Encodes one batch and tells `batcher` how long it took.
fn encode(model: &EncoderModel, graph: &mut Graph, mut jobs: Vec<EncodeJob>, batcher: &Batcher<EncodeJob>) {
    let start = Instant::now();
    for job in &mut jobs {
        job.stay = None;
    }
    let batch: Vec<&[i64]> = jobs.iter().map(|job| job.tokens.as_slice()).collect();
    let n_columns = batch.iter().map(|ids| ids.len()).max().unwrap_or(0);
    let n_tokens = batch.len() * n_columns;
    events::encoder_batch_ran(batch.len(), n_tokens);
    match model.encode(graph, &batch) {
        Ok(vectors) => {
            batcher.record(n_tokens, start.elapsed());
            for (job, vector) in jobs.into_iter().zip(vectors.chunks_exact(model.dim)) {
                land(job, vector);
            }
        }
        Err(error) if jobs.len() == 1 => events::encode_failed(1, &error),
        // A single text may be the cause, and the others should not fail with it.
        Err(_) => {
            for job in jobs {
                encode_alone(model, graph, job);
            }
        }
    }
    events::stage_finished("encode", start);
}

fn encode_alone(model: &EncoderModel, graph: &mut Graph, job: EncodeJob) {
    events::encoder_batch_ran(1, job.tokens.len());
    match model.encode(graph, &[&job.tokens]) {
        Ok(vector) => land(job, &vector),
        Err(error) => events::encode_failed(1, &error),
    }
}

fn land(job: EncodeJob, vector: &[f32]) {
    if all_finite(vector) {
        job.flight.land(vector.into());
    } else {
        events::vector_not_finite("encode");
    }
}
