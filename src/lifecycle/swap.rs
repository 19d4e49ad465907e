//! Puts configs in force: commit, drain and rollback.
//!
//! The config in force, the previous one and the config saved for a restart change together, under the commit lock. A rollback
//! does not wait for a push. Swaps are counted, and a push that finds that the count changed while it was loading is refused.

use super::{
    InForce, Lifecycle, Outcome, PreparedConfig, PushError, PushResult, Step, Trigger, check_expected_digest,
    desired::{self, PersistError},
    on_blocking,
    turn::Wish,
};
use crate::{
    bundle::{ModelSet, load::read_manifest, store::Source},
    config::{ModelSettings, Settings, pin_bundles},
    telemetry::events,
};
use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

/// Requests have deadlines; those that started before a swap have usually ended by then.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// The configs that a swap replaced.
pub(super) struct Replaced {
    /// The config that was in force; a rollback restores it.
    previous: Option<InForce>,
    /// The config in force before that one, which is no longer needed.
    retired: Option<InForce>,
}

impl Lifecycle {
    /// Saves the config for a restart and puts it in force. Returns the configs that it replaced; none if nothing changed.
    pub(super) fn commit(
        &self,
        wish: Wish,
        prepared: PreparedConfig,
        outcome: Outcome,
    ) -> Result<Option<Replaced>, PushError> {
        let _commit_lock = self.commit_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().n_swaps != wish.n_swaps {
            return Err(PushError::Overtaken(self.current_digest()));
        }
        if *self.draining.borrow() {
            return Err(PushError::Draining);
        }
        self.journal.begin_step(Step::Persist, "");
        let saved = match wish.saved {
            Some(saved) => saved,
            None => desired::persist(&self.file, &wish.file_text, &wish.text, &wish.who)?,
        };
        let PreparedConfig { settings, loaded } = prepared;
        self.remember_bundles(&settings, &loaded.models);
        let sample_rate = settings.served_features.map(|options| options.rate);
        let (digest, models, text) = (settings.digest, loaded.models, wish.text);
        let config = InForce { digest, pushed_file: saved.pushed_file.clone(), models, sample_rate, text };
        let mut state = self.state();
        (state.saved, state.considered) = (Some(saved), Some(wish.file_text));
        if outcome == Outcome::Unchanged {
            if let Some(current) = &mut state.current {
                (current.pushed_file, current.text) = (config.pushed_file, config.text);
            }
            return Ok(None);
        }
        drop(state);
        self.journal.begin_step(Step::Swap, "");
        Ok(Some(self.install(config)))
    }

    fn install(&self, config: InForce) -> Replaced {
        let mut state = self.state();
        state.n_swaps += 1;
        self.pipeline.registry.install(Arc::clone(&config.models));
        if let Some((features, rate)) = self.pipeline.served_features.as_ref().zip(config.sample_rate) {
            features.set_rate(rate);
        }
        let new = config.clone();
        let previous = state.current.replace(config);
        let retired = std::mem::replace(&mut state.previous, previous.clone());
        drop(state);
        events::config_applied(&new.labels(), previous.as_ref().map(InForce::labels).as_ref());
        Replaced { previous, retired }
    }

    /// Waits for the requests that started before the swap, then drops the retired models and prunes old bundles.
    pub(super) async fn drain(&self, Replaced { previous, retired }: Replaced) {
        let deadline = Instant::now() + DRAIN_PATIENCE;
        if let Some(InForce { models, .. }) = previous {
            // One reference is held here, and one for a rollback; the others are those of requests.
            while Arc::strong_count(&models) > 2 && Instant::now() < deadline {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        }
        let keep: Vec<String> = self.running_models().iter().map(|model| model.reference.digest.clone()).collect();
        let store = self.store.clone();
        // Freeing gigabytes must not block an I/O thread.
        let clean_up = move || {
            drop(retired);
            store.prune(&keep)
        };
        if let Ok(Err(error)) = on_blocking(clean_up).await {
            tracing::warn!(%error, "old bundles cannot be removed from the disk");
        }
    }

    /// Puts the previous config in force again, at once, because its models are still loaded. Does not wait for a running
    /// push; that push is refused when it finds that the config in force has changed.
    pub async fn rollback(self: &Arc<Self>, who: &str, expected: Option<&str>) -> Result<PushResult, PushError> {
        let (lifecycle, who, expected) = (Arc::clone(self), who.to_owned(), expected.map(str::to_owned));
        on_blocking(move || lifecycle.rollback_blocking(&who, expected.as_deref())).await?
    }

    fn rollback_blocking(&self, who: &str, expected: Option<&str>) -> Result<PushResult, PushError> {
        let began = Instant::now();
        let _commit_lock = self.commit_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let digest_before = self.current_digest();
        let record = |error: &PushError| self.journal.refused(Trigger::Rollback, who, &digest_before, error);
        check_expected_digest(expected, &digest_before).inspect_err(record)?;
        let mut previous = self.previous().ok_or(PushError::NoPreviousConfig).inspect_err(record)?;
        let pinned = self.pin(&mut previous);
        let InForce { digest, text, models, .. } = previous.clone();
        self.install(previous);
        let saved = self.save_rollback(&text, who).map_err(PushError::from);
        let warning = match saved.and(pinned) {
            Ok(settings) => {
                self.remember_bundles(&settings, &models);
                find_replaced_bundle(settings, &models)
            }
            Err(error) => Some(error),
        };
        if let Some(warning) = &warning {
            tracing::error!(cause = %warning, "a restart would not restore the config that was rolled back to");
        }
        let report = self.journal.rolled_back(who, &digest_before, &digest, began.elapsed());
        self.push_result(Outcome::RolledBack, report, warning)
    }

    /// Pins the bundles of a config that come from stores to the digests of its models: a store may have another bundle by now,
    /// and a restart must find the one that is rolled back to. Returns the settings of the config.
    fn pin(&self, config: &mut InForce) -> Result<Settings, PushError> {
        let digest_of = |name: &str| {
            let mut models = config.models.all();
            models.find(|model| model.reference.name == name).map(|model| model.reference.digest.clone())
        };
        let text = pin_bundles(&config.text, &self.file, digest_of)?;
        let settings = Settings::from_text(&text, &self.file)?;
        (config.text, config.digest) = (text, settings.digest.clone());
        Ok(settings)
    }

    /// Saves the config in force, whose text is `text`, for a restart.
    fn save_rollback(&self, text: &str, who: &str) -> Result<(), PersistError> {
        let file_text = self.file_text();
        let persisted = desired::persist(&self.file, &file_text, text, who);
        let saved = match &persisted {
            Ok(saved) => Some(saved.clone()),
            // What is on disk is older than this rollback, so it must not undo it.
            Err(_) => desired::read(&self.file).ok().filter(|found| found.file_text == file_text),
        };
        let mut state = self.state();
        if let (Some(current), Ok(saved)) = (&mut state.current, &persisted) {
            current.pushed_file.clone_from(&saved.pushed_file);
        }
        (state.saved, state.considered) = (saved, Some(file_text));
        persisted.map(drop)
    }
}

/// Returns an error about the first model of `models` whose folder now contains another bundle.
fn find_replaced_bundle(settings: Settings, models: &ModelSet) -> Option<PushError> {
    for ModelSettings { name, bundle, .. } in settings.models {
        let model = models.all().find(|model| model.reference.name == name);
        let (Source::Folder(folder), Some(model)) = (bundle, model) else { continue };
        let is_unchanged = read_manifest(&folder).is_ok_and(|files| files.digest == model.reference.digest);
        if !is_unchanged {
            return Some(PushError::BundleReplaced { name, folder });
        }
    }
    None
}
