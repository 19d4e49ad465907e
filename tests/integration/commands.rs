//! The commands, as a person and as a script call them.

use crate::harness::{Server, fixture, midemb, root, run};
use serde_json::Value;

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
    let nobody = run(&["query", "--server", "127.0.0.1:1"]);
    assert_eq!(nobody.status.code(), Some(1));
    let line = String::from_utf8(nobody.stderr).unwrap();
    assert!(line.starts_with("midemb: error: cannot connect to 127.0.0.1:1: ") && line.lines().count() == 1, "{line}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{\"id\": \"a\"}\n{\"id\": 3}\n").unwrap();
    let bad = midemb().args(["query", "--items"]).arg(file.path()).output().unwrap();
    let line = String::from_utf8(bad.stderr).unwrap();
    assert!(line.contains("line 2") && line.lines().count() == 1, "{line}");
    assert_eq!(run(&["serve"]).status.code(), Some(2));
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

#[test]
fn bench_measures_the_hot_path() {
    let server = Server::start();
    let arguments = ["bench", "--json", "--requests", "50", "--items", "60", "--candidates", "50", "--history", "8"];
    let output =
        midemb().args(arguments).args(["--server", &server.grpc, "--metrics", &server.metrics]).output().unwrap();
    let result: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(result["requests"], 50);
    assert!(result["server_cpu_ms_per_request"].as_f64().unwrap() >= 0.0);
    assert!(result["p99_ms"].as_f64().unwrap() >= result["p50_ms"].as_f64().unwrap());
    assert_eq!(server.scrape().n_encoded(), 60.0, "the benchmark was not hot");
}
