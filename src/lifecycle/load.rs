//! From settings to running models: bundles are fetched, checked and loaded, unless their models are already running.
//!
//! A running model with the same name and the same bundle digest is reused with its threads; its files are checked against
//! their digests all the same, because a restart would read them. Models with the same encoder share it and its queue. Bundles
//! are checked and loaded on threads of low priority.

use super::{Lifecycle, Progress, PushError, Step};
use crate::{
    bundle::{
        BundleError, LoadOptions, LoadStep, Model, ModelSet, ServedModel, Shadow,
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

/// The number of requests that a shadow scores at the same time.
const SHADOW_PERMITS: usize = 2;

/// Models that are ready to serve.
pub(super) struct LoadedModels {
    pub(super) models: Arc<ModelSet>,
    /// The models among them that were not running before.
    pub(super) new: Vec<Arc<Model>>,
}

impl Lifecycle {
    /// Loads the models of `settings`, next to those that are running.
    pub(super) async fn load_models(
        self: &Arc<Self>,
        settings: &Settings,
        running: &[Arc<Model>],
        fallback: Fallback,
    ) -> Result<LoadedModels, PushError> {
        let mut new: Vec<Arc<Model>> = Vec::new();
        let mut models = Vec::with_capacity(settings.models.len());
        for model_settings in &settings.models {
            let reusable: Vec<Arc<Model>> = running.iter().chain(&new).cloned().collect();
            let model = self.fetch_and_load(settings, model_settings, &reusable, fallback).await?;
            if !reusable.iter().any(|reused| Arc::ptr_eq(reused, &model)) {
                new.push(Arc::clone(&model));
            }
            models.push(model);
        }
        let models = Arc::new(model_set(settings, models)?);
        Ok(LoadedModels { models, new })
    }

    async fn fetch_and_load(
        self: &Arc<Self>,
        settings: &Settings,
        model_settings: &ModelSettings,
        reusable: &[Arc<Model>],
        fallback: Fallback,
    ) -> Result<Arc<Model>, PushError> {
        let folder = self.fetch(model_settings, fallback).await?;
        let loaded = self.load(settings, model_settings, reusable, folder.clone()).await;
        let (Err(error @ PushError::Bundle { .. }), Source::Url(url)) = (&loaded, &model_settings.bundle) else {
            return loaded;
        };
        if fallback == Fallback::Refuse || model_settings.digest.is_some() {
            return loaded;
        }
        // No model serves yet at a start, and the store's current bundle has never served.
        let (store, bundle_url) = (self.store.clone(), url.clone());
        let last = self.on_loader(move || store.last_served(&bundle_url)).await?.filter(|last| *last != folder);
        let Some(last) = last else { return loaded };
        tracing::error!(%url, cause = %error, "bundle fails its checks, the last bundle of this URL that served is loaded");
        self.load(settings, model_settings, reusable, last).await
    }

    /// Checks and loads the bundle in `folder`, or returns the running model that has the same name and digest.
    async fn load(
        self: &Arc<Self>,
        settings: &Settings,
        model_settings: &ModelSettings,
        reusable: &[Arc<Model>],
        folder: PathBuf,
    ) -> Result<Arc<Model>, PushError> {
        let name = &model_settings.name;
        let failed = |source| PushError::Bundle { name: name.clone(), source: Box::new(source) };
        self.journal.begin_step(Step::Digests, name);
        let files = match self.check_files(&folder, model_settings).await? {
            Ok(files) => files,
            Err(error) => {
                // A file from a store may have been damaged on the local disk; the store still has it.
                if !self.repair(&folder, model_settings).await? {
                    return Err(failed(error));
                }
                self.check_files(&folder, model_settings).await?.map_err(failed)?
            }
        };
        let is_same = |model: &&Arc<Model>| model.reference.name == *name && model.reference.digest == files.digest;
        if let Some(model) = reusable.iter().find(is_same) {
            return Ok(Arc::clone(model));
        }
        let options = LoadOptions {
            served_name: name.clone(),
            n_threads: settings.n_threads,
            batch_requests: settings.batch_requests,
        };
        let encoders: Vec<Arc<Encoder>> = reusable.iter().map(|model| Arc::clone(&model.encoder)).collect();
        let digest = encoder_digest(&files.manifest);
        if let Some(encoder) = encoders.iter().find(|encoder| encoder.digest() == digest) {
            self.journal.begin_step(Step::Golden, name);
            let (folder, manifest) = (folder.clone(), files.manifest.clone());
            let golden = self.on_loader(move || golden::read(&folder, &manifest)).await?.map_err(failed)?;
            let tolerance = files.manifest.encoder.tolerance;
            self.pipeline.check_encoder(encoder, &golden, tolerance).await.map_err(failed)?;
        }
        let runtime = self.runtime(settings).await?;
        let lifecycle = Arc::clone(self);
        let subject = name.clone();
        let load = move || {
            let on_step = |step| lifecycle.journal.begin_step(step_of(step), &subject);
            load::load(files, &options, &runtime, &encoders, &on_step)
        };
        let loaded = self.on_loader(load).await?.map_err(failed)?;
        let started = loaded.start().map_err(failed)?;
        self.pipeline.cache_golden_contents(started.model.encoder.digest(), started.golden_contents);
        Ok(Arc::new(started.model))
    }

    /// Returns the local folder of the model's bundle, fetched if it is in a store.
    async fn fetch(&self, model_settings: &ModelSettings, fallback: Fallback) -> Result<PathBuf, PushError> {
        let url = match &model_settings.bundle {
            Source::Folder(folder) => return Ok(folder.clone()),
            Source::Url(url) => url,
        };
        let ModelSettings { name, digest, .. } = model_settings;
        self.journal.begin_step(Step::Fetch, name);
        let progress = |done, total| self.journal.set_progress(Progress { done, total });
        let fetched = self.store.fetch(url, digest.as_deref(), fallback, &progress).await;
        fetched.map_err(|source| PushError::Fetch { name: name.clone(), source: Box::new(source) })
    }

    async fn check_files(
        &self,
        folder: &Path,
        model_settings: &ModelSettings,
    ) -> Result<Result<CheckedFiles, BundleError>, PushError> {
        let (folder, pinned) = (folder.to_path_buf(), model_settings.digest.clone());
        self.on_loader(move || load::check_files(&folder, pinned.as_deref())).await
    }

    /// Fetches damaged files of a fetched bundle again; returns whether there were any.
    async fn repair(&self, folder: &Path, model_settings: &ModelSettings) -> Result<bool, PushError> {
        let folder_name = folder.file_name().and_then(|name| name.to_str());
        let (Source::Url(_), Some(digest)) = (&model_settings.bundle, folder_name) else {
            return Ok(false);
        };
        let (store, digest) = (self.store.clone(), digest.to_owned());
        let n_damaged = self.on_loader(move || store.remove_damaged(&digest)).await?.unwrap_or(0);
        if n_damaged > 0 {
            self.fetch(model_settings, Fallback::Refuse).await?;
        }
        Ok(n_damaged > 0)
    }

    /// Runs `job` on a thread of its own, at low priority if models serve already.
    pub(super) async fn on_loader<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PushError> {
        let is_serving = self.pipeline.registry.current().is_ok();
        let urgency = if is_serving { Urgency::GivesWay } else { Urgency::Normal };
        background::run(urgency, job).await.map_err(|error| PushError::Failed(error.to_string()))
    }

    /// Records the bundles of `models` that come from stores, so that a start without the store can fall back to them.
    pub(super) fn remember_bundles(&self, settings: &Settings, models: &ModelSet) {
        for ModelSettings { name, bundle, .. } in &settings.models {
            let model = models.all().find(|model| model.reference.name == *name);
            if let (Source::Url(url), Some(model)) = (bundle, model)
                && let Err(error) = self.store.remember(url, &model.reference.digest)
            {
                tracing::warn!(%url, %error, "a start without the store would fall back to an older bundle");
            }
        }
    }

    /// ONNX Runtime, loaded once per process.
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

/// Assigns the models, one per entry of `settings.models`, to their roles.
fn model_set(settings: &Settings, models: Vec<Arc<Model>>) -> Result<ModelSet, PushError> {
    let (mut live, mut shadows) = (Vec::new(), Vec::new());
    for (model_settings, model) in settings.models.iter().zip(models) {
        match &model_settings.role {
            Role::Live { share } => live.push(ServedModel { model, share: *share }),
            Role::Shadow { of, percent } => shadows.push(Shadow {
                model,
                shadow_of: of.clone(),
                percent: *percent,
                permits: Arc::new(Semaphore::new(SHADOW_PERMITS)),
            }),
        }
    }
    for shadow in &shadows {
        check_shadow_dim(shadow, &live)?;
    }
    Ok(ModelSet::new(live, shadows, &settings.salt))
}

/// A shadow's mid-embs can only be compared if they are as wide as those of the model that it shadows.
fn check_shadow_dim(shadow: &Shadow, live: &[ServedModel]) -> Result<(), PushError> {
    let Some(shadowed) = live.iter().find(|served| served.model.reference.name == shadow.shadow_of) else {
        return Ok(());
    };
    let (found, expected) = (shadow.model.manifest.cvr.dim, shadowed.model.manifest.cvr.dim);
    if found != expected {
        let (name, shadow_of) = (shadow.model.reference.name.clone(), shadow.shadow_of.clone());
        return Err(PushError::Shadow { name, shadow_of, found, expected });
    }
    Ok(())
}
