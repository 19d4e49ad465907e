//! The scenarios against a real server on the fixture bundle, as a script runs them.
//!
//! The server is the one of this source tree; it is built here if `make test` has not built it already.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Once,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The server's binary, which is in the same target folder as this test. A stale one would be measured without a word.
fn up_to_date_server() -> PathBuf {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        // The same features as `make test` builds it with, so that this is a matter of a second there.
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root()).args(["test", "--no-run", "--quiet", "--locked", "--workspace"]);
        assert!(cargo.status().unwrap().success(), "the server does not build");
    });
    Path::new(env!("CARGO_BIN_EXE_midemb-bench")).with_file_name("midemb")
}

/// A server of its own on free ports; killed when dropped.
struct Server {
    child: Child,
    grpc: String,
    metrics: String,
    _folder: tempfile::TempDir,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let program = up_to_date_server();
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("midemb.toml");
        let bundle = root().join("tests/fixtures/bundle").canonicalize().unwrap();
        let listeners = "server.listen = \"127.0.0.1:0\"\nadmin.listen = \"127.0.0.1:0\"\n\
             telemetry.metrics_listen = \"127.0.0.1:0\"\ntelemetry.log_format = \"json\"\n\
             limits.default_deadline_ms = 60000\n";
        let model = format!("[[models]]\nname = \"learn\"\nbundle = {:?}\n", bundle.display().to_string());
        fs::write(&config, format!("{listeners}{model}")).unwrap();
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MIDEMB__")) {
            command.env_remove(name);
        }
        command.current_dir(root()).args(["serve", "--config"]).arg(&config).args(arguments);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let serving = log.by_ref().find(|line| line.contains("\"serving\"")).expect("the server did not start");
        // The rest is read on, or a full pipe would stop the server.
        std::thread::spawn(move || log.for_each(drop));
        let serving: Value = serde_json::from_str(&serving).unwrap();
        let address = |name: &str| serving[name].as_str().unwrap().to_owned();
        Server { child, grpc: address("grpc"), metrics: address("metrics"), _folder: folder }
    }

    fn bench(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_midemb-bench"));
        command.args(["--server", &self.grpc, "--metrics", &self.metrics, "--json"]).args(arguments);
        command.output().unwrap()
    }

    /// The phases of a scenario. Of 20 history items the fixture reads 8: enough orders of them that none comes twice by
    /// chance.
    fn phases(&self, scenario: &[&str]) -> Vec<Value> {
        let sizes = ["--requests", "60", "--items", "70", "--candidates", "50", "--history", "20"];
        lines(&self.bench(&[scenario, &sizes].concat()))
    }

    /// The sum of all series of `name` with this label.
    fn metric(&self, name: &str, label: &str) -> f64 {
        let text = ureq::get(format!("http://{}/metrics", self.metrics)).call().unwrap();
        let text = text.into_body().read_to_string().unwrap();
        let series = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    fn n_encoded(&self) -> f64 {
        self.metric("midemb_batch_items_sum", "stage=\"encode\"")
    }

    fn n_user_hits(&self) -> f64 {
        self.metric("midemb_cache_lookups_total{cache=\"user\"", "result=\"hit\"")
    }

    fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(output: &Output) -> Vec<Value> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn hot_requests_are_hot_and_their_users_are_new() {
    let server = Server::start(&[]);
    for pace in [&["w1-hot"][..], &["w1-hot", "--rate", "200"]] {
        let phases = server.phases(pace);
        assert_eq!(phases.len(), 1);
        let hot = &phases[0];
        assert_eq!((&hot["sent"], &hot["shed"], &hot["late"]), (&60.into(), &0.into(), &0.into()));
        assert!(hot["server_cpu_ms"].as_f64().unwrap() >= 0.0);
        assert!(hot["p99_ms"].as_f64().unwrap() >= hot["p50_ms"].as_f64().unwrap());
    }
    assert_eq!(server.n_encoded(), 70.0, "the benchmark was not hot");
    assert_eq!(server.n_user_hits(), 0.0, "users were known");
}

#[test]
fn sessions_of_pages_cold_items_and_hot_requests_beside_cold_ones_are_measured() {
    let server = Server::start(&[]);
    server.phases(&["w1-hot", "--pages", "4"]);
    let n_hits = server.n_user_hits();
    assert!(n_hits >= 60.0, "three pages of four should find their user, {n_hits} requests did");

    let n_before = server.n_encoded();
    let cold = server.phases(&["w2-cold"]);
    assert_eq!((&cold[0]["unit"], &cold[0]["sent"]), (&"item".into(), &70.into()));
    assert_eq!(server.n_encoded() - n_before, 64.0 + 70.0, "items that should be cold were known");

    let both = server.phases(&["w4-hot-while-cold", "--rate", "200"]);
    let names: Vec<&str> = both.iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert_eq!(names, ["hot alone", "hot beside cold", "hot beside cold pages"]);
    let refused = server.bench(&["w4-hot-while-cold"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--rate"));
}

#[test]
fn overload_is_measured() {
    let phases = Server::start(&[]).phases(&["w5-overload"]);
    assert_eq!(phases.len(), 3);
    let overload = &phases[1];
    assert_eq!(overload["sent"], 180);
    assert!(overload["shed"].is_u64() && overload["late"].is_u64() && overload["good_per_second"].is_f64());
}

/// What one server recorded is replayed against another one.
#[test]
fn a_recorded_trace_is_replayed_with_texts_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.jsonl").display().to_string();
    let recording = Server::start(&["--record-trace", &trace]);
    let sizes = ["--requests", "20", "--items", "60", "--candidates", "10", "--history", "4"];
    lines(&recording.bench(&[&["w3-zipf"], &sizes[..]].concat()));
    recording.stop();
    let recorded = fs::read_to_string(&trace).unwrap();
    assert_eq!(recorded.lines().count(), 40);
    assert!(["silver", "river", "harbour"].iter().all(|word| !recorded.contains(word)), "a text was recorded");

    let replaying = Server::start(&[]);
    let phases = lines(&replaying.bench(&["w3-zipf", "--trace", &trace, "--requests", "20"]));
    assert_eq!(phases.len(), 2);
    for phase in &phases {
        assert_eq!((phase["sent"].as_u64(), phase["rows_ok"].as_f64()), (Some(20), Some(1.0)), "{phase}");
    }
    let item_hits = |phase: usize| phases[phase]["hit_rates"]["item"].as_f64().unwrap();
    assert!(item_hits(0) < item_hits(1), "{phases:?}");
    // 10 candidates and 4 history items of each request.
    assert_eq!(replaying.metric("midemb_cache_lookups_total", "cache=\"item\""), 560.0);
}
