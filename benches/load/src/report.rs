//! The phases of a scenario as a table for people or as JSON lines for machines.

use crate::{
    args::{Args, Scenario},
    scenarios::{Phase, Unit},
    scrape::HitRates,
    terminal::{decimals, percent, table},
};
use serde::Serialize;
use std::fmt::Write;

/// What is printed: JSON lines with `--json`, a headline and a table otherwise.
pub(crate) fn text(args: &Args, phases: &[Phase]) -> anyhow::Result<String> {
    let mut text = String::new();
    if args.json {
        for phase in phases {
            writeln!(text, "{}", serde_json::to_string(&PhaseJson::new(args, phase))?)?;
        }
    } else {
        writeln!(text, "{}", headline(args))?;
        writeln!(text, "{}", figures(args, phases))?;
    }
    Ok(text)
}

fn figures(args: &Args, phases: &[Phase]) -> String {
    let unit = phases.first().map_or(Unit::Request, |phase| phase.unit).name();
    let (rate, cpu) = (format!("good {unit}s/s"), format!("server CPU ms/{unit}"));
    let mut headings = vec!["phase", &rate, "shed", "late", &cpu, "p50 ms", "p99 ms", "max ms", "server RSS MB"];
    let has_cold_rows = matches!(args.scenario, Scenario::W3Zipf | Scenario::W6ColdPage);
    if has_cold_rows {
        headings.extend(["rows OK", "item hits", "content hits", "user hits"]);
    }
    let mut figures = table(&headings);
    for phase in phases {
        let part_of_sent = |n: Option<u64>| percent(n.map(|n| n as f64 / phase.n_units as f64));
        let mut row = vec![
            phase.name.to_owned(),
            format!("{:.0}", phase.goodput()),
            part_of_sent(phase.answers.as_ref().map(|answers| answers.n_shed)),
            part_of_sent(phase.answers.as_ref().map(|answers| answers.n_late)),
            format!("{:.3}", phase.cpu_ms()),
            decimals(phase.latency_ms(0.5)),
            decimals(phase.latency_ms(0.99)),
            decimals(phase.latency_ms(1.0)),
            format!("{:.0}", phase.cost.resident_bytes / 1e6),
        ];
        if has_cold_rows {
            let HitRates { item, content, user } = phase.cost.hit_rates;
            row.extend([phase.rows_ok(), item, content, user].map(percent));
        }
        figures.add_row(row);
    }
    figures.to_string()
}

fn headline(args: &Args) -> String {
    let scenario = args.scenario.name();
    let texts = match args.scenario {
        Scenario::W2Cold => return format!("{scenario}: {} items that the server has never seen", args.items),
        Scenario::W6ColdPage => {
            return format!("{scenario}: pages of {} candidates that the server has never seen", args.candidates);
        }
        Scenario::W3Zipf => "with text, by popularity or trace",
        _ if args.send_text => "with text",
        _ => "ids alone",
    };
    let pace = match (args.scenario, args.rate) {
        (Scenario::W5Overload, _) => String::new(),
        (_, Some(rate)) => format!(", {rate} per second"),
        (_, None) => format!(", {} at once", args.concurrency),
    };
    format!(
        "{scenario}: {} requests of {} history items and {} candidates{pace}, {texts}",
        args.requests, args.history, args.candidates
    )
}

/// One JSON line.
#[derive(Serialize)]
struct PhaseJson<'a> {
    scenario: &'a str,
    phase: &'a str,
    unit: &'a str,
    sent: u64,
    history: usize,
    candidates: usize,
    pages: u64,
    send_text: bool,
    seconds: f64,
    good_per_second: f64,
    shed: Option<u64>,
    late: Option<u64>,
    server_cpu_ms: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    rows_ok: Option<f64>,
    hit_rates: HitRates,
    server_rss_bytes: f64,
}

impl<'a> PhaseJson<'a> {
    fn new(args: &Args, phase: &'a Phase) -> Self {
        PhaseJson {
            scenario: args.scenario.name(),
            phase: phase.name,
            unit: phase.unit.name(),
            sent: phase.n_units,
            history: args.history,
            candidates: args.candidates,
            pages: args.pages,
            send_text: args.send_text,
            seconds: phase.cost.took.as_secs_f64(),
            good_per_second: phase.goodput(),
            shed: phase.answers.as_ref().map(|answers| answers.n_shed),
            late: phase.answers.as_ref().map(|answers| answers.n_late),
            server_cpu_ms: phase.cpu_ms(),
            p50_ms: phase.latency_ms(0.5),
            p99_ms: phase.latency_ms(0.99),
            max_ms: phase.latency_ms(1.0),
            rows_ok: phase.rows_ok(),
            hit_rates: phase.cost.hit_rates,
            server_rss_bytes: phase.cost.resident_bytes,
        }
    }
}
