//! What the server says of itself.

use anyhow::Context;
use std::time::Duration;

#[derive(Debug, Clone, Copy)]
pub(super) struct Scrape {
    pub(super) cpu_seconds: f64,
    pub(super) resident_bytes: f64,
    /// Items that wait for the encoder; zero where a peer does not say.
    pub(super) n_queued_to_encode: f64,
    /// Items that went through the encoder since the server's start.
    pub(super) n_encoded: f64,
    pub(super) item: Lookups,
    content: Lookups,
    user: Lookups,
}

/// Look-ups of one cache since the server's start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lookups {
    pub(super) n_hits: f64,
    pub(super) n: f64,
}

/// Hits among the look-ups of each cache; none where nothing was looked up.
#[derive(Debug, Clone, Copy)]
pub(super) struct HitRates {
    pub(super) item: Option<f64>,
    pub(super) content: Option<f64>,
    pub(super) user: Option<f64>,
}

impl Lookups {
    fn of(text: &str, cache: &str) -> Self {
        let lookups = |result| series(text, "midemb_cache_lookups_total", &[("cache", cache), ("result", result)]);
        let n_hits = lookups("hit");
        Lookups { n_hits, n: n_hits + lookups("miss") + lookups("coalesced") }
    }

    pub(super) fn since(self, before: Self) -> Self {
        Lookups { n_hits: self.n_hits - before.n_hits, n: self.n - before.n }
    }

    fn rate_since(self, before: Self) -> Option<f64> {
        let Lookups { n_hits, n } = self.since(before);
        (n > 0.0).then(|| n_hits / n)
    }
}

impl Scrape {
    pub(super) async fn read(address: &str) -> anyhow::Result<Self> {
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
            line.and_then(|value| value.trim().parse::<f64>().ok()).with_context(|| format!("{name} is not there"))
        };
        Ok(Scrape {
            cpu_seconds: process("process_cpu_seconds_total")?,
            resident_bytes: process("process_resident_memory_bytes")?,
            n_queued_to_encode: series(text, "midemb_queue_depth", &[("queue", "encoder")]),
            n_encoded: series(text, "midemb_batch_items_sum", &[("stage", "encode")]),
            item: Lookups::of(text, "item"),
            content: Lookups::of(text, "content"),
            user: Lookups::of(text, "user"),
        })
    }

    pub(super) fn hit_rates_since(&self, before: &Scrape) -> HitRates {
        HitRates {
            item: self.item.rate_since(before.item),
            content: self.content.rate_since(before.content),
            user: self.user.rate_since(before.user),
        }
    }
}

/// The value of the series of `name` with these labels; zero where there is none yet.
fn series(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let is_it = |rest: &str| labels.iter().all(|(label, value)| rest.contains(&format!("{label}=\"{value}\"")));
    let lines = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    lines.filter(|rest| is_it(rest)).filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "process_cpu_seconds_total 1.5\nprocess_resident_memory_bytes 100\n";

    #[test]
    fn hit_rates_are_those_of_the_time_between() {
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
    fn a_peer_that_only_has_process_metrics_will_do_and_one_without_will_not() {
        assert_eq!(Scrape::parse(BEFORE).unwrap().n_queued_to_encode, 0.0);
        let error = Scrape::parse("process_cpu_seconds_total 1.5\n").unwrap_err().to_string();
        assert!(error.contains("process_resident_memory_bytes"), "{error}");
    }
}
