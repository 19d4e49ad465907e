//! The Prometheus recorder: installed once per process, kept tidy in the background, rendered at every scrape.

use super::names::{Kind, METRICS};
use metrics::{describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use std::time::Duration;
use thiserror::Error;

/// Why the recorder could not be set up.
#[derive(Debug, Error)]
#[error("the metrics recorder cannot be set up: {0}")]
pub struct RecorderError(#[from] BuildError);

/// Renders the recorded metrics, and those of the process.
#[derive(Debug, Clone)]
pub struct Recorder {
    handle: PrometheusHandle,
    process: Collector,
}

/// Histograms keep their samples until they are drained. A server that nobody scrapes must not grow.
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

    /// Renders all metrics in the text format that Prometheus scrapes.
    pub fn render(&self) -> String {
        self.process.collect();
        self.handle.render()
    }

    /// Drains histograms at regular intervals. Never returns; drop the future to stop it.
    pub async fn keep_up(self) {
        let mut ticks = tokio::time::interval(UPKEEP_EVERY);
        loop {
            ticks.tick().await;
            self.handle.run_upkeep();
        }
    }
}
