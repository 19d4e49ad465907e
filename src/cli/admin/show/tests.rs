//! The printed text, cell by cell.

use super::*;

fn step(step: &str, subject: &str, took_ms: u64, result: &str) -> PushStep {
    PushStep { step: step.to_owned(), subject: subject.to_owned(), took_ms, result: result.to_owned() }
}

fn report() -> PushReport {
    PushReport {
        trigger: "push".to_owned(),
        who: "alice".to_owned(),
        began_unix_ms: 1_769_862_896_000,
        took_ms: 83_400,
        digest_before: "a".repeat(64),
        digest: "b".repeat(64),
        result: "applied".to_owned(),
        steps: vec![step("parse", "", 0, "ok"), step("warm", "learn", 83_400, "ok"), step("swap", "", 3, "")],
        ..Default::default()
    }
}

fn config(pushed_file: &str) -> ConfigInfo {
    let models = vec![ModelRef { name: "learn".to_owned(), version: "3".to_owned(), digest: "c".repeat(64) }];
    let file = "midemb.toml".to_owned();
    ConfigInfo { digest: "b".repeat(64), file, pushed_file: pushed_file.to_owned(), models }
}

/// The cells of a table's rows, without its borders.
fn cells(table: &str) -> Vec<Vec<&str>> {
    let rows = table.lines().filter(|line| line.contains(char::is_alphanumeric));
    rows.map(|row| row.trim_matches('│').split("  ").map(str::trim).filter(|c| !c.is_empty()).collect()).collect()
}

#[test]
fn steps_are_a_table_with_durations() {
    assert_eq!(
        cells(&steps(&report().steps)),
        [
            vec!["step", "subject", "took", "result"],
            vec!["parse", "0 ms", "ok"],
            vec!["warm", "learn", "83.4 s", "ok"],
            vec!["swap", "3 ms", "under way"],
        ]
    );
    assert_eq!(
        [999, 1_000, 119_949, 120_000, 3_725_000].map(duration),
        ["999 ms", "1.0 s", "119.9 s", "2 min 0 s", "62 min 5 s"]
    );
}

#[test]
fn a_push_says_what_changed_and_where_it_is_kept() {
    let answer = |result: &str, pushed_file| {
        let result = result.to_owned();
        pushed(&PushConfigResponse { result, config: Some(config(pushed_file)), report: Some(report()) })
    };
    let applied = answer("applied", "midemb.toml.pushed");
    assert!(applied.starts_with("applied in 83.4 s: config aaaaaaaaaaaa → bbbbbbbbbbbb\n"), "{applied}");
    assert!(applied.ends_with("kept in midemb.toml.pushed, which wins over midemb.toml at a restart\n"), "{applied}");
    assert!(answer("unchanged", "").ends_with("a restart takes midemb.toml\n"));
    assert!(answer("checked", "midemb.toml.pushed").ends_with("nothing was put in force\n"));
}

#[test]
fn a_rollback_says_what_serves_and_warns() {
    let answer = RollbackResponse { config: Some(config("")), report: Some(report()), warning: "the disk".to_owned() };
    assert_eq!(
        rolled_back(&answer),
        "rolled back in 83400 ms: config bbbbbbbbbbbb (models learn 3)\nwarning: the disk\n"
    );
    let kept = rolled_back(&RollbackResponse { warning: String::new(), ..answer });
    assert!(kept.ends_with("\na restart takes midemb.toml\n"), "{kept}");
}

#[test]
fn a_status_shows_the_config_shadows_and_the_last_pushes() {
    let shadow = ModelInfo { shadow_of: "learn".to_owned(), shadow_percent: 10, ..Default::default() };
    let running = PushReport { result: String::new(), done: 120, total: 400, ..report() };
    let refused = PushReport { result: "refused".to_owned(), reason: "too\nlong".to_owned(), ..report() };
    let text = status(&GetStatusResponse {
        ready: true,
        uptime_seconds: 12,
        models: vec![shadow],
        config: Some(config("midemb.toml.pushed")),
        previous: Some(config("")),
        push: Some(running),
        pushes: [vec![refused], vec![report(); 2 * MAX_PUSHES]].concat(),
        caches: vec![CacheStatus { cache: "item".to_owned(), entries: 7, bytes: 3 << 19, max_bytes: 256 << 20 }],
    });
    for part in [
        "ready, up 12 s, config bbbbbbbbbbbb of midemb.toml (pushed: midemb.toml.pushed)\n",
        "shadow of learn, 10 %",
        "1.50 MiB",
        "rollback to: bbbbbbbbbbbb (models learn 3)\n",
        "under way: push by alice since 2026-01-31 12:34:56, 83.4 s so far: swap, 120/400\n",
        "too long",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert_eq!(text.matches("aaaaaaaaaaaa → bbbbbbbbbbbb").count(), MAX_PUSHES);
    assert!(status(&GetStatusResponse::default()).starts_with("not ready, up 0 s\n"));
}

#[test]
fn a_long_reason_is_folded_between_words() {
    let folded = folded(&"seven77 ".repeat(20));
    let lines: Vec<&str> = folded.lines().collect();
    assert_eq!(lines.iter().map(|line| line.len()).collect::<Vec<_>>(), [55, 55, 47]);
}

#[test]
fn times_are_utc_dates() {
    assert_eq!(utc(0), "1970-01-01 00:00:00");
    assert_eq!(utc(951_782_399_999), "2000-02-28 23:59:59");
    assert_eq!(utc(951_782_400_000), "2000-02-29 00:00:00");
    assert_eq!(utc(1_735_689_599_000), "2024-12-31 23:59:59");
    assert_eq!(utc(4_107_542_400_000), "2100-03-01 00:00:00");
}
