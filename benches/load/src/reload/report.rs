//! What came out, as tables for people or as JSON lines for machines.

use super::{
    Phase,
    load::Span,
    pushes::{N_GROWING, Pushed},
};
use crate::cli::{bench::Args, client::table};
use serde_json::{Value, json};

const MB: f64 = 1e6;

/// Milliseconds of some requests.
struct Latencies {
    n: usize,
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl Latencies {
    fn of<'a>(answered: impl Iterator<Item = &'a Span>) -> Self {
        let mut micros: Vec<u64> = answered.map(|span| span.took().as_micros() as u64).collect();
        micros.sort_unstable();
        let at = |quantile: f64| {
            let place = (quantile * micros.len() as f64).ceil() as usize;
            micros.get(place.saturating_sub(1)).map(|micros| *micros as f64 / 1e3)
        };
        Latencies { n: micros.len(), p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// The median and the largest of some milliseconds.
struct Times {
    median: Option<f64>,
    max: Option<f64>,
}

impl Times {
    fn of(ms: impl Iterator<Item = f64>) -> Self {
        let mut ms: Vec<f64> = ms.collect();
        ms.sort_by(f64::total_cmp);
        Times { median: ms.get(ms.len() / 2).copied(), max: ms.last().copied() }
    }

    fn to_json(&self) -> Value {
        json!({"median": self.median, "max": self.max})
    }
}

/// The pushes beside the load, worked out.
struct Summary<'a> {
    args: &'a Args,
    before: &'a Phase,
    reload: &'a Phase,
    pushed: &'a Pushed,
    alone: Latencies,
    during: Latencies,
    between: Latencies,
    push: Times,
    rollback: Times,
    steps: Vec<(&'a str, Times)>,
}

pub(super) fn print(args: &Args, before: &Phase, reload: &Phase, pushed: &Pushed) {
    let is_during = |span: &&Span| pushed.windows.iter().any(|window| window.overlaps(**span));
    let answered = &reload.outcome.answered;
    let whole = |ms: &[u64]| Times::of(ms.iter().map(|ms| *ms as f64));
    let summary = Summary {
        args,
        before,
        reload,
        pushed,
        alone: Latencies::of(before.outcome.answered.iter()),
        during: Latencies::of(answered.iter().filter(is_during)),
        between: Latencies::of(answered.iter().filter(|span| !is_during(span))),
        push: whole(&pushed.push_ms),
        rollback: Times::of(pushed.rollbacks.iter().map(|took| took.as_secs_f64() * 1e3)),
        steps: pushed.steps.iter().map(|(step, ms)| (step.as_str(), whole(ms))).collect(),
    };
    if args.json {
        println!("{}", summary.before_json());
        println!("{}", summary.reload_json());
    } else {
        summary.print();
    }
}

impl Phase {
    fn cpu_ms(&self) -> f64 {
        let [first, last] = &self.scrapes;
        (last.cpu_seconds - first.cpu_seconds) * 1e3 / self.outcome.n_sent().max(1) as f64
    }

    fn user_hit_rate(&self) -> Option<f64> {
        self.scrapes[1].hit_rates_since(&self.scrapes[0]).user
    }

    /// What both lines of JSON start with.
    fn json(&self, args: &Args, name: &str) -> Value {
        json!({
            "scenario": args.scenario.name(),
            "phase": name,
            "history": args.history,
            "candidates": args.candidates,
            "rate": args.rate,
            "sent": self.outcome.n_sent(),
            "seconds": self.took.as_secs_f64(),
            "failed": self.outcome.n_failed,
            "mixed": self.outcome.n_mixed,
            "not_ok_rows": self.outcome.n_rows_not_ok,
            "server_cpu_ms": self.cpu_ms(),
            "user_hit_rate": self.user_hit_rate(),
        })
    }
}

impl Summary<'_> {
    fn ratio_p99(&self) -> Option<f64> {
        Some(self.during.p99? / self.alone.p99?)
    }

    fn rss_ratio(&self) -> Option<f64> {
        Some(self.pushed.resident_end / self.pushed.resident_grown?)
    }

    fn n_encoded(&self) -> f64 {
        self.reload.scrapes[1].n_encoded - self.reload.scrapes[0].n_encoded
    }
}

/// `first` with the fields of `more`.
fn joined(mut first: Value, more: Value) -> Value {
    if let (Value::Object(first), Value::Object(more)) = (&mut first, more) {
        first.extend(more);
    }
    first
}

impl Summary<'_> {
    fn before_json(&self) -> Value {
        let Latencies { p50, p99, max, .. } = self.alone;
        joined(self.before.json(self.args, "before"), json!({"p50_ms": p50, "p99_ms": p99, "max_ms": max}))
    }

    fn reload_json(&self) -> Value {
        let item = self.reload.scrapes[1].item.since(self.reload.scrapes[0].item);
        let steps: serde_json::Map<String, Value> =
            self.steps.iter().map(|(step, times)| ((*step).to_owned(), times.to_json())).collect();
        let more = json!({
            "reloads": self.pushed.push_ms.len(),
            "rollbacks": self.pushed.rollbacks.len(),
            "before_p50_ms": self.alone.p50,
            "before_p99_ms": self.alone.p99,
            "during_requests": self.during.n,
            "during_p50_ms": self.during.p50,
            "during_p99_ms": self.during.p99,
            "during_max_ms": self.during.max,
            "between_requests": self.between.n,
            "between_p50_ms": self.between.p50,
            "between_p99_ms": self.between.p99,
            "between_max_ms": self.between.max,
            "p99_ratio": self.ratio_p99(),
            "rss_20_mb": self.pushed.resident_grown.map(|bytes| bytes / MB),
            "rss_end_mb": self.pushed.resident_end / MB,
            "rss_ratio": self.rss_ratio(),
            "encoded": self.n_encoded(),
            "item_hits": item.n_hits,
            "item_misses": item.n - item.n_hits,
            "push_ms": self.push.to_json(),
            "rollback_ms": self.rollback.to_json(),
            "steps": steps,
        });
        joined(self.reload.json(self.args, "reload"), more)
    }

    fn print(&self) {
        let Args { history, candidates, .. } = self.args;
        let pace = match self.args.rate {
            Some(rate) => format!("{rate} a second"),
            None => format!("{} at once", self.args.concurrency),
        };
        println!(
            "{}: {} pushes and {} rollbacks beside requests of {history} history items and {candidates} candidates, {pace}",
            self.args.scenario.name(),
            self.pushed.push_ms.len(),
            self.pushed.rollbacks.len(),
        );
        self.print_requests();
        self.print_latencies();
        self.print_pushes();
        self.print_server();
    }

    fn print_requests(&self) {
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
                phase.user_hit_rate().map_or("-".to_owned(), |rate| format!("{:.1} %", rate * 1e2)),
            ]);
        }
        println!("{shown}");
    }

    fn print_latencies(&self) {
        let mut shown = table(&["requests", "answered", "p50 ms", "p99 ms", "max ms"]);
        let rows = [("before", &self.alone), ("during a push", &self.during), ("between pushes", &self.between)];
        for (name, of) in rows {
            shown.add_row([name.to_owned(), of.n.to_string(), decimals(of.p50), decimals(of.p99), decimals(of.max)]);
        }
        println!("{shown}\np99 during a push / before: {}", decimals(self.ratio_p99()));
    }

    fn print_pushes(&self) {
        let mut shown = table(&["what", "median ms", "max ms"]);
        let mut row = |name: &str, of: &Times| {
            shown.add_row([name.to_owned(), decimals(of.median), decimals(of.max)]);
        };
        row("push", &self.push);
        self.steps.iter().for_each(|(step, times)| row(&format!("  {step}"), times));
        row("rollback", &self.rollback);
        println!("{shown}");
    }

    fn print_server(&self) {
        let item = self.reload.scrapes[1].item.since(self.reload.scrapes[0].item);
        let grown = self.pushed.resident_grown.map_or("-".to_owned(), |bytes| format!("{:.0} MB", bytes / MB));
        println!(
            "server RSS after push {N_GROWING}: {grown}, after the last: {:.0} MB, ratio {}",
            self.pushed.resident_end / MB,
            decimals(self.rss_ratio()),
        );
        println!(
            "items encoded meanwhile: {}, item cache hits {}, misses {}",
            self.n_encoded(),
            item.n_hits,
            item.n - item.n_hits,
        );
    }
}

fn decimals(number: Option<f64>) -> String {
    number.map_or("-".to_owned(), |number| format!("{number:.2}"))
}
