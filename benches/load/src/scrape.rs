//! The server's own metrics.

use anyhow::Context;
use serde::Serialize;
use std::time::Duration;

/// One reading of `/metrics`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scrape {
    pub(crate) cpu_seconds: f64,
    pub(crate) resident_bytes: f64,
    /// Items that wait for the encoder; zero for a peer that does not say.
    pub(crate) n_queued_to_encode: f64,
    /// Items encoded since the server's start.
    pub(crate) n_encoded: f64,
    pub(crate) item: Lookups,
    content: Lookups,
    user: Lookups,
}

/// Look-ups of one cache since the server's start.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Lookups {
    pub(crate) n_hits: f64,
    pub(crate) n: f64,
}

/// The part of each cache's look-ups that hit; none where nothing was looked up.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct HitRates {
    pub(crate) item: Option<f64>,
    pub(crate) content: Option<f64>,
    pub(crate) user: Option<f64>,
}

impl Lookups {
    fn parse(text: &str, cache: &str) -> Self {
        let lookups = |result| series(text, "midemb_cache_lookups_total", &[("cache", cache), ("result", result)]);
        let n_hits = lookups("hit");
        Lookups { n_hits, n: n_hits + lookups("miss") + lookups("coalesced") }
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Lookups { n_hits: self.n_hits - before.n_hits, n: self.n - before.n }
    }

    fn rate_since(self, before: Self) -> Option<f64> {
        let Lookups { n_hits, n } = self.since(before);
        (n > 0.0).then(|| n_hits / n)
    }
}

impl Scrape {
    pub(crate) async fn read(address: &str) -> anyhow::Result<Self> {
        let url = format!("http://{address}/metrics");
        let fetch = move || -> anyhow::Result<String> {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).build().into();
            Ok(agent.get(&url).call().with_context(|| url.clone())?.body_mut().read_to_string()?)
        };
        Self::parse(&tokio::task::spawn_blocking(fetch).await??).with_context(|| format!("metrics of {address}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let process = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.trim().parse::<f64>().ok()).with_context(|| format!("{name} is missing"))
        };
        Ok(Scrape {
            cpu_seconds: process("process_cpu_seconds_total")?,
            resident_bytes: process("process_resident_memory_bytes")?,
            n_queued_to_encode: series(text, "midemb_queue_depth", &[("queue", "encoder")]),
            n_encoded: series(text, "midemb_batch_items_sum", &[("stage", "encode")]),
            item: Lookups::parse(text, "item"),
            content: Lookups::parse(text, "content"),
            user: Lookups::parse(text, "user"),
        })
    }

    pub(crate) fn hit_rates_since(&self, before: &Scrape) -> HitRates {
        HitRates {
            item: self.item.rate_since(before.item),
            content: self.content.rate_since(before.content),
            user: self.user.rate_since(before.user),
        }
    }
}

/// The sum of all series of `name` with these labels; zero where there is none yet.
fn series(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let mut sum = 0.0;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name).filter(|rest| rest.starts_with('{')) else { continue };
        let has_labels = labels.iter().all(|(label, value)| rest.contains(&format!("{label}=\"{value}\"")));
        let value = rest.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
        if let (true, Some(value)) = (has_labels, value) {
            sum += value;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "process_cpu_seconds_total 1.5\nprocess_resident_memory_bytes 100\n";

    #[test]
    fn hit_rates_are_those_between_two_scrapes() {
        let counts = |hits, misses| {
            format!(
                "{BEFORE}midemb_cache_lookups_total{{cache=\"item\",result=\"hit\"}} {hits}\n\
                 midemb_cache_lookups_total{{cache=\"item\",result=\"miss\"}} {misses}\n\
                 midemb_queue_depth{{queue=\"encoder\"}} 7\nmidemb_queue_depth{{queue=\"towers\"}} 9\n"
            )
        };
        let before = Scrape::parse(&counts(100, 100)).unwrap();
        let after = Scrape::parse(&counts(130, 110)).unwrap();
        let rates = after.hit_rates_since(&before);
        assert_eq!((rates.item, rates.content), (Some(0.75), None));
        assert_eq!((after.n_queued_to_encode, after.cpu_seconds), (7.0, 1.5));
    }

    #[test]
    fn process_metrics_are_enough_and_required() {
        assert_eq!(Scrape::parse(BEFORE).unwrap().n_queued_to_encode, 0.0);
        let error = Scrape::parse("process_cpu_seconds_total 1.5\n").unwrap_err().to_string();
        assert!(error.contains("process_resident_memory_bytes"), "{error}");
    }
}
