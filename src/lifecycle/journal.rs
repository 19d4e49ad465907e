//! Reports of pushes, step by step, for `GetStatus`, the log and the metrics: of the running push and of the last ones.

use super::PushError;
use crate::{domain::bounded_text::cut, telemetry::events};
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// The cause of a push or a rollback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The server starts.
    Start,
    /// The config file changed.
    File,
    /// SIGHUP.
    Signal,
    /// `AdminService.PushConfig`.
    Push,
    /// `AdminService.Rollback`.
    Rollback,
}

impl Trigger {
    /// The name used in the status, the log and the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Trigger::Start => "start",
            Trigger::File => "file",
            Trigger::Signal => "signal",
            Trigger::Push => "push",
            Trigger::Rollback => "rollback",
        }
    }
}

/// The steps of a push, in order. With several models some steps run several times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The config is parsed into settings.
    Parse,
    /// The settings are compared with those that only a restart can change.
    Validate,
    /// A bundle is fetched from its store.
    Fetch,
    /// The files of a bundle are checked against their digests.
    Digests,
    /// ONNX Runtime loads the graphs of a bundle.
    Graphs,
    /// The golden vectors of a bundle are computed again.
    Golden,
    /// The graphs of a bundle run at the sizes of real traffic.
    Warm,
    /// The caches are restored from a snapshot.
    Restore,
    /// The caches are filled with hot items for a new model.
    Replay,
    /// The config is saved for the next restart.
    Persist,
    /// The new models replace the old ones.
    Swap,
    /// Requests that started before the swap finish.
    Drain,
}

impl Step {
    /// The name used in the status, the metrics and the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Step::Parse => "parse",
            Step::Validate => "validate",
            Step::Fetch => "fetch",
            Step::Digests => "digests",
            Step::Graphs => "graphs",
            Step::Golden => "golden",
            Step::Warm => "warm",
            Step::Restore => "restore",
            Step::Replay => "replay",
            Step::Persist => "persist",
            Step::Swap => "swap",
            Step::Drain => "drain",
        }
    }
}

/// The outcome of a successful push or rollback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The pushed config is in force.
    Applied,
    /// The pushed config was already in force.
    Unchanged,
    /// A dry run found that the config could be put in force.
    Checked,
    /// The previous config is in force again.
    RolledBack,
}

impl Outcome {
    /// The name used in the status, the metrics and the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Unchanged => "unchanged",
            Outcome::Checked => "checked",
            Outcome::RolledBack => "rolled_back",
        }
    }
}

const REFUSED: &str = "refused";

/// The state of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum StepStatus {
    Running,
    Ok,
    Failed,
}

impl StepStatus {
    /// The name used in the status and the metrics; empty while the step runs.
    pub fn as_str(self) -> &'static str {
        match self {
            StepStatus::Running => "",
            StepStatus::Ok => "ok",
            StepStatus::Failed => "failed",
        }
    }
}

/// One step of a push.
#[derive(Debug, Clone)]
pub struct StepReport {
    #[expect(missing_docs, reason = "its type says it all")]
    pub step: Step,
    /// The name of the model that the step works on; empty if it works on the whole config.
    pub subject: String,
    /// The step's duration, or the time since its start while it runs.
    pub took: Duration,
    #[expect(missing_docs, reason = "its type says it all")]
    pub status: StepStatus,
}

/// How much of a step's work is done, in units of that step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it all")]
pub struct Progress {
    pub done: u64,
    pub total: u64,
}

/// One push or rollback.
#[derive(Debug, Clone)]
pub struct Report {
    #[expect(missing_docs, reason = "its type says it all")]
    pub trigger: Trigger,
    /// The operator, or the part of the server that started it.
    pub who: String,
    /// When it started.
    pub began: SystemTime,
    /// Its duration, or the time since its start while it runs.
    pub took: Duration,
    /// The digest of the config in force before it.
    pub digest_before: String,
    /// The digest of the pushed config; empty if it could not be parsed.
    pub digest: String,
    /// The name of its outcome, or "refused"; empty while it runs.
    pub result: &'static str,
    /// Why it was refused; empty otherwise.
    pub reason: String,
    /// Its steps so far, in order.
    pub steps: Vec<StepReport>,
    /// The progress of the running step.
    pub progress: Progress,
}

/// The number of reports that are kept.
const MAX_REPORTS: usize = 32;
/// The most bytes of an operator's name, and of a reason in the log and in a report. All reports together have to fit a gRPC
/// message.
const MAX_WHO_BYTES: usize = 256;
const MAX_LOGGED_BYTES: usize = 8 << 10;
const MAX_REASON_BYTES: usize = 4 << 10;

/// The pushes of this process.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    running: Option<RunningPush>,
    /// Newest first.
    past: VecDeque<Report>,
}

#[derive(Debug)]
struct RunningPush {
    report: Report,
    began: Instant,
    step_began: Instant,
}

impl RunningPush {
    /// Ends the running step, if there is one.
    fn end_step(&mut self, status: StepStatus) {
        let took = self.step_began.elapsed();
        if let Some(step) = self.report.steps.last_mut().filter(|step| step.status == StepStatus::Running) {
            (step.took, step.status) = (took, status);
            events::reload_step_finished(step.step.as_str(), status.as_str(), took);
        }
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the start of a push. The caller ensures that no other push is running.
    pub(super) fn begin(&self, trigger: Trigger, who: &str, digest_before: &str) {
        let now = Instant::now();
        let report = new_report(trigger, who, digest_before);
        self.lock().running = Some(RunningPush { report, began: now, step_began: now });
    }

    /// Records that the running step, if any, has succeeded and that `step` starts.
    pub(super) fn begin_step(&self, step: Step, subject: &str) {
        if let Some(running) = &mut self.lock().running {
            running.end_step(StepStatus::Ok);
            let subject = subject.to_owned();
            running.report.steps.push(StepReport { step, subject, took: Duration::ZERO, status: StepStatus::Running });
            running.report.progress = Progress::default();
            running.step_began = Instant::now();
        }
    }

    /// Records the progress of the running step.
    pub(super) fn set_progress(&self, progress: Progress) {
        if let Some(running) = &mut self.lock().running {
            running.report.progress = progress;
        }
    }

    /// Records the digest of the pushed config, once the config is parsed.
    pub(super) fn set_digest(&self, digest: &str) {
        if let Some(running) = &mut self.lock().running {
            digest.clone_into(&mut running.report.digest);
        }
    }

    /// Records the end of the running push.
    pub(super) fn end(&self, result: &Result<Outcome, PushError>) -> Report {
        let mut entries = self.lock();
        let Some(mut running) = entries.running.take() else { return new_report(Trigger::Push, "", "") };
        running.end_step(if result.is_ok() { StepStatus::Ok } else { StepStatus::Failed });
        let mut report = running.report;
        report.took = running.began.elapsed();
        match result {
            Ok(outcome) => report.result = outcome.as_str(),
            Err(error) => (report.result, report.reason) = (REFUSED, error.to_string()),
        }
        entries.add(report)
    }

    /// Records a rollback from the config `digest_before` to the config `digest`.
    pub(super) fn rolled_back(&self, who: &str, digest_before: &str, digest: &str, took: Duration) -> Report {
        let (digest, result) = (digest.to_owned(), Outcome::RolledBack.as_str());
        self.lock().add(Report { took, digest, result, ..new_report(Trigger::Rollback, who, digest_before) })
    }

    /// Records a push or a rollback that was refused before its first step.
    pub(super) fn refused(&self, trigger: Trigger, who: &str, digest_before: &str, error: &PushError) {
        let reason = error.to_string();
        self.lock().add(Report { result: REFUSED, reason, ..new_report(trigger, who, digest_before) });
    }

    /// The running push.
    pub fn running(&self) -> Option<Report> {
        let entries = self.lock();
        let RunningPush { report, began, step_began } = entries.running.as_ref()?;
        let mut report = report.clone();
        report.took = began.elapsed();
        if let Some(step) = report.steps.last_mut().filter(|step| step.status == StepStatus::Running) {
            step.took = step_began.elapsed();
        }
        Some(report)
    }

    /// The last pushes that have ended, newest first.
    pub fn past(&self) -> Vec<Report> {
        self.lock().past.iter().cloned().collect()
    }
}

impl Entries {
    /// Logs, counts and keeps the report of a push that has ended.
    fn add(&mut self, mut report: Report) -> Report {
        report.reason = cut(&report.reason, MAX_LOGGED_BYTES).into_owned();
        let Report { trigger, who, digest_before, digest, result, reason, took, .. } = &report;
        let (trigger, took_ms) = (trigger.as_str(), took.as_millis() as u64);
        events::reload_finished(result);
        if *result == REFUSED {
            let step = report.steps.last().map_or("", |step| step.step.as_str());
            tracing::warn!(trigger, who, digest_before, digest, step, reason, took_ms, "push refused");
        } else {
            tracing::info!(trigger, who, digest_before, digest, result, took_ms, "push ended");
        }
        report.reason = cut(&report.reason, MAX_REASON_BYTES).into_owned();
        self.past.push_front(report.clone());
        self.past.truncate(MAX_REPORTS);
        report
    }
}

fn new_report(trigger: Trigger, who: &str, digest_before: &str) -> Report {
    Report {
        trigger,
        who: cut(who, MAX_WHO_BYTES).into_owned(),
        began: SystemTime::now(),
        took: Duration::ZERO,
        digest_before: digest_before.to_owned(),
        digest: String::new(),
        result: "",
        reason: String::new(),
        steps: Vec::new(),
        progress: Progress::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_any_length_are_kept_cut() {
        let (journal, long) = (Journal::default(), "x".repeat(1 << 20));
        journal.refused(Trigger::Push, &long, "", &PushError::Failed(long.clone()));
        journal.begin(Trigger::Push, &long, "");
        assert_eq!(journal.running().unwrap().who.len(), MAX_WHO_BYTES);
        let ended = journal.end(&Err(PushError::Failed(long.clone())));
        assert_eq!((ended.who.len(), ended.reason.len()), (MAX_WHO_BYTES, MAX_REASON_BYTES));
        assert_eq!(journal.past()[1].reason, ended.reason);
    }

    #[test]
    fn pushes_are_reported_step_by_step_and_the_last_ones_are_kept() {
        let journal = Journal::default();
        journal.begin(Trigger::Push, "ann", "before");
        journal.begin_step(Step::Parse, "");
        journal.set_digest("after");
        journal.begin_step(Step::Graphs, "learn");
        journal.set_progress(Progress { done: 3, total: 7 });
        let running = journal.running().unwrap();
        let steps: Vec<_> = running.steps.iter().map(|s| (s.step.as_str(), s.subject.as_str(), s.status)).collect();
        assert_eq!(steps, [("parse", "", StepStatus::Ok), ("graphs", "learn", StepStatus::Running)]);
        assert_eq!((running.progress, running.result), (Progress { done: 3, total: 7 }, ""));

        let report = journal.end(&Err(PushError::Draining));
        assert_eq!((report.result, report.reason.as_str()), ("refused", "the server is draining"));
        assert_eq!(report.steps[1].status, StepStatus::Failed);
        assert!(journal.running().is_none());
        for _ in 0..2 * MAX_REPORTS {
            journal.rolled_back("bob", "after", "before", Duration::ZERO);
        }
        let past = journal.past();
        assert_eq!((past.len(), past[0].result, past[0].who.as_str()), (MAX_REPORTS, "rolled_back", "bob"));
    }
}
