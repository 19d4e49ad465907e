//! What the server says of itself.

use anyhow::Context;
use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub(super) struct Scrape {
    pub(super) cpu_seconds: f64,
    pub(super) resident_bytes: f64,
}

impl Scrape {
    pub(super) async fn read(address: &str) -> anyhow::Result<Self> {
        let url = format!("http://{address}/metrics");
        let fetch = move || -> anyhow::Result<String> {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).build().into();
            Ok(agent.get(&url).call().with_context(|| url.clone())?.body_mut().read_to_string()?)
        };
        let text = tokio::task::spawn_blocking(fetch).await??;
        let read = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.trim().parse::<f64>().ok()).with_context(|| format!("{address} has no {name}"))
        };
        Ok(Scrape {
            cpu_seconds: read("process_cpu_seconds_total")?,
            resident_bytes: read("process_resident_memory_bytes")?,
        })
    }
}
