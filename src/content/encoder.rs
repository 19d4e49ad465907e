//! The encoder: its model (template, tokenizer, graph) and the threads that run it.

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
use std::{
    io, mem,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A text could not be turned into a vector.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// Text to prompt.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Prompt to ids.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Ids to vector.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// What turns text into vectors; the graph itself is each thread's own.
#[derive(Debug)]
pub struct EncoderModel {
    /// Text to prompt.
    pub template: Template,
    /// Prompt to ids.
    pub tokenizer: Tokenizer,
    /// Fills rows up to the longest of a batch; masked out in the graph.
    pub pad_id: i64,
    /// `C`, the width of a content embedding.
    pub dim: usize,
    /// What its vectors are cached under.
    pub digest: EncoderDigest,
}

impl EncoderModel {
    /// The token ids of `text`.
    pub fn tokenize(&self, text: &ItemText) -> Result<Vec<i64>, EncodeError> {
        Ok(self.tokenizer.encode(&self.template.render(text)?)?)
    }

    /// What the longest text counts in the queue. A bundle may cut at whatever it likes; nothing is ever counted as more than
    /// a million tokens.
    fn longest(&self) -> usize {
        self.tokenizer.max_tokens().clamp(1, 1 << 20)
    }

    /// Runs the graph over one batch: `[n, C]`, row-major, L2-normalised by the graph.
    pub fn encode(&self, graph: &mut Graph, batch: &[&[i64]]) -> Result<Vec<f32>, GraphError> {
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

/// One text on its way through the queue.
#[derive(Debug)]
pub(super) struct EncodeJob {
    text: Arc<ItemText>,
    tokens: Vec<i64>,
    flight: Flight,
    stay: Option<QueueStay>,
    _place: Place,
}

/// A place in the encoder's queue, held until the job is done.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its drop, never read")]
pub(super) struct Place(OwnedSemaphorePermit);

impl EncodeJob {
    pub(super) fn new(text: Arc<ItemText>, flight: Flight, place: Place) -> Self {
        EncodeJob { text, tokens: Vec::new(), flight, stay: None, _place: place }
    }
}

impl Queued for EncodeJob {
    /// A job is a request's for as long as a request waits for it, whoever queued it.
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

/// Texts of the longest kind that requests may have in the queue, or several times as many short ones: a page or two of nothing
/// but cold items, a minute of work for a few cores. What no request has time for any more is done after what one has.
const MAX_REQUEST_TEXTS: usize = 2048;
/// The same for warm-up: enough for full batches, and no more than that of its text in memory.
const MAX_WARM_UP_TEXTS: usize = 256;
/// A text is counted before it is tokenized: so many bytes of it as one token, and as many for the template's own words. That is
/// an estimate, to bound the time that a full queue stands for.
const BYTES_PER_TOKEN: usize = 4;
const TEMPLATE_TOKENS: usize = 16;
const QUEUE: &str = "encoder";

fn batch_limits(provider: Provider) -> BatchLimits {
    match provider {
        // One core is busy with a few short texts already; longer batches fall out of its cache.
        Provider::Cpu => BatchLimits { max_items: 16, max_tokens: 512 },
        Provider::Cuda => BatchLimits { max_items: 256, max_tokens: 16_384 },
    }
}

/// A running encoder: a queue and the threads behind it, which end with it.
#[derive(Debug)]
pub struct Encoder {
    model: Arc<EncoderModel>,
    batcher: Arc<Batcher<EncodeJob>>,
    /// Tokens that there is still room for.
    request_room: Arc<Semaphore>,
    warm_up_room: Arc<Semaphore>,
}

impl Encoder {
    /// Starts one thread for each graph.
    pub fn start(model: EncoderModel, graphs: Vec<Graph>, provider: Provider) -> io::Result<Self> {
        let model = Arc::new(model);
        let longest = model.longest();
        let batcher = Arc::new(Batcher::new(batch_limits(provider)));
        let encoder = Encoder {
            model: Arc::clone(&model),
            batcher: Arc::clone(&batcher),
            request_room: Arc::new(Semaphore::new(MAX_REQUEST_TEXTS * longest)),
            warm_up_room: Arc::new(Semaphore::new(MAX_WARM_UP_TEXTS * longest)),
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

    /// What its vectors are cached under.
    pub fn digest(&self) -> EncoderDigest {
        self.model.digest
    }

    /// What turns text into its vectors, graph aside.
    pub fn model(&self) -> &EncoderModel {
        &self.model
    }

    /// The width of its vectors.
    pub fn dim(&self) -> usize {
        self.model.dim
    }

    /// A place for `text` in the queue, if there is room. Requests and warm-up have room of their own.
    pub(super) fn try_reserve(&self, text: &ItemText, priority: Priority) -> Option<Place> {
        let room = match priority {
            Priority::Request => &self.request_room,
            Priority::WarmUp => &self.warm_up_room,
        };
        Arc::clone(room).try_acquire_many_owned(self.cost(text)).ok().map(Place)
    }

    /// A place for `text` as warm-up, as soon as there is room. Cancel-safe.
    pub(super) async fn reserve_warm_up(&self, text: &ItemText) -> Place {
        loop {
            // The semaphore is never closed, so this succeeds on its first turn.
            if let Ok(permit) = Arc::clone(&self.warm_up_room).acquire_many_owned(self.cost(text)).await {
                return Place(permit);
            }
        }
    }

    /// About how many tokens `text` is. Never more than there is room for when nothing is queued.
    fn cost(&self, text: &ItemText) -> u32 {
        (TEMPLATE_TOKENS + text.n_bytes() / BYTES_PER_TOKEN).min(self.model.longest()) as u32
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
        // A panic drops the jobs it had, and with them their flights: whoever waits is told.
        let _ = run_guarded(QUEUE, || match work {
            Work::Tokenize(jobs) => batcher.push_tokenized(tokenize(model, jobs)),
            Work::Encode(jobs) => {
                if let Some((n_tokens, took)) = encode(model, &mut graph, jobs) {
                    batcher.record(n_tokens, took);
                }
            }
        });
    }
}

/// Jobs that cannot be tokenized are dropped here, and fail.
fn tokenize(model: &EncoderModel, jobs: Vec<EncodeJob>) -> Vec<EncodeJob> {
    let start = Instant::now();
    let mut tokenized = Vec::with_capacity(jobs.len());
    for mut job in jobs {
        match model.tokenize(&job.text) {
            Ok(tokens) => {
                job.tokens = tokens;
                tokenized.push(job);
            }
            Err(error) => {
                events::encode_failed(1, &error);
            }
        }
    }
    events::stage_finished("tokenize", start);
    tokenized
}

/// Returns how many tokens were run, padding included, and how long that took; nothing where the graph failed.
fn encode(model: &EncoderModel, graph: &mut Graph, mut jobs: Vec<EncodeJob>) -> Option<(usize, Duration)> {
    let start = Instant::now();
    jobs.iter_mut().for_each(|job| drop(job.stay.take()));
    let batch: Vec<&[i64]> = jobs.iter().map(|job| job.tokens.as_slice()).collect();
    let n_columns = batch.iter().map(|ids| ids.len()).max().unwrap_or(0);
    let n_tokens = batch.len() * n_columns;
    events::encoder_batch_ran(batch.len(), n_tokens);
    let encoded = model.encode(graph, &batch);
    let took = encoded.is_ok().then(|| start.elapsed());
    match encoded {
        Ok(vectors) => {
            for (job, vector) in jobs.into_iter().zip(vectors.chunks_exact(model.dim)) {
                land(job, vector);
            }
        }
        Err(error) if jobs.len() == 1 => events::encode_failed(1, &error),
        // One text may be to blame. The others are not to fail with it.
        Err(_) => jobs.into_iter().for_each(|job| encode_alone(model, graph, job)),
    }
    events::stage_finished("encode", start);
    took.map(|took| (n_tokens, took))
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
