//! From settings to models whose threads run: bundles are fetched, checked and loaded, but for what serves already.
//!
//! A model that serves under the same name from a bundle of the same digest is taken over as it is, with its threads; its
//! files are held to their digests all the same, because a restart would read them. A model with the encoder of another one
//! shares that, and its queue. What has to be computed is computed on a thread that gives way to those that serve.

use super::{Lifecycle, PushError, Step};
use crate::{
    bundle::{
        BundleError, LoadOptions, LoadStep, Model, ServedModel, Shadow, Snapshot,
        digest::encoder_digest,
        golden,
        load::{self, CheckedFiles},
        store::{Fallback, Source},
    },
    config::{ModelSettings, Role, Settings},
    content::Encoder,
    inference::{
        Runtime,
        background::{self, Urgency},
    },
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::Semaphore;

/// Requests that a shadow may have under way.
const SHADOW_ROOM: usize = 2;

/// Models that could serve from now on.
pub(super) struct Candidate {
    pub(super) snapshot: Arc<Snapshot>,
    /// Those of them that did not serve before.
    pub(super) new: Vec<Arc<Model>>,
}

impl Lifecycle {
    /// Loads what `settings` ask for, beside what serves.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        settings: &Settings,
        serving: &[Arc<Model>],
        fallback: Fallback,
    ) -> Result<Candidate, PushError> {
        let mut new: Vec<Arc<Model>> = Vec::new();
        let mut models = Vec::with_capacity(settings.models.len());
        for wanted in &settings.models {
            let known: Vec<Arc<Model>> = serving.iter().chain(&new).cloned().collect();
            let model = self.prepare_one(settings, wanted, &known, fallback).await?;
            if !known.iter().any(|known| Arc::ptr_eq(known, &model)) {
                new.push(Arc::clone(&model));
            }
            models.push(model);
        }
        let snapshot = Arc::new(snapshot(settings, models)?);
        Ok(Candidate { snapshot, new })
    }

    async fn prepare_one(
        self: &Arc<Self>,
        settings: &Settings,
        wanted: &ModelSettings,
        known: &[Arc<Model>],
        fallback: Fallback,
    ) -> Result<Arc<Model>, PushError> {
        let folder = self.fetch(wanted, fallback).await?;
        let loaded = self.load(settings, wanted, known, folder.clone()).await;
        let (Err(error @ PushError::Bundle { .. }), Source::Url(url)) = (&loaded, &wanted.bundle) else {
            return loaded;
        };
        if fallback == Fallback::Refuse || wanted.digest.is_some() {
            return loaded;
        }
        // A start has nothing that serves yet, and what the store has now was never good enough to.
        let (store, asked) = (self.store.clone(), url.clone());
        let last = self.on_loader(move || store.last_served(&asked)).await?.filter(|last| *last != folder);
        let Some(last) = last else { return loaded };
        tracing::error!(%url, cause = %error, "the bundle fails its checks, the one of this URL that served last is taken");
        self.load(settings, wanted, known, last).await
    }

    async fn load(
        self: &Arc<Self>,
        settings: &Settings,
        wanted: &ModelSettings,
        known: &[Arc<Model>],
        folder: PathBuf,
    ) -> Result<Arc<Model>, PushError> {
        let name = &wanted.name;
        let failed = |source| PushError::Bundle { name: name.clone(), source: Box::new(source) };
        self.journal.step(Step::Digests, name);
        let files = match self.check_files(&folder, wanted).await? {
            Ok(files) => files,
            // A file that came from a store may have decayed on this disk. The store has it still.
            Err(error) => match self.heal(&folder, wanted).await? {
                true => self.check_files(&folder, wanted).await?.map_err(failed)?,
                false => return Err(failed(error)),
            },
        };
        let is_same = |model: &&Arc<Model>| model.reference.name == *name && model.reference.digest == files.digest;
        if let Some(model) = known.iter().find(is_same) {
            return Ok(Arc::clone(model));
        }
        let options = LoadOptions {
            served_name: name.clone(),
            n_threads: settings.n_threads,
            batch_requests: settings.batch_requests,
        };
        let encoders: Vec<Arc<Encoder>> = known.iter().map(|model| Arc::clone(&model.encoder)).collect();
        let digest = encoder_digest(&files.manifest);
        if let Some(encoder) = encoders.iter().find(|encoder| encoder.digest() == digest) {
            self.journal.step(Step::Golden, name);
            let (folder, manifest) = (folder.clone(), files.manifest.clone());
            let golden = self.on_loader(move || golden::read(&folder, &manifest)).await?.map_err(failed)?;
            self.pipeline.check_encoder(encoder, &golden).await.map_err(failed)?;
        }
        let runtime = self.runtime(settings).await?;
        let lifecycle = Arc::clone(self);
        let subject = name.clone();
        let load = move || {
            let begins = |step| lifecycle.journal.step(step_of(step), &subject);
            load::load(files, &options, &runtime, &encoders, &begins)
        };
        let loaded = self.on_loader(load).await?.map_err(failed)?;
        let started = loaded.start().map_err(failed)?;
        self.pipeline.keep_golden(started.model.encoder.digest(), started.contents);
        Ok(Arc::new(started.model))
    }

    async fn fetch(&self, wanted: &ModelSettings, fallback: Fallback) -> Result<PathBuf, PushError> {
        let url = match &wanted.bundle {
            Source::Folder(folder) => return Ok(folder.clone()),
            Source::Url(url) => url,
        };
        self.journal.step(Step::Fetch, &wanted.name);
        let progress = |done, total| self.journal.progress(done, total);
        let fetched = self.store.fetch(url, wanted.digest.as_deref(), fallback, &progress).await;
        fetched.map_err(|source| PushError::Fetch { name: wanted.name.clone(), source: Box::new(source) })
    }

    async fn check_files(
        &self,
        folder: &Path,
        wanted: &ModelSettings,
    ) -> Result<Result<CheckedFiles, BundleError>, PushError> {
        let (folder, pinned) = (folder.to_path_buf(), wanted.digest.clone());
        self.on_loader(move || load::check_files(&folder, pinned.as_deref())).await
    }

    /// Whether files of a fetched bundle were damaged and are there again.
    async fn heal(&self, folder: &Path, wanted: &ModelSettings) -> Result<bool, PushError> {
        let (Source::Url(_), Some(digest)) = (&wanted.bundle, folder.file_name().and_then(|name| name.to_str())) else {
            return Ok(false);
        };
        let (store, digest) = (self.store.clone(), digest.to_owned());
        let n_damaged = self.on_loader(move || store.heal(&digest)).await?.unwrap_or(0);
        if n_damaged > 0 {
            self.fetch(wanted, Fallback::Refuse).await?;
        }
        Ok(n_damaged > 0)
    }

    /// Runs `job` on a thread of its own, which gives way to those that serve, if any do.
    pub(super) async fn on_loader<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PushError> {
        let is_serving = self.pipeline.registry.current().is_ok();
        let urgency = if is_serving { Urgency::GivesWay } else { Urgency::Normal };
        background::run(urgency, job).await.map_err(|error| PushError::Failed(error.to_string()))
    }

    /// Notes what came from stores and serves from now on.
    pub(super) fn remember(&self, settings: &Settings, snapshot: &Snapshot) {
        for ModelSettings { name, bundle, .. } in &settings.models {
            let model = snapshot.all().find(|model| model.reference.name == *name);
            if let (Source::Url(url), Some(model)) = (bundle, model)
                && let Err(error) = self.store.remember(url, &model.reference.digest)
            {
                tracing::warn!(%url, %error, "a start without the store would fall back to an older bundle");
            }
        }
    }

    /// ONNX Runtime, which a process loads once.
    async fn runtime(&self, settings: &Settings) -> Result<Runtime, PushError> {
        let (library, provider) = (settings.onnxruntime.clone(), settings.provider);
        let load = || async move {
            self.on_loader(move || Runtime::load(library.as_deref(), provider)).await?.map_err(PushError::from)
        };
        self.runtime.get_or_try_init(load).await.cloned()
    }
}

fn step_of(step: LoadStep) -> Step {
    match step {
        LoadStep::Graphs => Step::Graphs,
        LoadStep::Golden => Step::Golden,
        LoadStep::Warm => Step::Warm,
    }
}

fn snapshot(settings: &Settings, models: Vec<Arc<Model>>) -> Result<Snapshot, PushError> {
    let (mut served, mut shadows) = (Vec::new(), Vec::new());
    for (wanted, model) in settings.models.iter().zip(models) {
        match &wanted.role {
            Role::Live { share } => served.push(ServedModel { model, share: *share }),
            Role::Shadow { of, percent } => shadows.push(Shadow {
                model,
                of: of.clone(),
                percent: *percent,
                room: Arc::new(Semaphore::new(SHADOW_ROOM)),
            }),
        }
    }
    for shadow in &shadows {
        let answers = served.iter().find(|served| served.model.reference.name == shadow.of);
        let dims = answers.map(|answers| (shadow.model.manifest.cvr.dim, answers.model.manifest.cvr.dim));
        if let Some((found, expected)) = dims.filter(|(found, expected)| found != expected) {
            let (name, of) = (shadow.model.reference.name.clone(), shadow.of.clone());
            return Err(PushError::Shadow { name, of, found, expected });
        }
    }
    Ok(Snapshot::new(served, shadows, &settings.salt))
}
