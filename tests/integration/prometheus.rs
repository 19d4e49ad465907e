//! A real Prometheus scrapes a real server and answers a query for the hit rate.
//!
//! Needs Debian's package `prometheus`. Where the binary is missing this test says that it skips, unless
//! `MIDEMB_REQUIRE_PROMETHEUS` is set, as `.ci/run` does.

use crate::harness::{PATIENCE, Server, films, http_get, page};
use serde_json::Value;
use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Instant,
};
use tempfile::TempDir;

struct Prometheus {
    child: Child,
    address: String,
    _folder: TempDir,
}

impl Prometheus {
    /// `None` where there is no such binary.
    fn start(target: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}\n\
             scrape_configs: [{{job_name: midemb, static_configs: [{{targets: ['{target}']}}]}}]\n"
        );
        fs::write(&config, text).unwrap();
        // Prometheus does not tell which port it chose, so a free one is chosen for it.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Prometheus { child, address, _folder: folder }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => panic!("prometheus: {error}"),
        }
    }

    /// The value of a query once it has one.
    fn query(&self, query: &str) -> f64 {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let url = format!("http://{}/api/v1/query?query={encoded}", self.address);
            // Until it listens there is nothing to ask.
            let up = std::net::TcpStream::connect(&self.address).is_ok();
            let answer: Value =
                if up { serde_json::from_str(&http_get(&url).1).unwrap_or_default() } else { Value::Null };
            let value = &answer["data"]["result"][0]["value"][1];
            if let Some(value) = value.as_str().and_then(|v| v.parse::<f64>().ok()).filter(|v| v.is_finite()) {
                return value;
            }
            std::thread::yield_now();
        }
        panic!("prometheus had no answer to {query} within {PATIENCE:?}");
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn prometheus_knows_the_hit_rate() {
    let server = Server::start();
    let mut client = server.client().await;
    // Four times the same page: one look-up in four misses.
    for _ in 0..4 {
        client.get_mid_emb(page(vec![], films("c", 40))).await.unwrap();
    }
    let Some(prometheus) = Prometheus::start(&server.metrics) else {
        assert!(std::env::var_os("MIDEMB_REQUIRE_PROMETHEUS").is_none(), "the binary prometheus is missing");
        eprintln!("SKIPPED: no binary named prometheus (Debian: apt-get install prometheus)");
        return;
    };
    let hits = "sum(midemb_cache_lookups_total{cache=\"item\",result=\"hit\"})";
    let rate = prometheus.query(&format!("{hits} / sum(midemb_cache_lookups_total{{cache=\"item\"}})"));
    assert_eq!(rate, 0.75);
    let p99 = "histogram_quantile(0.99, sum by (le) (midemb_request_duration_seconds_bucket{method=\"GetMidEmb\"}))";
    assert!(prometheus.query(p99) > 0.0);
    assert_eq!(prometheus.query("midemb_model_info{name=\"learn\",provider=\"cpu\"}"), 1.0);
}
