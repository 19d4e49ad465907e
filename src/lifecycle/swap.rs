//! What is in force, and what was: commit, drain and rollback.
//!
//! The config in force, the one before it and what a restart finds change together, by one at a time (`commit`'s lock). A
//! rollback waits for no push: a push counts the swaps, and one that finds another swap than it knew of puts nothing in force.

use super::{
    Applied, InForce, Lifecycle, Outcome, Push, PushError, Ready, Since, Step, Trigger, conflict, desired, on_blocking,
};
use crate::{
    bundle::{Snapshot, load::read_manifest, store::Source},
    config::{ModelSettings, Settings},
    telemetry::events,
};
use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

/// Requests have deadlines; those that began before a swap have ended by then.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
const DRAIN_POLL: Duration = Duration::from_millis(5);

/// What a swap replaced.
pub(super) struct Replaced {
    /// What was in force: a rollback goes back to it.
    old: Option<InForce>,
    /// What was in force before that.
    retired: Option<InForce>,
}

impl Lifecycle {
    /// Puts it in force, and where a restart finds it. Returns what it replaced.
    pub(super) fn commit(
        &self,
        push: &Push,
        since: &Since,
        ready: Ready,
        outcome: Outcome,
    ) -> Result<Option<Replaced>, PushError> {
        let _commit = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().n_swaps != since.n_swaps {
            return Err(PushError::Overtaken(self.digest()));
        }
        if *self.draining.borrow() {
            return Err(PushError::Draining);
        }
        self.journal.step(Step::Persist, "");
        let pushed_file = match push.trigger {
            Trigger::Start => push.pushed_file.clone(),
            _ => desired::keep(&self.file, &since.file_text, &push.text, &push.who)
                .map_err(|(path, source)| PushError::Persist { path, source })?,
        };
        let Ready { settings, candidate } = ready;
        self.remember(&settings, &candidate.snapshot);
        let (digest, snapshot) = (settings.digest, candidate.snapshot);
        let config = InForce { digest, pushed_file, snapshot, text: push.text.clone() };
        if outcome == Outcome::Unchanged {
            if let Some(current) = &mut self.state().current {
                (current.pushed_file, current.text) = (config.pushed_file, config.text);
            }
            return Ok(None);
        }
        self.journal.step(Step::Swap, "");
        Ok(Some(self.install(config)))
    }

    fn install(&self, config: InForce) -> Replaced {
        let mut state = self.state();
        state.n_swaps += 1;
        self.pipeline.registry.install(Arc::clone(&config.snapshot));
        let new = config.clone();
        let old = state.current.replace(config);
        let retired = std::mem::replace(&mut state.previous, old.clone());
        drop(state);
        if let Some(old) = &old {
            for model in old.snapshot.all() {
                events::model_retired(&model.reference, model.provider.as_str());
            }
            events::config_replaced(&old.digest);
        }
        for model in new.snapshot.all() {
            events::model_served(&model.reference, model.provider.as_str());
        }
        events::config_applied(&new.digest);
        Replaced { old, retired }
    }

    /// Waits for the requests that began with what was replaced, and lets go of what no rollback needs any more.
    pub(super) async fn drain(&self, Replaced { old, retired }: Replaced) {
        let deadline = Instant::now() + DRAIN_PATIENCE;
        if let Some(InForce { snapshot, .. }) = old {
            // One is ours, one is the rollback's.
            while Arc::strong_count(&snapshot) > 2 && Instant::now() < deadline {
                tokio::time::sleep(DRAIN_POLL).await;
            }
        }
        let keep: Vec<String> = self.loaded().iter().map(|model| model.reference.digest.clone()).collect();
        let store = self.store.clone();
        // Threads and gigabytes are not given back on a thread that serves.
        let let_go = move || {
            drop(retired);
            store.prune(&keep).map(drop).map_err(|error| error.to_string())
        };
        if let Ok(Err(error)) = on_blocking(let_go).await {
            tracing::warn!(error, "old bundles stay on the disk");
        }
    }

    /// Puts the config before in force again, at once: its models are there. It waits for no push; one that is under way
    /// finds at its end that another config is in force than the one it was meant to follow.
    pub async fn rollback(self: &Arc<Self>, who: &str, expected: Option<&str>) -> Result<Applied, PushError> {
        let (lifecycle, who, expected) = (Arc::clone(self), who.to_owned(), expected.map(str::to_owned));
        on_blocking(move || lifecycle.roll_back(&who, expected.as_deref())).await?
    }

    fn roll_back(&self, who: &str, expected: Option<&str>) -> Result<Applied, PushError> {
        let began = Instant::now();
        let _commit = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.digest();
        let refused = |error| self.journal.refuse(Trigger::Rollback, who, &before, error);
        conflict(expected, &before).map_err(refused)?;
        let previous = self.previous().ok_or(PushError::NothingBefore).map_err(refused)?;
        let InForce { digest, text, snapshot, .. } = previous.clone();
        self.install(previous);
        let kept = desired::keep(&self.file, &self.file_text(), &text, who);
        let warning = match kept {
            Ok(pushed_file) => {
                self.state().current.iter_mut().for_each(|current| current.pushed_file.clone_from(&pushed_file));
                self.moved(&text, &snapshot)
            }
            Err((path, source)) => Some(PushError::Persist { path, source }),
        };
        if let Some(warning) = &warning {
            tracing::error!(cause = %warning, "a restart would not come back to the config that was rolled back to");
        }
        let report = self.journal.rolled_back(who, (&before, &digest), began.elapsed());
        self.applied(Outcome::RolledBack, report, warning)
    }

    /// The first model of `snapshot` in whose folder there is another bundle by now.
    fn moved(&self, text: &str, snapshot: &Snapshot) -> Option<PushError> {
        let settings = Settings::of_text(text, &self.file).ok()?;
        settings.models.into_iter().find_map(|ModelSettings { name, bundle, .. }| {
            let Source::Folder(folder) = bundle else { return None };
            let model = snapshot.all().find(|model| model.reference.name == name)?;
            let is_there = read_manifest(&folder).is_ok_and(|files| files.digest == model.reference.digest);
            (!is_there).then_some(PushError::Moved { name, folder })
        })
    }
}
