//! The figures, as tables for people or as JSON lines for machines.

use super::{
    load::Span,
    phase::Phase,
    pushes::{N_FIRST_PUSHES, Pushed},
};
use crate::{
    args::Args,
    scrape::Lookups,
    terminal::{decimals, percent, table},
};
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt::{self, Write},
};

const MB: f64 = 1e6;

/// What is printed: two JSON lines with `--json`, tables otherwise.
pub(super) fn text(args: &Args, before: &Phase, reload: &Phase, pushed: &Pushed) -> anyhow::Result<String> {
    let summary = Summary::new(args, before, reload, pushed);
    let mut text = String::new();
    if args.json {
        writeln!(text, "{}", serde_json::to_string(&summary.before_json())?)?;
        writeln!(text, "{}", serde_json::to_string(&summary.reload_json())?)?;
    } else {
        summary.write(&mut text)?;
    }
    Ok(text)
}

/// Milliseconds of some requests.
struct Latencies {
    n: usize,
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl Latencies {
    fn new<'a>(answered: impl Iterator<Item = &'a Span>) -> Self {
        let mut micros: Vec<u64> = answered.map(|span| span.took().as_micros() as u64).collect();
        micros.sort_unstable();
        let at = |quantile: f64| {
            let rank = (quantile * micros.len() as f64).ceil() as usize;
            micros.get(rank.saturating_sub(1)).map(|micros| *micros as f64 / 1e3)
        };
        Latencies { n: micros.len(), p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// The median and the largest of some milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Times {
    median: Option<f64>,
    max: Option<f64>,
}

impl Times {
    fn new(ms: impl Iterator<Item = f64>) -> Self {
        let mut ms: Vec<f64> = ms.collect();
        ms.sort_by(f64::total_cmp);
        Times { median: ms.get(ms.len() / 2).copied(), max: ms.last().copied() }
    }

    fn of_whole_ms(ms: &[u64]) -> Self {
        Times::new(ms.iter().map(|ms| *ms as f64))
    }
}

/// The pushes and the load beside them.
struct Summary<'a> {
    args: &'a Args,
    before: &'a Phase,
    reload: &'a Phase,
    pushed: &'a Pushed,
    /// Requests before the first push.
    alone: Latencies,
    /// Requests that overlap a push or a rollback.
    during: Latencies,
    /// Requests of the same phase that do not.
    between: Latencies,
    push: Times,
    rollback: Times,
}

impl<'a> Summary<'a> {
    fn new(args: &'a Args, before: &'a Phase, reload: &'a Phase, pushed: &'a Pushed) -> Self {
        let is_during = |span: &&Span| pushed.windows.iter().any(|window| window.overlaps(**span));
        let answered = &reload.outcome.answered;
        Summary {
            args,
            before,
            reload,
            pushed,
            alone: Latencies::new(before.outcome.answered.iter()),
            during: Latencies::new(answered.iter().filter(is_during)),
            between: Latencies::new(answered.iter().filter(|span| !is_during(span))),
            push: Times::of_whole_ms(&pushed.push_ms),
            rollback: Times::new(pushed.rollbacks.iter().map(|took| took.as_secs_f64() * 1e3)),
        }
    }

    fn p99_ratio(&self) -> Option<f64> {
        Some(self.during.p99? / self.alone.p99?)
    }

    fn rss_ratio(&self) -> Option<f64> {
        Some(self.pushed.resident_at_end / self.pushed.resident_after_first?)
    }

    fn item_lookups(&self) -> Lookups {
        self.reload.scrape_after.item.since(self.reload.scrape_before.item)
    }
}

/// The part that both JSON lines have.
#[derive(Serialize)]
struct PhaseJson {
    scenario: &'static str,
    phase: &'static str,
    history: usize,
    candidates: usize,
    rate: Option<f64>,
    sent: u64,
    seconds: f64,
    failed: u64,
    mixed: u64,
    not_ok_rows: u64,
    server_cpu_ms: f64,
    user_hit_rate: Option<f64>,
}

impl PhaseJson {
    fn new(args: &Args, name: &'static str, phase: &Phase) -> Self {
        PhaseJson {
            scenario: args.scenario.name(),
            phase: name,
            history: args.history,
            candidates: args.candidates,
            rate: args.rate,
            sent: phase.outcome.n_sent(),
            seconds: phase.took.as_secs_f64(),
            failed: phase.outcome.n_failed,
            mixed: phase.outcome.n_mixed,
            not_ok_rows: phase.outcome.n_rows_not_ok,
            server_cpu_ms: phase.cpu_ms(),
            user_hit_rate: phase.user_hit_rate(),
        }
    }
}

/// The JSON line of the requests before the first push.
#[derive(Serialize)]
struct BeforeJson {
    #[serde(flatten)]
    phase: PhaseJson,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
}

/// The JSON line of the pushes.
#[derive(Serialize)]
struct ReloadJson<'a> {
    #[serde(flatten)]
    phase: PhaseJson,
    reloads: usize,
    rollbacks: usize,
    before_p50_ms: Option<f64>,
    before_p99_ms: Option<f64>,
    during_requests: usize,
    during_p50_ms: Option<f64>,
    during_p99_ms: Option<f64>,
    during_max_ms: Option<f64>,
    between_requests: usize,
    between_p50_ms: Option<f64>,
    between_p99_ms: Option<f64>,
    between_max_ms: Option<f64>,
    p99_ratio: Option<f64>,
    rss_20_mb: Option<f64>,
    rss_end_mb: f64,
    rss_ratio: Option<f64>,
    encoded: f64,
    item_hits: f64,
    item_misses: f64,
    push_ms: Times,
    rollback_ms: Times,
    steps: BTreeMap<&'a str, Times>,
}

impl<'a> Summary<'a> {
    fn before_json(&self) -> BeforeJson {
        BeforeJson {
            phase: PhaseJson::new(self.args, "before", self.before),
            p50_ms: self.alone.p50,
            p99_ms: self.alone.p99,
            max_ms: self.alone.max,
        }
    }

    fn reload_json(&self) -> ReloadJson<'a> {
        let item = self.item_lookups();
        let steps = self.pushed.steps.iter();
        ReloadJson {
            phase: PhaseJson::new(self.args, "reload", self.reload),
            reloads: self.pushed.push_ms.len(),
            rollbacks: self.pushed.rollbacks.len(),
            before_p50_ms: self.alone.p50,
            before_p99_ms: self.alone.p99,
            during_requests: self.during.n,
            during_p50_ms: self.during.p50,
            during_p99_ms: self.during.p99,
            during_max_ms: self.during.max,
            between_requests: self.between.n,
            between_p50_ms: self.between.p50,
            between_p99_ms: self.between.p99,
            between_max_ms: self.between.max,
            p99_ratio: self.p99_ratio(),
            rss_20_mb: self.pushed.resident_after_first.map(|bytes| bytes / MB),
            rss_end_mb: self.pushed.resident_at_end / MB,
            rss_ratio: self.rss_ratio(),
            encoded: self.reload.n_encoded(),
            item_hits: item.n_hits,
            item_misses: item.n - item.n_hits,
            push_ms: self.push,
            rollback_ms: self.rollback,
            steps: steps.map(|step| (step.name.as_str(), Times::of_whole_ms(&step.took_ms))).collect(),
        }
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        let Args { history, candidates, .. } = self.args;
        let pace = match self.args.rate {
            Some(rate) => format!("{rate} per second"),
            None => format!("{} at once", self.args.concurrency),
        };
        writeln!(
            text,
            "{}: {} pushes and {} rollbacks beside requests of {history} history items and {candidates} candidates, {pace}",
            self.args.scenario.name(),
            self.pushed.push_ms.len(),
            self.pushed.rollbacks.len(),
        )?;
        self.write_requests(text)?;
        self.write_latencies(text)?;
        self.write_pushes(text)?;
        self.write_server(text)
    }

    fn write_requests(&self, text: &mut String) -> fmt::Result {
        let mut shown =
            table(&["phase", "sent", "failed", "mixed", "rows not OK", "server CPU ms/request", "user hits"]);
        for (name, phase) in [("before", self.before), ("while pushing", self.reload)] {
            let outcome = &phase.outcome;
            shown.add_row([
                name.to_owned(),
                outcome.n_sent().to_string(),
                outcome.n_failed.to_string(),
                outcome.n_mixed.to_string(),
                outcome.n_rows_not_ok.to_string(),
                format!("{:.3}", phase.cpu_ms()),
                percent(phase.user_hit_rate()),
            ]);
        }
        writeln!(text, "{shown}")
    }

    fn write_latencies(&self, text: &mut String) -> fmt::Result {
        let mut shown = table(&["requests", "answered", "p50 ms", "p99 ms", "max ms"]);
        let rows = [("before", &self.alone), ("during a push", &self.during), ("between pushes", &self.between)];
        for (name, latencies) in rows {
            let Latencies { n, p50, p99, max } = latencies;
            shown.add_row([name.to_owned(), n.to_string(), decimals(*p50), decimals(*p99), decimals(*max)]);
        }
        writeln!(text, "{shown}\np99 during a push / before: {}", decimals(self.p99_ratio()))
    }

    fn write_pushes(&self, text: &mut String) -> fmt::Result {
        let mut shown = table(&["what", "median ms", "max ms"]);
        let mut add_row = |name: &str, times: Times| {
            shown.add_row([name.to_owned(), decimals(times.median), decimals(times.max)]);
        };
        add_row("push", self.push);
        for step in &self.pushed.steps {
            add_row(&format!("  {}", step.name), Times::of_whole_ms(&step.took_ms));
        }
        add_row("rollback", self.rollback);
        writeln!(text, "{shown}")
    }

    fn write_server(&self, text: &mut String) -> fmt::Result {
        let item = self.item_lookups();
        let after_first =
            self.pushed.resident_after_first.map_or("-".to_owned(), |bytes| format!("{:.0} MB", bytes / MB));
        writeln!(
            text,
            "server RSS after push {N_FIRST_PUSHES}: {after_first}, after the last: {:.0} MB, ratio {}",
            self.pushed.resident_at_end / MB,
            decimals(self.rss_ratio()),
        )?;
        writeln!(
            text,
            "items encoded meanwhile: {}, item cache hits {}, misses {}",
            self.reload.n_encoded(),
            item.n_hits,
            item.n - item.n_hits,
        )
    }
}
