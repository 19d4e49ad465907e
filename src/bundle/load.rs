//! From a folder to a model that serves: digests, graphs, golden check, a run at real sizes, then threads. A bundle that fails
//! does not serve.
//!
//! [`load`] only computes and may be called from a thread of low priority; [`Loaded::start`] starts the threads, which take
//! the priority of whoever calls it.

use super::{
    digest,
    golden::{self, Mismatch, StageReport},
    manifest::{self, Manifest},
    warm,
};
use crate::{
    content::{EncodeError, Encoder, EncoderModel, Tokenizer, TokenizerError},
    domain::{
        ModelRef, TextDigest, TowerDigest, Vector,
        digest::sha256_hex,
        item_text::{Template, TemplateError},
    },
    inference::{Batches, Graph, GraphError, Pool, Provider, Runtime, SharedWeights, batches},
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

/// Why a bundle does not serve.
#[derive(Debug, Error)]
pub enum BundleError {
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest is not what this server reads.
    #[error("{}: {reason}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that the manifest lists is not there.
    #[error("{} is missing{}", path.display(), fetch_hint(fetched))]
    FileMissing {
        /// The file.
        path: PathBuf,
        /// The package that set-up fetches it from.
        fetched: Option<String>,
    },
    /// A file is not the one that the manifest lists.
    #[error("{} has a wrong digest: it has {found}, the manifest says {expected}", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// Its size and digest.
        found: String,
        /// As the manifest has them.
        expected: String,
    },
    /// The golden file is not what this server reads.
    #[error("{}: {reason}", path.display())]
    GoldenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The template does not compile.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer does not load.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A graph does not load or does not run.
    #[error(transparent)]
    Graph(GraphError),
    /// A golden text cannot be encoded.
    #[error("golden check: {0}")]
    Encode(#[from] EncodeError),
    /// The graphs give something else than PyTorch gave.
    #[error("golden check failed: {0}")]
    Golden(Mismatch),
    /// A graph gives values that are not finite at a size of real traffic.
    #[error("{stage} gives values that are not finite")]
    NotFinite {
        /// Which graph.
        stage: &'static str,
    },
    /// The bundle is another one than the config asks for.
    #[error("{} has the digest {found}, the config asks for {expected}", folder.display())]
    Pinned {
        /// The bundle's folder.
        folder: PathBuf,
        /// Its digest.
        found: String,
        /// As configured.
        expected: String,
    },
    /// The golden texts were not encoded.
    #[error("golden check: the encoder that serves had no time for the golden texts, or failed on them: try again")]
    EncoderBusy,
    /// A file changed while it was loaded.
    #[error("{} changed while it was loaded", folder.display())]
    Changed {
        /// The bundle's folder.
        folder: PathBuf,
    },
    /// Threads cannot be started.
    #[error("inference threads: {0}")]
    Threads(io::Error),
}

fn fetch_hint(package: &Option<String>) -> String {
    package.as_ref().map_or_else(String::new, |p| format!(": it is fetched from {p}, run `make setup`"))
}

/// How a bundle is made to serve.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The name it is served under.
    pub served_name: String,
    /// Threads for the encoder, and as many for the towers.
    pub n_threads: usize,
    /// Requests that one run of the towers scores together at most; 0 leaves it to the provider.
    pub batch_requests: usize,
}

/// Requests that may be scored together.
pub type Scoring = Batches<TowerGraphs, ScoreInput, Result<Score, GraphError>>;

/// Candidates of one run of the CVR graph, over all its requests: some megabytes of activations.
const MAX_CANDIDATES_TOGETHER: usize = 1 << 15;

/// On a CPU a run over several requests costs as much as one over each (2 % less, measured), and the first waits for the
/// last. A GPU does them in the time of one.
fn scoring(manifest: &Manifest, provider: Provider, batch_requests: usize) -> Scoring {
    let max_jobs = match (batch_requests, provider) {
        (0, Provider::Cpu) => 1,
        (0, Provider::Cuda) => 32,
        (n, _) => n,
    };
    let dims = ScoreDims { content: manifest.encoder.dim, user: manifest.user_tower.dim, mid: manifest.cvr.dim };
    let run = Box::new(move |graphs: &mut TowerGraphs, inputs| score_all(graphs, inputs, dims));
    let limits = batches::Limits { max_jobs, max_size: MAX_CANDIDATES_TOGETHER * dims.user };
    Batches::new(limits, |input| input.items.len(), run)
}

/// A model that serves: its graphs and the threads that run them.
#[derive(Debug)]
pub struct Model {
    /// Who answers.
    pub reference: Arc<ModelRef>,
    /// What it promises.
    pub manifest: Manifest,
    /// CEG. Models of one encoder digest share it.
    pub encoder: Arc<Encoder>,
    /// What its item embeddings are cached under.
    pub tower_digest: TowerDigest,
    /// What its user embeddings are cached under.
    pub user_tower_digest: TowerDigest,
    /// PCH and the CVR MLP.
    pub towers: TowerPool,
    /// Requests that wait to be scored on `towers`.
    pub scoring: Arc<Scoring>,
    /// What runs the graphs.
    pub provider: Provider,
}

/// A manifest whose files were held to their digests.
#[derive(Debug)]
pub struct CheckedFiles {
    /// The bundle's folder.
    pub folder: PathBuf,
    /// What it consists of.
    pub manifest: Manifest,
    /// The SHA-256 of the manifest.
    pub digest: String,
}

/// What a load is at, for those who wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStep {
    /// ONNX Runtime reads the graphs.
    Graphs,
    /// The golden vectors are computed again.
    Golden,
    /// Every thread's graphs run at the sizes of real traffic.
    Warm,
}

/// Reads the manifest of the bundle in `folder`.
pub fn read_manifest(folder: &Path) -> Result<CheckedFiles, BundleError> {
    let path = folder.join(manifest::FILE);
    let text = fs::read_to_string(&path).map_err(|source| BundleError::Read { path: path.clone(), source })?;
    let manifest = Manifest::parse(&text).map_err(|reason| BundleError::Manifest { path, reason })?;
    Ok(CheckedFiles { folder: folder.to_path_buf(), manifest, digest: sha256_hex(text.as_bytes()) })
}

/// Reads the manifest of the bundle in `folder` and holds every file to it, and it to the digest that is `pinned`.
pub fn check_files(folder: &Path, pinned: Option<&str>) -> Result<CheckedFiles, BundleError> {
    let files = read_manifest(folder)?;
    if let Some(expected) = pinned.filter(|pinned| *pinned != files.digest) {
        let (folder, found) = (folder.to_path_buf(), files.digest);
        return Err(BundleError::Pinned { folder, found, expected: expected.to_owned() });
    }
    files.manifest.files.iter().try_for_each(|file| digest::check(folder, file))?;
    Ok(files)
}

/// Checks a bundle's files and graphs against its digests and golden vectors, without serving it.
pub fn verify(folder: &Path, runtime: &Runtime) -> Result<(CheckedFiles, Vec<StageReport>), BundleError> {
    let files = check_files(folder, None)?;
    let options = LoadOptions { served_name: String::new(), n_threads: 1, batch_requests: 1 };
    let loaded = load(files, &options, runtime, &[], &|_step| ())?;
    Ok((loaded.files, loaded.reports))
}

/// A bundle that passed its checks. Its threads are not started yet.
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
    /// With what it gave for the golden texts.
    New { model: Box<EncoderModel>, graphs: Vec<Graph>, contents: Vec<(TextDigest, Vector)> },
    /// Another model runs it already.
    Running(Arc<Encoder>),
}

/// Loads a bundle and checks it. An encoder that is among those `running` is neither loaded nor checked again: who runs it holds
/// it to the bundle's golden texts. `begins` is told of each step.
///
/// Takes as long as its checks take: call it where blocking is fine.
pub fn load(
    files: CheckedFiles,
    options: &LoadOptions,
    runtime: &Runtime,
    running: &[Arc<Encoder>],
    begins: &dyn Fn(LoadStep),
) -> Result<Loaded, BundleError> {
    let start = Instant::now();
    let CheckedFiles { folder, manifest, .. } = &files;
    begins(LoadStep::Graphs);
    let golden = golden::read(folder, manifest)?;
    let digest = digest::encoder_digest(manifest);
    let running = running.iter().find(|encoder| encoder.digest() == digest);
    let mut parts = read_graphs(&files, options.n_threads, runtime, running)?;
    begins(LoadStep::Golden);
    // Every thread has its own sessions of the same files: checking one set of them checks the bundle.
    let mut reports = match &mut parts.encoder {
        EncoderPart::New { model, graphs, contents } => {
            let (reports, computed) = golden::check_encoder(&golden, model, &mut graphs[0])?;
            *contents = golden.texts().map(TextDigest::of).zip(computed).collect();
            reports
        }
        EncoderPart::Running(_) => Vec::new(),
    };
    reports.extend(golden::check_towers(&golden, manifest, &mut parts.towers[0])?);
    begins(LoadStep::Warm);
    let encoders = match &mut parts.encoder {
        EncoderPart::New { model, graphs, .. } => Some((&**model, graphs.as_mut_slice())),
        EncoderPart::Running(_) => None,
    };
    warm::run(&golden, manifest, encoders, &mut parts.towers)?;
    // What was read has to be what was held to its digests before: somebody may have copied another bundle over this one.
    if check_files(folder, Some(&files.digest)).is_err() {
        return Err(BundleError::Changed { folder: folder.clone() });
    }
    let (options, provider) = (options.clone(), runtime.provider());
    Ok(Loaded { files, options, provider, parts, reports, took: start.elapsed() })
}

fn read_graphs(
    files: &CheckedFiles,
    n_threads: usize,
    runtime: &Runtime,
    running: Option<&Arc<Encoder>>,
) -> Result<Parts, BundleError> {
    let CheckedFiles { folder, manifest, .. } = files;
    let mut weights = SharedWeights::new(runtime, n_threads);
    let mut read = |file: &str, inputs: &[String], outputs: &[String]| {
        Graph::load(runtime, &mut weights, &folder.join(file), inputs, outputs)
    };
    let (e, u, i, c) = (&manifest.encoder, &manifest.user_tower, &manifest.item_tower, &manifest.cvr);
    let encoder = match running {
        Some(encoder) => EncoderPart::Running(Arc::clone(encoder)),
        None => EncoderPart::New {
            model: Box::new(encoder_model(folder, manifest)?),
            graphs: (0..n_threads).map(|_| read(&e.file, &e.inputs, &e.outputs)).collect::<Result<_, _>>()?,
            contents: Vec::new(),
        },
    };
    let mut towers = Vec::with_capacity(n_threads);
    for _ in 0..n_threads {
        towers.push(TowerGraphs {
            user: read(&u.file, &u.inputs, &u.outputs)?,
            item: read(&i.file, &i.inputs, &i.outputs)?,
            cvr: read(&c.file, &c.inputs, &c.outputs)?,
        });
    }
    Ok(Parts { encoder, towers })
}

fn encoder_model(folder: &Path, manifest: &Manifest) -> Result<EncoderModel, BundleError> {
    Ok(EncoderModel {
        template: Template::new(&manifest.item_text.template)?,
        tokenizer: Tokenizer::load(&folder.join(&manifest.encoder.tokenizer), manifest.item_text.max_tokens)?,
        pad_id: manifest.encoder.pad_id,
        dim: manifest.encoder.dim,
        digest: digest::encoder_digest(manifest),
    })
}

/// A model whose threads run, and what its encoder gave for the golden texts, where it is new.
#[derive(Debug)]
pub struct Started {
    /// The model.
    pub model: Model,
    /// Content embeddings, as the encoder would compute them again.
    pub contents: Vec<(TextDigest, Vector)>,
}

impl Loaded {
    /// Starts the threads, with the priority of the thread that calls.
    pub fn start(self) -> Result<Started, BundleError> {
        let Loaded { files: CheckedFiles { manifest, digest, .. }, options, provider, parts, took, .. } = self;
        let (encoder, contents) = match parts.encoder {
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
        let model = Model { reference, manifest, encoder, tower_digest, user_tower_digest, towers, scoring, provider };
        Ok(Started { model, contents })
    }
}
