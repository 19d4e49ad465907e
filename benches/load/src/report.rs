//! Phases as a table for people or as JSON lines for machines.

use super::{Args, Scenario, scenarios::Phase, scrape::HitRates};
use crate::cli::client::table;
use serde_json::json;

pub(super) fn print(args: &Args, phases: &[Phase]) {
    if args.json {
        return phases.iter().for_each(|phase| println!("{}", to_json(args, phase)));
    }
    println!("{}", headline(args));
    let unit = phases.first().map_or("request", |phase| phase.unit);
    let (rate, cpu) = (format!("good {unit}s/s"), format!("server CPU ms/{unit}"));
    let mut header = vec!["phase", &rate, "shed", "late", &cpu, "p50 ms", "p99 ms", "max ms", "server RSS MB"];
    let has_cold_rows = matches!(args.scenario, Scenario::W3Zipf | Scenario::W6ColdPage);
    if has_cold_rows {
        header.extend(["rows OK", "item hits", "content hits", "user hits"]);
    }
    let mut figures = table(&header);
    for phase in phases {
        let part =
            |n: Option<u64>| n.map_or("-".to_owned(), |n| format!("{:.1} %", n as f64 * 1e2 / phase.n_units as f64));
        let ms = |quantile| phase.latency_ms(quantile).map_or("-".to_owned(), |ms| format!("{ms:.2}"));
        let mut row = vec![
            phase.name.to_owned(),
            format!("{:.0}", phase.goodput()),
            part(phase.answers.as_ref().map(|answers| answers.n_shed)),
            part(phase.answers.as_ref().map(|answers| answers.n_late)),
            format!("{:.3}", phase.cpu_ms()),
            ms(0.5),
            ms(0.99),
            ms(1.0),
            format!("{:.0}", phase.cost.resident_bytes / 1e6),
        ];
        if has_cold_rows {
            let HitRates { item, content, user } = phase.cost.hit_rates;
            let percent = |part: Option<f64>| part.map_or("-".to_owned(), |part| format!("{:.1} %", part * 1e2));
            row.extend([phase.rows_ok(), item, content, user].map(percent));
        }
        figures.add_row(row);
    }
    println!("{figures}");
}

fn headline(args: &Args) -> String {
    let scenario = args.scenario.name();
    if args.scenario == Scenario::W2Cold {
        return format!("{scenario}: {} items that were never seen", args.items);
    }
    let sent = if args.send_text { "with text" } else { "ids alone" };
    if args.scenario == Scenario::W6ColdPage {
        return format!("{scenario}: pages of {} candidates that were never seen", args.candidates);
    }
    let sent = if args.scenario == Scenario::W3Zipf { "with text, by popularity or trace" } else { sent };
    let pace = match (args.scenario, args.rate) {
        (Scenario::W5Overload, _) => String::new(),
        (_, Some(rate)) => format!(", {rate} a second"),
        (_, None) => format!(", {} at once", args.concurrency),
    };
    format!(
        "{scenario}: {} requests of {} history items and {} candidates{pace}, {sent}",
        args.requests, args.history, args.candidates
    )
}

fn to_json(args: &Args, phase: &Phase) -> serde_json::Value {
    json!({
        "scenario": args.scenario.name(),
        "phase": phase.name,
        "unit": phase.unit,
        "sent": phase.n_units,
        "history": args.history,
        "candidates": args.candidates,
        "pages": args.pages,
        "send_text": args.send_text,
        "seconds": phase.cost.took.as_secs_f64(),
        "good_per_second": phase.goodput(),
        "shed": phase.answers.as_ref().map(|answers| answers.n_shed),
        "late": phase.answers.as_ref().map(|answers| answers.n_late),
        "server_cpu_ms": phase.cpu_ms(),
        "p50_ms": phase.latency_ms(0.5),
        "p99_ms": phase.latency_ms(0.99),
        "max_ms": phase.latency_ms(1.0),
        "rows_ok": phase.rows_ok(),
        "hit_rates": {
            "item": phase.cost.hit_rates.item,
            "content": phase.cost.hit_rates.content,
            "user": phase.cost.hit_rates.user,
        },
        "server_rss_bytes": phase.cost.resident_bytes,
    })
}
