//! From a folder to a model that serves: digests, graphs, golden check, then threads. A bundle that fails does not serve.

use super::{
    digest,
    golden::{self, Graphs, Mismatch, StageReport},
    manifest::{self, Manifest},
};
use crate::{
    content::{EncodeError, Encoder, EncoderModel, Tokenizer, TokenizerError},
    domain::ModelRef,
    fusion::{Score, ScoreDims, ScoreInput, scoring::score_all},
    inference::{Batches, Graph, GraphError, Pool, Provider, Runtime, SharedWeights, batches},
    item_text::{Template, TemplateError},
    telemetry::events,
    towers::{self, TowerDigest, TowerGraphs, TowerPool},
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
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
    /// CEG.
    pub encoder: Encoder,
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

/// Reads the manifest of the bundle in `folder`.
pub fn read_manifest(folder: &Path) -> Result<CheckedFiles, BundleError> {
    let path = folder.join(manifest::FILE);
    let text = fs::read_to_string(&path).map_err(|source| BundleError::Read { path: path.clone(), source })?;
    let manifest = Manifest::parse(&text).map_err(|reason| BundleError::Manifest { path, reason })?;
    Ok(CheckedFiles { folder: folder.to_path_buf(), manifest, digest: digest::sha256(text.as_bytes()) })
}

fn check_files(folder: &Path) -> Result<CheckedFiles, BundleError> {
    let files = read_manifest(folder)?;
    files.manifest.files.iter().try_for_each(|file| digest::check(folder, file))?;
    Ok(files)
}

/// Checks a bundle's files and graphs against its digests and golden vectors, without serving it.
pub fn verify(folder: &Path, runtime: &Runtime) -> Result<(CheckedFiles, Vec<StageReport>), BundleError> {
    let files = check_files(folder)?;
    let (parts, reports) = load_checked(&files, runtime, 1)?;
    drop(parts);
    Ok((files, reports))
}

/// Loads the bundle in `folder`, checks it and starts its threads. Takes as long as its checks take: call it where
/// blocking is fine.
pub fn load(folder: &Path, options: &LoadOptions, runtime: &Runtime) -> Result<Model, BundleError> {
    let start = Instant::now();
    let files = check_files(folder)?;
    let (parts, _reports) = load_checked(&files, runtime, options.n_threads)?;
    let provider = runtime.provider();
    let encoder = Encoder::start(parts.model, parts.encoders, provider).map_err(BundleError::Threads)?;
    let towers = Pool::start(towers::QUEUE, parts.towers, towers::MAX_QUEUED).map_err(BundleError::Threads)?;
    let CheckedFiles { manifest, digest, .. } = files;
    let reference = ModelRef { name: options.served_name.clone(), version: manifest.version.clone(), digest };
    events::model_served(&reference, provider.as_str(), start.elapsed());
    let (tower_digest, user_tower_digest) = (digest::tower_digest(&manifest), digest::user_tower_digest(&manifest));
    let scoring = Arc::new(scoring(&manifest, provider, options.batch_requests));
    let reference = Arc::new(reference);
    Ok(Model { reference, manifest, encoder, tower_digest, user_tower_digest, towers, scoring, provider })
}

struct Parts {
    model: EncoderModel,
    encoders: Vec<Graph>,
    towers: Vec<TowerGraphs>,
}

fn load_checked(
    files: &CheckedFiles,
    runtime: &Runtime,
    n_threads: usize,
) -> Result<(Parts, Vec<StageReport>), BundleError> {
    let CheckedFiles { folder, manifest, .. } = files;
    let golden = golden::read(folder, manifest)?;
    let model = EncoderModel {
        template: Template::new(&manifest.item_text.template)?,
        tokenizer: Tokenizer::load(&folder.join(&manifest.encoder.tokenizer), manifest.item_text.max_tokens)?,
        pad_id: manifest.encoder.pad_id,
        dim: manifest.encoder.dim,
        digest: digest::encoder_digest(manifest),
    };
    let mut weights = SharedWeights::new(runtime, n_threads);
    let mut load = |file: &str, inputs: &[String], outputs: &[String]| {
        Graph::load(runtime, &mut weights, &folder.join(file), inputs, outputs)
    };
    let (e, u, i, c) = (&manifest.encoder, &manifest.user_tower, &manifest.item_tower, &manifest.cvr);
    let mut parts = Parts { model, encoders: Vec::new(), towers: Vec::new() };
    for _ in 0..n_threads {
        parts.encoders.push(load(&e.file, &e.inputs, &e.outputs)?);
        parts.towers.push(TowerGraphs {
            user: load(&u.file, &u.inputs, &u.outputs)?,
            item: load(&i.file, &i.inputs, &i.outputs)?,
            cvr: load(&c.file, &c.inputs, &c.outputs)?,
        });
    }
    // Every thread has its own sessions of the same files: checking one set of them checks the bundle.
    let graphs = Graphs { encoder: &mut parts.encoders[0], towers: &mut parts.towers[0] };
    let reports = golden::check(&golden, manifest, &parts.model, graphs)?;
    Ok((parts, reports))
}
