//! The admin listener's answers as text for people: digests are cut short, and only the last pushes are shown.

use crate::cli::terminal::table;
use humantime::format_rfc3339_seconds;
use indicatif::HumanBytes;
use midemb_client::proto::{
    CacheStatus, ConfigInfo, GetStatusResponse, ModelInfo, ModelRef, PushConfigResponse, PushReport, PushStep,
    RollbackResponse,
};
use std::{
    fmt::Write,
    time::{Duration, UNIX_EPOCH},
};

/// Characters of a digest in tables.
pub(super) const N_SHORT_CHARS: usize = 12;
const MAX_PUSHES: usize = 8;

/// The whole status, block by block; an empty block is left out.
pub(super) fn status(status: &GetStatusResponse) -> String {
    let readiness = if status.ready { "ready" } else { "not ready" };
    let mut blocks = vec![format!("{readiness}, up {} s{}", status.uptime_seconds, in_force(&status.config))];
    blocks.push(models(&status.models));
    blocks.push(caches(&status.caches));
    if let Some(previous) = &status.previous {
        blocks.push(format!("rollback to: {} (models {})", short(&previous.digest), names(&previous.models)));
    }
    if let Some(push) = &status.push {
        blocks.push(under_way(push));
    }
    if !status.pushes.is_empty() {
        blocks.push(pushes(&status.pushes));
    }
    blocks.join("\n") + "\n"
}

fn in_force(config: &Option<ConfigInfo>) -> String {
    let Some(config) = config else { return String::new() };
    let pushed = match config.pushed_file.as_str() {
        "" => String::new(),
        file => format!(" (pushed: {file})"),
    };
    format!(", config {} of {}{pushed}", short(&config.digest), config.file)
}

fn models(models: &[ModelInfo]) -> String {
    let mut rows = table(&["model", "version", "share", "provider", "digest"]);
    for model in models {
        let reference = model.model.clone().unwrap_or_default();
        let share = match model.shadow_of.as_str() {
            "" => format!("{} %", model.share),
            primary => format!("shadow of {primary}, {} %", model.shadow_percent),
        };
        rows.add_row([&reference.name, &reference.version, &share, &model.provider, short(&reference.digest)]);
    }
    rows.to_string()
}

fn caches(caches: &[CacheStatus]) -> String {
    let mut rows = table(&["cache", "entries", "size", "bound"]);
    for cache in caches {
        let [size, bound] = [cache.bytes, cache.max_bytes].map(|n| HumanBytes(n).to_string());
        rows.add_row([&cache.cache, &cache.entries.to_string(), &size, &bound]);
    }
    rows.to_string()
}

fn under_way(push: &PushReport) -> String {
    let count = if push.total == 0 { String::new() } else { format!(", {}/{}", push.done, push.total) };
    let since = format!("{}, {} so far", utc(push.began_unix_ms), duration(push.took_ms));
    format!("under way: {} since {since}: {}{count}", trigger(push), step_under_way(push))
}

/// What triggered a push, and who.
fn trigger(push: &PushReport) -> String {
    if push.who.is_empty() { push.trigger.clone() } else { format!("{} by {}", push.trigger, push.who) }
}

/// The step under way and its subject.
pub(super) fn step_under_way(push: &PushReport) -> String {
    let step = push.steps.last().map(|step| format!("{} {}", step.step, step.subject));
    step.as_deref().map_or("begins", str::trim_end).to_owned()
}

fn pushes(pushes: &[PushReport]) -> String {
    let mut rows = table(&["when (UTC)", "trigger", "who", "result", "took", "config", "reason"]);
    for push in pushes.iter().take(MAX_PUSHES) {
        rows.add_row([
            &utc(push.began_unix_ms),
            &push.trigger,
            &push.who,
            &push.result,
            &duration(push.took_ms),
            &change(push),
            &folded(&push.reason),
        ]);
    }
    rows.to_string()
}

/// What a push did, its steps, and which config a restart would take.
pub(super) fn pushed(answer: &PushConfigResponse) -> String {
    let report = answer.report.clone().unwrap_or_default();
    let mut text = format!("{} in {}: config {}\n", answer.result, duration(report.took_ms), change(&report));
    if !report.steps.is_empty() {
        let _ = writeln!(text, "{}", steps(&report.steps));
    }
    text += &match (answer.result.as_str(), &answer.config) {
        ("checked", _) => "a dry run: nothing was put in force\n".to_owned(),
        (_, Some(config)) => at_a_restart(config),
        (_, None) => String::new(),
    };
    text
}

/// Which config a restart would take.
fn at_a_restart(config: &ConfigInfo) -> String {
    let ConfigInfo { file, pushed_file, .. } = config;
    match pushed_file.as_str() {
        "" => format!("a restart takes {file}\n"),
        _ => format!("kept in {pushed_file}, which wins over {file} at a restart\n"),
    }
}

fn steps(steps: &[PushStep]) -> String {
    let mut rows = table(&["step", "subject", "took", "result"]);
    for step in steps {
        let result = if step.result.is_empty() { "under way" } else { step.result.as_str() };
        rows.add_row([&step.step, &step.subject, &duration(step.took_ms), result]);
    }
    rows.to_string()
}

/// The config and the models in force after a rollback.
pub(super) fn rolled_back(answer: &RollbackResponse) -> String {
    let config = answer.config.clone().unwrap_or_default();
    let took = answer.report.as_ref().map_or(String::new(), |report| format!(" in {} ms", report.took_ms));
    let mut text = format!("rolled back{took}: config {} (models {})\n", short(&config.digest), names(&config.models));
    if answer.warning.is_empty() {
        text += &at_a_restart(&config);
    } else {
        let _ = writeln!(text, "warning: {}", answer.warning);
    }
    text
}

fn names(models: &[ModelRef]) -> String {
    models.iter().map(|model| format!("{} {}", model.name, model.version)).collect::<Vec<_>>().join(", ")
}

fn change(push: &PushReport) -> String {
    match [push.digest_before.as_str(), push.digest.as_str()].map(short) {
        ["", only] | [only, ""] => only.to_owned(),
        [before, after] => format!("{before} → {after}"),
    }
}

fn short(digest: &str) -> &str {
    digest.get(..N_SHORT_CHARS).unwrap_or(digest)
}

fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{:.1} s", ms as f64 / 1e3),
        _ => format!("{} min {} s", ms / 60_000, ms / 1_000 % 60),
    }
}

/// Lines of at most 60 characters, so that a table with a long reason still fits a terminal.
fn folded(reason: &str) -> String {
    const MAX_CHARS: usize = 60;
    let (mut text, mut n_chars) = (String::new(), 0);
    for word in reason.split_whitespace() {
        let n = word.chars().count();
        if n_chars > 0 {
            let is_full = n_chars + 1 + n > MAX_CHARS;
            text.push(if is_full { '\n' } else { ' ' });
            n_chars = if is_full { 0 } else { n_chars + 1 };
        }
        text += word;
        n_chars += n;
    }
    text
}

/// As in `2026-01-31 12:34:56`.
fn utc(unix_ms: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_millis(unix_ms)).unwrap_or(UNIX_EPOCH);
    format_rfc3339_seconds(time).to_string().replace('T', " ").replace('Z', "")
}

#[cfg(test)]
mod tests;
