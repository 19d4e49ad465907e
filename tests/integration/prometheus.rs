//! A real Prometheus scrapes a real server and answers a query for the hit rate.
//!
//! It needs Debian's package `prometheus`. Without that binary the test prints that it is skipped, or fails if
//! `MIDEMB_REQUIRE_PROMETHEUS` is set, as it is in `.ci/run`.

use crate::harness::{Server, eventually, films, http_get, page};
use serde_json::Value;
use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

struct Prometheus {
    child: Child,
    address: String,
    _folder: TempDir,
}

impl Prometheus {
    /// `None` if the binary is not installed.
    fn start(target: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}\n\
             scrape_configs: [{{job_name: midemb, static_configs: [{{targets: ['{target}']}}]}}]\n"
        );
        fs::write(&config, text).unwrap();
        // Prometheus does not say which port it chose, so a free one is chosen here.
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

    /// The value of a query, as soon as there is one.
    async fn query(&self, query: &str) -> f64 {
        let mut value = None;
        eventually(&format!("prometheus answers {query}"), async || {
            value = self.try_query(query);
            value.is_some()
        })
        .await;
        value.unwrap()
    }

    /// `None` as long as it does not listen, or has scraped too little to answer.
    fn try_query(&self, query: &str) -> Option<f64> {
        std::net::TcpStream::connect(&self.address).ok()?;
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let (_, body) = http_get(&format!("http://{}/api/v1/query?query={encoded}", self.address));
        let answer: Value = serde_json::from_str(&body).ok()?;
        let value: f64 = answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()?;
        value.is_finite().then_some(value)
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn prometheus_computes_the_hit_rate() {
    let server = Server::start();
    let mut client = server.client().await;
    // The same page four times: a quarter of the look-ups miss.
    for _ in 0..4 {
        client.get_mid_emb(page(vec![], films("c", 40))).await.unwrap();
    }
    let Some(prometheus) = Prometheus::start(&server.metrics) else {
        assert!(std::env::var_os("MIDEMB_REQUIRE_PROMETHEUS").is_none(), "the binary prometheus is missing");
        eprintln!("SKIPPED: no binary named prometheus (Debian: apt-get install prometheus)");
        return;
    };
    let hits = "sum(midemb_cache_lookups_total{cache=\"item\",result=\"hit\"})";
    let rate = prometheus.query(&format!("{hits} / sum(midemb_cache_lookups_total{{cache=\"item\"}})")).await;
    assert_eq!(rate, 0.75);
    let p99 = "histogram_quantile(0.99, sum by (le) (midemb_request_duration_seconds_bucket{method=\"GetMidEmb\"}))";
    assert!(prometheus.query(p99).await > 0.0);
    assert_eq!(prometheus.query("midemb_model_info{name=\"learn\",provider=\"cpu\"}").await, 1.0);
}
