//! The lifecycle of what serves: one desired state, whichever door it comes through, and one way for it into force.
//!
//! ```text
//! config file ─┐
//! SIGHUP ──────┼─> parse ─> validate ─> fetch ─> digests ─> graphs ─> golden ─> warm ─> replay ─> persist ─> swap ─> drain
//! PushConfig ──┘                        └──── beside what serves, on a thread that gives way ────┘
//! ```
//!
//! Invariants:
//! - What fails at any step leaves everything that serves as it is, and says which step it was and why ([`journal`]).
//! - One push at a time. One that was meant for another config than the one in force is refused, also where that changed
//!   while it was loading.
//! - A config comes into force at once, for all its models together, and not before a restart would find it ([`desired`]).
//! - The config before and its models stay as they are for a [`Lifecycle::rollback`], which waits for no push and loads
//!   nothing.
//! - A start goes the same way, so that what was pushed starts from cold.
//!
//! `load` has the steps that concern bundles, `swap` those that put a config in force; the pipeline's `replay` fills caches;
//! [`watch`] listens for new ones.

pub mod desired;
pub mod error;
pub mod journal;
mod load;
mod swap;
pub mod watch;

pub use desired::Desired;
pub use error::PushError;
pub use journal::{Journal, Outcome, Report, Step, Trigger};

use crate::{
    bundle::{
        Model, Snapshot,
        store::{Fallback, Store},
    },
    cache::snapshot::{Served, keeper::SnapshotKeeper},
    config::{Settings, store_options},
    inference::Runtime,
    pipeline::Pipeline,
};
use load::Candidate;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};
use tokio::sync::{OnceCell, watch as watched};

/// A config that is, or was, in force.
#[derive(Debug, Clone)]
pub struct InForce {
    /// The SHA-256 of its settings.
    pub digest: String,
    /// The file that it was pushed into; none where it is the config file's own.
    pub pushed_file: Option<PathBuf>,
    /// Its models.
    pub snapshot: Arc<Snapshot>,
    text: String,
}

/// A wish.
#[derive(Debug, Clone)]
pub struct Push {
    /// The config, TOML.
    pub text: String,
    /// What made somebody wish for it.
    pub trigger: Trigger,
    /// Who.
    pub who: String,
    /// The digest of the config that it is meant to follow.
    pub expected: Option<String>,
    /// Everything but putting it in force.
    pub is_dry_run: bool,
    /// Where it was found, at a start.
    pub pushed_file: Option<PathBuf>,
}

/// What a push or a rollback did.
#[derive(Debug)]
pub struct Applied {
    /// How it ended.
    pub outcome: Outcome,
    /// What is in force now.
    pub in_force: InForce,
    /// Step by step.
    pub report: Report,
    /// Why a restart would not come back to it.
    pub warning: Option<PushError>,
}

/// What serves, and the ways to change it.
#[derive(Debug)]
pub struct Lifecycle {
    pipeline: Arc<Pipeline>,
    /// Fills the caches at a start; none where no snapshots are kept.
    snapshots: Option<Arc<SnapshotKeeper>>,
    /// The config file.
    file: PathBuf,
    store: Store,
    /// The settings that the process started with: of what is not live, they are what is in force.
    start: Settings,
    runtime: OnceCell<Runtime>,
    /// Held by the push under way.
    turn: tokio::sync::Mutex<()>,
    /// Held by who changes what is in force and what a restart finds, so that the two agree.
    commit: Mutex<()>,
    state: Mutex<State>,
    draining: watched::Receiver<bool>,
    /// What pushes did.
    pub journal: Journal,
}

#[derive(Debug, Default)]
struct State {
    current: Option<InForce>,
    previous: Option<InForce>,
    n_swaps: u64,
}

impl Lifecycle {
    /// Nothing is in force yet. `file` is the config file, `start` what was read from it.
    pub fn new(
        pipeline: Arc<Pipeline>,
        snapshots: Option<Arc<SnapshotKeeper>>,
        file: PathBuf,
        start: Settings,
        draining: watched::Receiver<bool>,
    ) -> Self {
        let store = Store::new(start.bundles_folder.clone(), store_options());
        Lifecycle {
            pipeline,
            snapshots,
            file,
            store,
            start,
            runtime: OnceCell::new(),
            turn: tokio::sync::Mutex::new(()),
            commit: Mutex::new(()),
            state: Mutex::default(),
            draining,
            journal: Journal::default(),
        }
    }

    /// The config file.
    pub fn file(&self) -> &std::path::Path {
        &self.file
    }

    /// What is in force.
    pub fn in_force(&self) -> Option<InForce> {
        self.state().current.clone()
    }

    /// The parts of the models in force whose vectors are cached.
    pub fn cached_parts(&self) -> Vec<Served> {
        self.in_force().map(|config| config.snapshot.cached_parts()).unwrap_or_default()
    }

    /// What a rollback would put in force.
    pub fn previous(&self) -> Option<InForce> {
        self.state().previous.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the config file says now; nothing where it cannot be read.
    fn file_text(&self) -> String {
        std::fs::read_to_string(&self.file).unwrap_or_default()
    }

    fn digest(&self) -> String {
        self.state().current.as_ref().map_or_else(String::new, |current| current.digest.clone())
    }

    /// Puts the first config in force.
    pub async fn start(self: &Arc<Self>, desired: Desired) -> Result<(), PushError> {
        let Desired { text, pushed_file, .. } = desired;
        let who = "midemb serve".to_owned();
        let push = Push { text, pushed_file, trigger: Trigger::Start, who, expected: None, is_dry_run: false };
        self.apply(push).await.map(drop)
    }

    /// Puts a config in force, or says why not. One from an operator is refused while another push is under way, all others
    /// wait for their turn.
    ///
    /// Not cancel-safe: run it as a task of its own.
    pub async fn apply(self: &Arc<Self>, push: Push) -> Result<Applied, PushError> {
        let _turn = match (push.trigger, self.turn.try_lock()) {
            (_, Ok(turn)) => turn,
            (Trigger::Push, Err(_)) => return Err(self.busy(&push.who)),
            (_, Err(_)) => self.turn.lock().await,
        };
        let before = self.digest();
        self.journal.begin(push.trigger, &push.who, &before);
        let result = self.go_through(&push, &before).await;
        let report = self.journal.end(&result);
        self.applied(result?, report, None)
    }

    /// A wish that could not even be read.
    fn refuse(&self, trigger: Trigger, who: &str, error: PushError) {
        self.journal.refuse(trigger, who, &self.digest(), error);
    }

    fn busy(&self, who: &str) -> PushError {
        let describe = |report: Report| format!("by {} since {:.1} s ago", report.who, report.took.as_secs_f64());
        let busy = PushError::Busy(self.journal.running().map_or_else(String::new, describe));
        self.journal.refuse(Trigger::Push, who, &self.digest(), busy)
    }

    fn applied(&self, outcome: Outcome, report: Report, warning: Option<PushError>) -> Result<Applied, PushError> {
        let in_force = self.in_force().ok_or(PushError::NothingBefore)?;
        Ok(Applied { outcome, in_force, report, warning })
    }

    async fn go_through(self: &Arc<Self>, push: &Push, before: &str) -> Result<Outcome, PushError> {
        conflict(push.expected.as_deref(), before)?;
        let since = Since { n_swaps: self.state().n_swaps, file_text: self.file_text() };
        let mut draining = self.draining.clone();
        let ready = tokio::select! {
            ready = self.make_ready(push) => ready?,
            // An error says that the server is gone altogether.
            _ = draining.wait_for(|draining| *draining) => return Err(PushError::Draining),
        };
        let is_unchanged = self.in_force().is_some_and(|config| {
            let models = config.snapshot.all().map(Arc::as_ptr);
            config.digest == ready.settings.digest && models.eq(ready.candidate.snapshot.all().map(Arc::as_ptr))
        });
        let outcome = match (push.is_dry_run, is_unchanged) {
            (true, _) => Outcome::Checked,
            (false, true) => Outcome::Unchanged,
            (false, false) => Outcome::Applied,
        };
        let (lifecycle, push) = (Arc::clone(self), push.clone());
        // What is not put in force ends here, too: threads and gigabytes are not given back on a thread that serves.
        let committed = on_blocking(move || match outcome {
            Outcome::Checked => Ok(None),
            _ => lifecycle.commit(&push, &since, ready, outcome),
        });
        if let Some(left) = committed.await?? {
            self.journal.step(Step::Drain, "");
            self.drain(left).await;
        }
        Ok(outcome)
    }

    /// Everything that can fail, beside what serves.
    async fn make_ready(self: &Arc<Self>, push: &Push) -> Result<Ready, PushError> {
        self.journal.step(Step::Parse, "");
        let settings = Settings::from_text(&push.text, &self.file)?;
        self.journal.digest(&settings.digest);
        self.journal.step(Step::Validate, "");
        let frozen = self.start.frozen_differences(&settings);
        if !frozen.is_empty() {
            return Err(PushError::Frozen(frozen));
        }
        let is_start = push.trigger == Trigger::Start;
        let fallback = if is_start { Fallback::LastServed } else { Fallback::Refuse };
        let candidate = self.prepare(&settings, &self.loaded(), fallback).await?;
        match is_start {
            true => self.restore(&candidate).await,
            false => self.replay(&settings, &candidate).await,
        }
        Ok(Ready { settings, candidate })
    }

    /// The models whose threads run: of what is in force and of what was before.
    fn loaded(&self) -> Vec<Arc<Model>> {
        let state = self.state();
        let configs = state.current.iter().chain(&state.previous);
        configs.flat_map(|config| config.snapshot.all()).cloned().collect()
    }

    /// Fills the caches from their last snapshot, if snapshots are kept. Whatever is wrong with it, the server starts.
    async fn restore(&self, candidate: &Candidate) {
        if let Some(snapshots) = &self.snapshots {
            self.journal.step(Step::Restore, "");
            snapshots.restore(candidate.snapshot.cached_parts()).await;
        }
    }

    async fn replay(&self, settings: &Settings, candidate: &Candidate) {
        let until = Instant::now() + settings.warm_for;
        for model in &candidate.new {
            self.journal.step(Step::Replay, &model.reference.name);
            let progress = |done, total| self.journal.progress(done, total);
            let (pipeline, of) = (Arc::clone(&self.pipeline), Arc::clone(model));
            let n_models = candidate.new.len() as u64;
            let Ok(hot) = self.on_loader(move || pipeline.hot_items(&of, n_models)).await else { continue };
            let replayed = self.pipeline.replay(model, &hot, until, &progress).await;
            let (name, n_items, n_embedded) = (&model.reference.name, replayed.n_items, replayed.n_embedded);
            tracing::info!(name, n_items, n_embedded, "caches filled for a new model");
        }
    }
}

/// How things stood when a push began.
struct Since {
    /// Swaps so far: another one since then is somebody's who knew nothing of this push.
    n_swaps: u64,
    /// What the config file said.
    file_text: String,
}

/// A config that could be in force.
struct Ready {
    settings: Settings,
    candidate: Candidate,
}

fn conflict(expected: Option<&str>, found: &str) -> Result<(), PushError> {
    match expected.filter(|expected| *expected != found) {
        Some(expected) => Err(PushError::Conflict { expected: expected.to_owned(), found: found.to_owned() }),
        None => Ok(()),
    }
}

async fn on_blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T, PushError> {
    tokio::task::spawn_blocking(job).await.map_err(|error| PushError::Failed(error.to_string()))
}
