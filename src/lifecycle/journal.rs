//! What pushes did, step by step, for `GetStatus`, the log and the metrics: the one under way and the last ones.

use super::PushError;
use crate::telemetry::events;
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// What made somebody wish for a config.
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
    /// As status, log and documents call it.
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

/// What a push does, in this order; for several models some come several times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The text becomes settings.
    Parse,
    /// They are held to what only a restart can change.
    Validate,
    /// A bundle comes from its store.
    Fetch,
    /// Its files are held to their digests.
    Digests,
    /// ONNX Runtime reads its graphs.
    Graphs,
    /// Its golden vectors are computed again.
    Golden,
    /// Its graphs run at the sizes of real traffic.
    Warm,
    /// The caches are read from a snapshot.
    Restore,
    /// Its caches are filled with what is hot.
    Replay,
    /// The config is put where a restart finds it.
    Persist,
    /// It serves.
    Swap,
    /// Requests that began before it end.
    Drain,
}

impl Step {
    /// As status, metrics and documents call it.
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

/// How a push ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is in force.
    Applied,
    /// It was in force already.
    Unchanged,
    /// It could be in force: a dry run.
    Checked,
    /// The config before is in force again.
    RolledBack,
}

impl Outcome {
    /// As status, metrics and documents call it.
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

/// One step of a push.
#[derive(Debug, Clone)]
pub struct StepReport {
    /// Which.
    pub step: Step,
    /// The model that it is about; empty where it is about all.
    pub subject: String,
    /// How long it took, or has taken so far.
    pub took: Duration,
    /// None while it runs.
    pub is_ok: Option<bool>,
}

/// One push.
#[derive(Debug, Clone)]
pub struct Report {
    /// What made somebody wish for it.
    pub trigger: Trigger,
    /// Who.
    pub who: String,
    /// When.
    pub began: SystemTime,
    /// How long it took, or has taken so far.
    pub took: Duration,
    /// The config in force before.
    pub digest_before: String,
    /// The one that was pushed, as far as it could be read.
    pub digest: String,
    /// How it ended; empty while it runs.
    pub result: &'static str,
    /// Why it was refused.
    pub reason: String,
    /// In order.
    pub steps: Vec<StepReport>,
    /// How much of how much of the step under way is done.
    pub progress: (u64, u64),
}

/// So many pushes are remembered.
const MAX_REPORTS: usize = 32;

/// The pushes of this process.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    running: Option<Running>,
    /// Newest first.
    past: VecDeque<Report>,
}

#[derive(Debug)]
struct Running {
    report: Report,
    began: Instant,
    step_began: Instant,
}

impl Running {
    fn end_step(&mut self, is_ok: bool) {
        let took = self.step_began.elapsed();
        if let Some(step) = self.report.steps.last_mut().filter(|step| step.is_ok.is_none()) {
            (step.took, step.is_ok) = (took, Some(is_ok));
            let result = if is_ok { "ok" } else { "failed" };
            events::reload_step_finished(step.step.as_str(), result, took);
        }
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A push begins; whoever calls this has seen to it that no other is under way.
    pub(super) fn begin(&self, trigger: Trigger, who: &str, digest_before: &str) {
        let now = Instant::now();
        self.lock().running =
            Some(Running { report: report(trigger, who, digest_before), began: now, step_began: now });
    }

    /// The step before has ended well, the next one begins.
    pub(super) fn step(&self, step: Step, subject: &str) {
        if let Some(running) = &mut self.lock().running {
            running.end_step(true);
            let subject = subject.to_owned();
            running.report.steps.push(StepReport { step, subject, took: Duration::ZERO, is_ok: None });
            running.report.progress = (0, 0);
            running.step_began = Instant::now();
        }
    }

    /// So much of so much of the step is done.
    pub(super) fn progress(&self, done: u64, total: u64) {
        if let Some(running) = &mut self.lock().running {
            running.report.progress = (done, total);
        }
    }

    /// The pushed config could be read, and is this one.
    pub(super) fn digest(&self, digest: &str) {
        if let Some(running) = &mut self.lock().running {
            digest.clone_into(&mut running.report.digest);
        }
    }

    /// The push under way has ended.
    pub(super) fn end(&self, result: &Result<Outcome, PushError>) -> Report {
        let mut entries = self.lock();
        let Some(mut running) = entries.running.take() else { return report(Trigger::Push, "", "") };
        running.end_step(result.is_ok());
        let mut report = running.report;
        report.took = running.began.elapsed();
        match result {
            Ok(outcome) => report.result = outcome.as_str(),
            Err(error) => (report.result, report.reason) = (REFUSED, error.to_string()),
        }
        entries.add(report)
    }

    /// The config before is in force again.
    pub(super) fn rolled_back(&self, who: &str, (before, digest): (&str, &str), took: Duration) -> Report {
        let (digest, result) = (digest.to_owned(), Outcome::RolledBack.as_str());
        self.lock().add(Report { took, digest, result, ..report(Trigger::Rollback, who, before) })
    }

    /// A wish that was refused as soon as it came.
    pub(super) fn refuse(&self, trigger: Trigger, who: &str, before: &str, error: PushError) -> PushError {
        let reason = error.to_string();
        self.lock().add(Report { result: REFUSED, reason, ..report(trigger, who, before) });
        error
    }

    /// The push under way, as far as it is.
    pub fn running(&self) -> Option<Report> {
        let entries = self.lock();
        let Running { report, began, step_began } = entries.running.as_ref()?;
        let mut report = report.clone();
        report.took = began.elapsed();
        if let Some(step) = report.steps.last_mut().filter(|step| step.is_ok.is_none()) {
            step.took = step_began.elapsed();
        }
        Some(report)
    }

    /// The pushes that have ended, newest first.
    pub fn past(&self) -> Vec<Report> {
        self.lock().past.iter().cloned().collect()
    }
}

impl Entries {
    fn add(&mut self, report: Report) -> Report {
        let Report { trigger, who, digest_before, digest, result, reason, took, .. } = &report;
        let (trigger, took_ms) = (trigger.as_str(), took.as_millis() as u64);
        events::reload_finished(result);
        if *result == REFUSED {
            let step = report.steps.last().map_or("", |step| step.step.as_str());
            tracing::warn!(trigger, who, digest_before, digest, step, reason, took_ms, "push refused");
        } else {
            tracing::info!(trigger, who, digest_before, digest, result, took_ms, "push ended");
        }
        self.past.push_front(report.clone());
        self.past.truncate(MAX_REPORTS);
        report
    }
}

fn report(trigger: Trigger, who: &str, digest_before: &str) -> Report {
    Report {
        trigger,
        who: who.to_owned(),
        began: SystemTime::now(),
        took: Duration::ZERO,
        digest_before: digest_before.to_owned(),
        digest: String::new(),
        result: "",
        reason: String::new(),
        steps: Vec::new(),
        progress: (0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_push_is_told_step_by_step_and_remembered() {
        let journal = Journal::default();
        journal.begin(Trigger::Push, "ann", "before");
        journal.step(Step::Parse, "");
        journal.digest("after");
        journal.step(Step::Graphs, "learn");
        journal.progress(3, 7);
        let running = journal.running().unwrap();
        let steps: Vec<_> = running.steps.iter().map(|s| (s.step.as_str(), s.subject.as_str(), s.is_ok)).collect();
        assert_eq!(steps, [("parse", "", Some(true)), ("graphs", "learn", None)]);
        assert_eq!((running.progress, running.result), ((3, 7), ""));

        let report = journal.end(&Err(PushError::Draining));
        assert_eq!((report.result, report.reason.as_str()), ("refused", "the server is draining"));
        assert_eq!(report.steps[1].is_ok, Some(false), "the step at which it failed");
        assert!(journal.running().is_none());
        for _ in 0..2 * MAX_REPORTS {
            journal.rolled_back("bob", ("after", "before"), Duration::ZERO);
        }
        let past = journal.past();
        assert_eq!((past.len(), past[0].result, past[0].who.as_str()), (MAX_REPORTS, "rolled_back", "bob"));
    }
}
