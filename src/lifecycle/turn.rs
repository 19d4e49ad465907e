//! The turns in which configs are put in force, one at a time.
//!
//! A wish reaches the server in three ways: an operator pushes a config, the config file changes, or SIGHUP asks for what is
//! on disk. The last two are read inside their turn: a text that was read before it would be older than the config of the turn
//! that it waited for, and would undo it.
//!
//! - The config file is a new wish only if its text differs from the text that was considered last: by a start, by a reload,
//!   or as the text that a push or a rollback was saved over. A file that cannot be read is no new text.
//! - What is on disk asks for the config in force as long as it is what was there when that config was saved. So SIGHUP keeps a
//!   rollback that could not be saved.
//! - A rollback takes no turn. A push under way notices it by the number of swaps, and is refused.

use super::{Desired, Lifecycle, Push, PushError, PushResult, Trigger, check_expected_digest, desired, on_blocking};
use crate::config::{ConfigError, raw::read_file};
use std::sync::Arc;

/// A config that a turn is to put in force.
#[derive(Debug)]
pub(super) struct Wish {
    /// TOML.
    pub(super) text: String,
    pub(super) trigger: Trigger,
    pub(super) who: String,
    pub(super) is_dry_run: bool,
    /// The number of swaps before the text was read. If it changes during the turn, another config was put in force.
    pub(super) n_swaps: u64,
    /// The contents of the config file, which the config is saved over.
    pub(super) file_text: String,
    /// What is on disk, if a restart would find this config there; otherwise it has to be saved.
    pub(super) saved: Option<Desired>,
}

impl Lifecycle {
    /// Puts the first config in force.
    pub async fn start(self: &Arc<Self>, desired: Desired) -> Result<(), PushError> {
        let _turn = self.push_lock.lock().await;
        let n_swaps = self.state().n_swaps;
        let who = "midemb serve".to_owned();
        self.take_turn(Wish::from_disk(desired, Trigger::Start, who, n_swaps), None).await.map(drop)
    }

    /// Puts an operator's config in force. It is refused while another push is running.
    ///
    /// Not cancel-safe: run it in a task of its own.
    pub async fn push(self: &Arc<Self>, push: Push) -> Result<PushResult, PushError> {
        let Ok(_turn) = self.push_lock.try_lock() else { return Err(self.refuse_busy(&push.who)) };
        let n_swaps = self.state().n_swaps;
        let lifecycle = Arc::clone(self);
        let file_text = on_blocking(move || lifecycle.file_text()).await?;
        let Push { text, who, expected_digest, is_dry_run } = push;
        let wish = Wish { text, trigger: Trigger::Push, who, is_dry_run, n_swaps, file_text, saved: None };
        self.take_turn(wish, Some(&expected_digest)).await
    }

    /// Puts the config that is desired on disk in force; after a change of the config file, only if its text is new. Waits for
    /// its turn. The journal records the result, except the error that is returned if what is desired cannot be read.
    ///
    /// Not cancel-safe: run it in a task of its own.
    pub(super) async fn reload(self: &Arc<Self>, trigger: Trigger) -> Result<(), PushError> {
        let _turn = self.push_lock.lock().await;
        let lifecycle = Arc::clone(self);
        if let Some(wish) = on_blocking(move || lifecycle.read_wish(trigger)).await?? {
            drop(self.take_turn(wish, None).await);
        }
        Ok(())
    }

    /// Reads what is desired on disk; none if the config file changed and its text is not new after all.
    fn read_wish(&self, trigger: Trigger) -> Result<Option<Wish>, ConfigError> {
        // Before the text is read, so that a rollback in between is noticed.
        let n_swaps = self.state().n_swaps;
        let found = desired::read(&self.file)?;
        let mut state = self.state();
        let considered = state.considered.replace(found.file_text.clone());
        if trigger == Trigger::File && considered.as_ref() == Some(&found.file_text) {
            return Ok(None);
        }
        let in_force = state.current.as_ref().filter(|_| state.saved.as_ref() == Some(&found));
        let text_in_force = in_force.map(|config| config.text.clone());
        let mut wish = Wish::from_disk(found, trigger, self.who(trigger), n_swaps);
        if let Some(text) = text_in_force {
            wish.put(text);
        }
        Ok(Some(wish))
    }

    /// Whether this text of the config file has been considered already.
    pub(super) fn has_considered(&self, file_text: &str) -> bool {
        self.state().considered.as_deref() == Some(file_text)
    }

    /// Records a config that could not be read.
    pub(super) fn record_unreadable(&self, trigger: Trigger, error: &PushError) {
        self.journal.refused(trigger, &self.who(trigger), &self.current_digest(), error);
    }

    fn who(&self, trigger: Trigger) -> String {
        format!("{} of {}", trigger.as_str(), self.file.display())
    }

    /// The contents of the config file, or if it cannot be read, those that were considered last.
    pub(super) fn file_text(&self) -> String {
        read_file(&self.file).ok().or_else(|| self.state().considered.clone()).unwrap_or_default()
    }

    /// Runs a push and records it. The caller holds the push lock.
    async fn take_turn(self: &Arc<Self>, wish: Wish, expected: Option<&str>) -> Result<PushResult, PushError> {
        let digest_before = self.current_digest();
        self.journal.begin(wish.trigger, &wish.who, &digest_before);
        let result = match check_expected_digest(expected, &digest_before) {
            Ok(()) => self.run_push(wish).await,
            Err(conflict) => Err(conflict),
        };
        let report = self.journal.end(&result);
        self.push_result(result?, report, None)
    }

    fn refuse_busy(&self, who: &str) -> PushError {
        let started_by = match self.journal.running() {
            Some(running) => format!(", started by {} {:.1} s ago", running.who, running.took.as_secs_f64()),
            None => String::new(),
        };
        let error = PushError::Busy(started_by);
        self.journal.refused(Trigger::Push, who, &self.current_digest(), &error);
        error
    }
}

impl Wish {
    fn from_disk(found: Desired, trigger: Trigger, who: String, n_swaps: u64) -> Self {
        let (text, file_text) = (found.text.clone(), found.file_text.clone());
        // A pushed config that is overridden is removed, except at a start, which writes nothing.
        let is_saved = found.overridden.is_none() || trigger == Trigger::Start;
        Wish { text, trigger, who, is_dry_run: false, n_swaps, file_text, saved: is_saved.then_some(found) }
    }

    /// Asks for `text` in place of what was read.
    fn put(&mut self, text: String) {
        if self.saved.as_ref().is_some_and(|saved| saved.text != text) {
            self.saved = None;
        }
        self.text = text;
    }
}
