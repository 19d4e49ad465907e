//! The commands, as people and scripts call them.

use crate::harness::{Server, films, fixture, midemb, page, root, run};
use serde_json::Value;
use std::{fs::File, process::Stdio};

fn stdout(output: &std::process::Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn query_prints_a_table_for_people_and_json_for_machines() {
    let server = Server::start();
    let items = root().join("models/default/sample_items.jsonl");
    let query = |more: &[&str]| {
        let mut command = midemb();
        command.args(["query", "--server", &server.grpc, "--items"]).arg(&items).args(more);
        stdout(&command.output().unwrap())
    };
    let table = query(&["--rows", "3"]);
    assert!(table.contains("candidate") && table.contains("|mid_emb|") && table.contains("rows OK"), "{table}");
    assert!(table.contains("more rows"), "{table}");

    let page: Value = serde_json::from_str(&query(&["--json", "--history", "4"])).unwrap();
    let n_items = std::fs::read_to_string(&items).unwrap().lines().count();
    let rows = page["rows"].as_array().unwrap();
    assert_eq!(rows.len(), n_items - 4);
    assert!(rows.iter().all(|row| row["status"] == "OK" && row["mid_emb"].as_array().unwrap().len() == 12));
    assert!(rows.iter().all(|row| (0.0..=1.0).contains(&row["cvr"].as_f64().unwrap())));
    assert_eq!(page["history_used"], 4);

    let again: Value = serde_json::from_str(&query(&["--json", "--history", "4", "--ids-only"])).unwrap();
    assert_eq!(again["rows"][0]["mid_emb"], page["rows"][0]["mid_emb"]);
}

#[test]
fn a_command_that_fails_says_why_in_one_line() {
    let unreachable = run(&["query", "--server", "127.0.0.1:1"]);
    assert_eq!(unreachable.status.code(), Some(1));
    let line = String::from_utf8(unreachable.stderr).unwrap();
    assert!(line.starts_with("midemb: error: cannot connect to 127.0.0.1:1: ") && line.lines().count() == 1, "{line}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"id\": \"a\"}\n{\"id\": 3}\n").unwrap();
    let bad = midemb().args(["query", "--items"]).arg(file.path()).output().unwrap();
    let line = String::from_utf8(bad.stderr).unwrap();
    assert!(line.contains("line 2") && line.lines().count() == 1, "{line}");
    assert_eq!(run(&["serve"]).status.code(), Some(2));
}

#[test]
fn standard_output_may_be_closed_or_full() {
    let inspect = |stdout: Stdio| {
        let mut command = midemb();
        command.args(["bundle", "inspect"]).arg(fixture()).stdout(stdout).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut closed = inspect(Stdio::piped());
    drop(closed.stdout.take());
    let output = closed.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));

    let full = inspect(File::create("/dev/full").unwrap().into()).wait_with_output().unwrap();
    let line = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(1), "{line}");
    assert!(
        line.starts_with("midemb: error: cannot write to standard output: ") && line.lines().count() == 1,
        "{line}"
    );
}

#[test]
fn config_is_checked_and_printed() {
    let path = root().join("deploy/midemb.toml").display().to_string();
    assert!(stdout(&run(&["config", "check", "--config", &path])).contains("is valid: 1 model(s)"));
    let printed = stdout(&run(&["config", "print", "--config", &path]));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &printed).unwrap();
    let again = stdout(&run(&["config", "print", "--config", &file.path().display().to_string()]));
    assert_eq!(printed, again);
}

#[test]
fn bundles_are_inspected_and_verified() {
    let folder = fixture().display().to_string();
    let inspected = stdout(&run(&["bundle", "inspect", &folder]));
    for part in ["encoder digest", "user tower", "item_tower.onnx", "sha256"] {
        assert!(inspected.contains(part), "{inspected}");
    }
    let verified = stdout(&run(&["bundle", "verify", &folder]));
    for part in ["token_ids", "content", "item", "user", "mid_emb", "cvr", "is good on cpu"] {
        assert!(verified.contains(part), "{verified}");
    }
    let broken = crate::harness::BrokenBundle::new();
    std::fs::remove_file(broken.path("golden.json")).unwrap();
    assert_eq!(run(&["bundle", "verify", &broken.folder().display().to_string()]).status.code(), Some(4));
}

#[test]
fn admin_shows_status_and_flushes() {
    let server = Server::start();
    let status = stdout(&run(&["admin", "--admin", &server.admin, "status"]));
    assert!(status.contains("ready") && status.contains("learn") && status.contains("known_items"), "{status}");
    assert_eq!(stdout(&run(&["admin", "--admin", &server.admin, "flush", "item"])), "0 entries removed\n");
}

/// The trace of one server is read by `cache-curve`, which needs no server.
#[tokio::test]
async fn a_trace_is_recorded_without_texts_and_gives_a_cache_curve() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.jsonl").display().to_string();
    let recording = Server::start_as(&fixture(), "", &["--record-trace", &trace]);
    let mut client = recording.client().await;
    for i in 0..40 {
        let candidates = films("harbour", 20).split_off(i % 10);
        client.get_mid_emb(page(films("silver", 4), candidates)).await.unwrap();
    }
    let n_recorded = recording.scrape().sum("midemb_trace_requests_total", &["result=\"recorded\""]);
    drop(client);
    recording.signal("TERM");
    assert!(recording.wait().success());
    let lines = std::fs::read_to_string(&trace).unwrap();
    assert_eq!((lines.lines().count(), n_recorded), (40, 40.0));
    assert!(["part", "Drama", "title"].iter().all(|word| !lines.contains(word)), "a text was recorded");
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((first["history"].as_array().unwrap().len(), first["candidates"].as_array().unwrap().len()), (4, 20));
    assert_eq!(first["candidates"][0][1].as_str().unwrap().len(), 32);

    let curve = stdout(&run(&["cache-curve", "--trace", &trace, "--requests", "40", "--json"]));
    let points: Vec<Value> = curve.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rates: Vec<f64> = points.iter().map(|point| point["item_hit_rate"].as_f64().unwrap()).collect();
    assert!(rates.len() > 3 && rates.windows(2).all(|pair| pair[0] <= pair[1] + 0.05), "{rates:?}");
    assert_eq!(points.last().unwrap()["encoded_per_request"].as_f64(), Some(0.0), "{points:?}");

    let mut again = midemb();
    again.args(["serve", "--config"]).arg(root().join("deploy/midemb.toml")).args(["--record-trace", &trace]);
    let refused = again.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("trace.jsonl"));
    assert_eq!(std::fs::read_to_string(&trace).unwrap(), lines, "a trace was overwritten");
}
