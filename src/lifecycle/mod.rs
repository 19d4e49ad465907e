//! The lifecycle of the config and its models: whichever way a new config arrives, it is put in force by the same steps.
//!
//! ```text
//! config file ─┐
//! SIGHUP ──────┼─> parse ─> validate ─> fetch ─> digests ─> graphs ─> golden ─> warm ─> replay ─> persist ─> swap ─> drain
//! PushConfig ──┘                        └─── next to the models that serve, at low priority ───┘
//! ```
//!
//! Invariants:
//! - A failure at any step changes nothing that serves, and the [`journal`] says which step failed and why.
//! - One push runs at a time, in a turn of its own. What is desired is read, and compared with what is in force, inside the
//!   turn in which it is applied, so that whoever comes later never puts back an older config (`turn`).
//! - A push that is based on another config than the one in force is refused, even if the config changed while the push was
//!   loading.
//! - A config is put in force atomically, for all its models together, and only after it is saved for a restart
//!   ([`desired`]).
//! - The previous config and its models stay loaded for a [`Lifecycle::rollback`], which neither waits for a push nor loads
//!   anything.
//! - A start runs the same steps, so a pushed config is also in force after a restart.
//!
//! `turn` gives each wish its turn; `load` has the steps that work on bundles, `swap` the steps that put a config in force; the
//! pipeline's `replay` fills the caches; [`watch`] detects changes of the config file.

pub mod desired;
pub mod error;
pub mod journal;
mod load;
mod swap;
mod turn;
pub mod watch;

pub use desired::Desired;
pub use error::PushError;
pub use journal::{Journal, Outcome, Progress, Report, Step, Trigger};

use crate::{
    bundle::{
        Model, ModelSet,
        store::{Fallback, Store},
    },
    cache::snapshot::{Served, keeper::SnapshotKeeper},
    config::{Settings, store_options},
    domain::bounded_text::cut,
    inference::Runtime,
    pipeline::{Pipeline, replay::ReplaySummary},
    served_features::Rate,
    telemetry::events::ConfigLabels,
};
use load::LoadedModels;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::{OnceCell, watch as watch_channel};
use turn::Wish;

/// A config that is or was in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The SHA-256 of its settings.
    pub digest: String,
    /// The file that it was pushed into; none if it is the config file itself.
    pub pushed_file: Option<PathBuf>,
    #[expect(missing_docs, reason = "its type says it all")]
    pub models: Arc<ModelSet>,
    /// How much is sampled for served features, if they are on.
    sample_rate: Option<Rate>,
    text: String,
}

impl InForce {
    fn labels(&self) -> ConfigLabels<'_> {
        let models = self.models.all().map(|model| (&*model.reference, model.provider.as_str()));
        ConfigLabels { digest: &self.digest, models: models.collect() }
    }
}

/// An operator's request to put a config in force.
#[derive(Debug, Clone)]
pub struct Push {
    /// The config, TOML.
    pub text: String,
    /// The operator, for the journal.
    pub who: String,
    /// The push is refused unless the config in force has this digest.
    pub expected_digest: String,
    /// Runs all steps except those that put the config in force.
    pub is_dry_run: bool,
}

/// The result of a successful push or rollback.
#[derive(Debug)]
pub struct PushResult {
    #[expect(missing_docs, reason = "its type says it all")]
    pub outcome: Outcome,
    /// The config that is now in force.
    pub in_force: InForce,
    /// The steps that ran.
    pub report: Report,
    /// Why a restart would not restore the config that was rolled back to.
    pub warning: Option<PushError>,
}

/// The config and the models in force, and the operations that change them.
#[derive(Debug)]
pub struct Lifecycle {
    pipeline: Arc<Pipeline>,
    /// Restores the caches at a start; none if no snapshots are kept.
    snapshots: Option<Arc<SnapshotKeeper>>,
    /// The config file.
    file: PathBuf,
    store: Store,
    /// The settings that the process started with; those that cannot change without a restart are still in force.
    start_settings: Settings,
    runtime: OnceCell<Runtime>,
    /// Held during a turn, so that one push runs at a time.
    push_lock: tokio::sync::Mutex<()>,
    /// Held while the config in force and the saved config change, so that the two agree.
    commit_lock: Mutex<()>,
    state: Mutex<State>,
    draining: watch_channel::Receiver<bool>,
    #[expect(missing_docs, reason = "its type says it all")]
    pub journal: Journal,
}

#[derive(Debug, Default)]
struct State {
    current: Option<InForce>,
    previous: Option<InForce>,
    n_swaps: u64,
    /// What was on disk when the config in force was saved. As long as this is on disk, the desired config is the one in force,
    /// even if that could not be saved.
    saved: Option<Desired>,
    /// The text of the config file that was last considered, put in force or not. Only another text is a new wish.
    considered: Option<String>,
}

impl Lifecycle {
    /// Creates a lifecycle without a config in force. `file` is the config file, `start_settings` are the settings of the
    /// config that [`Lifecycle::start`] puts in force.
    pub fn new(
        pipeline: Arc<Pipeline>,
        snapshots: Option<Arc<SnapshotKeeper>>,
        file: PathBuf,
        start_settings: Settings,
        draining: watch_channel::Receiver<bool>,
    ) -> Self {
        let store = Store::new(start_settings.bundles_folder.clone(), store_options());
        Lifecycle {
            pipeline,
            snapshots,
            file,
            store,
            start_settings,
            runtime: OnceCell::new(),
            push_lock: tokio::sync::Mutex::new(()),
            commit_lock: Mutex::new(()),
            state: Mutex::default(),
            draining,
            journal: Journal::default(),
        }
    }

    /// The path of the config file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The config in force; none while the server starts.
    pub fn in_force(&self) -> Option<InForce> {
        self.state().current.clone()
    }

    /// [`ModelSet::cached_parts`] of the models in force; empty while the server starts.
    pub fn cached_parts(&self) -> Vec<Served> {
        self.in_force().map(|config| config.models.cached_parts()).unwrap_or_default()
    }

    /// The config that a rollback would put in force.
    pub fn previous(&self) -> Option<InForce> {
        self.state().previous.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The digest of the config in force; empty while the server starts.
    fn current_digest(&self) -> String {
        self.state().current.as_ref().map_or_else(String::new, |current| current.digest.clone())
    }

    fn push_result(
        &self,
        outcome: Outcome,
        report: Report,
        warning: Option<PushError>,
    ) -> Result<PushResult, PushError> {
        let in_force = self.in_force().ok_or(PushError::NoPreviousConfig)?;
        Ok(PushResult { outcome, in_force, report, warning })
    }

    async fn run_push(self: &Arc<Self>, wish: Wish) -> Result<Outcome, PushError> {
        let mut draining = self.draining.clone();
        let prepared = tokio::select! {
            prepared = self.prepare(&wish) => prepared?,
            // An error means that the server itself was dropped.
            _ = draining.wait_for(|is_draining| *is_draining) => return Err(PushError::Draining),
        };
        let is_unchanged = self.in_force().is_some_and(|config| {
            let current = config.models.all().map(Arc::as_ptr);
            let new = prepared.loaded.models.all().map(Arc::as_ptr);
            config.digest == prepared.settings.digest && current.eq(new)
        });
        let outcome = match (wish.is_dry_run, is_unchanged) {
            (true, _) => Outcome::Checked,
            (false, true) => Outcome::Unchanged,
            (false, false) => Outcome::Applied,
        };
        let lifecycle = Arc::clone(self);
        // A dry run drops its models here, too: freeing gigabytes must not block an I/O thread.
        let committed = on_blocking(move || match outcome {
            Outcome::Checked => Ok(None),
            _ => lifecycle.commit(wish, prepared, outcome),
        });
        if let Some(replaced) = committed.await?? {
            self.journal.begin_step(Step::Drain, "");
            self.drain(replaced).await;
        }
        Ok(outcome)
    }

    /// Runs all steps that can fail, without touching the config and the models in force.
    async fn prepare(self: &Arc<Self>, wish: &Wish) -> Result<PreparedConfig, PushError> {
        self.journal.begin_step(Step::Parse, "");
        // Reading megabytes takes seconds, which belong to no I/O thread.
        let (text, file) = (wish.text.clone(), self.file.clone());
        let settings = self.on_loader(move || Settings::from_text(&text, &file)).await??;
        self.journal.set_digest(&settings.digest);
        self.journal.begin_step(Step::Validate, "");
        let frozen = self.start_settings.frozen_differences(&settings);
        if !frozen.is_empty() {
            return Err(PushError::Frozen(frozen));
        }
        let is_start = wish.trigger == Trigger::Start;
        let fallback = if is_start { Fallback::LastServed } else { Fallback::Refuse };
        let loaded = self.load_models(&settings, &self.running_models(), fallback).await?;
        if is_start {
            self.restore(&loaded).await;
        } else {
            self.replay(&settings, &loaded).await;
        }
        Ok(PreparedConfig { settings, loaded })
    }

    /// The models whose threads are running: those of the config in force and of the previous one.
    fn running_models(&self) -> Vec<Arc<Model>> {
        let state = self.state();
        let configs = state.current.iter().chain(&state.previous);
        configs.flat_map(|config| config.models.all()).cloned().collect()
    }

    /// Restores the caches from their last snapshot, if snapshots are kept. A bad snapshot does not prevent the start.
    async fn restore(&self, loaded: &LoadedModels) {
        if let Some(snapshots) = &self.snapshots {
            self.journal.begin_step(Step::Restore, "");
            snapshots.restore(loaded.models.cached_parts()).await;
        }
    }

    /// Fills the caches for the new models with hot items, within the configured time.
    async fn replay(&self, settings: &Settings, loaded: &LoadedModels) {
        let until = Instant::now() + settings.warm_for;
        for model in &loaded.new {
            self.journal.begin_step(Step::Replay, &model.reference.name);
            let progress = |done, total| self.journal.set_progress(Progress { done, total });
            let (pipeline, new_model) = (Arc::clone(&self.pipeline), Arc::clone(model));
            let n_models = loaded.new.len() as u64;
            let Ok(hot) = self.on_loader(move || pipeline.hot_items(&new_model, n_models)).await else { continue };
            let ReplaySummary { n_items, n_embedded } = self.pipeline.replay(model, &hot, until, &progress).await;
            tracing::info!(name = model.reference.name, n_items, n_embedded, "caches filled for a new model");
        }
    }
}

/// A config that is ready to be put in force.
struct PreparedConfig {
    settings: Settings,
    loaded: LoadedModels,
}

/// A digest has 64 characters; what a caller sends in place of one may have any length.
const MAX_DIGEST_BYTES: usize = 80;

fn check_expected_digest(expected: Option<&str>, found: &str) -> Result<(), PushError> {
    match expected {
        Some(expected) if expected != found => {
            let expected = cut(expected, MAX_DIGEST_BYTES).into_owned();
            Err(PushError::Conflict { expected, found: found.to_owned() })
        }
        _ => Ok(()),
    }
}

async fn on_blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T, PushError> {
    tokio::task::spawn_blocking(job).await.map_err(|error| PushError::Failed(error.to_string()))
}
