//! The Prometheus recorder: one a process, installed once, kept up in the background, rendered at every scrape.

use super::names::{Kind, METRICS};
use metrics::{describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use std::time::Duration;
use thiserror::Error;

/// The recorder could not be set up.
#[derive(Debug, Error)]
#[error("metrics recorder: {0}")]
pub struct RecorderError(#[from] BuildError);

/// Renders what was recorded.
#[derive(Debug, Clone)]
pub struct Recorder {
    handle: PrometheusHandle,
    process: Collector,
}

/// Histograms keep their samples until somebody drains them; a server that nobody scrapes must not grow.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

impl Recorder {
    /// Installs the process-wide recorder and describes every metric.
    pub fn install() -> Result<Self, RecorderError> {
        let mut builder = PrometheusBuilder::new();
        for metric in METRICS {
            if let Kind::Histogram(buckets) = metric.kind {
                builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
            }
        }
        let handle = builder.install_recorder()?;
        for metric in METRICS {
            match metric.kind {
                Kind::Counter => describe_counter!(metric.name, metric.help),
                Kind::Gauge => describe_gauge!(metric.name, metric.help),
                Kind::Histogram(_) => describe_histogram!(metric.name, metric.help),
            }
        }
        let process = Collector::default();
        process.describe();
        Ok(Recorder { handle, process })
    }

    /// The text format that Prometheus scrapes.
    pub fn render(&self) -> String {
        self.process.collect();
        self.handle.render()
    }

    /// Drains histograms now and then. Runs until it is dropped.
    pub async fn keep_up(self) {
        let mut ticks = tokio::time::interval(UPKEEP_EVERY);
        loop {
            ticks.tick().await;
            self.handle.run_upkeep();
        }
    }
}
