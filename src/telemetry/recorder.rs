//! The Prometheus recorder: installed once per process, kept tidy in the background, rendered at every scrape.

use super::series::{Owner, Series};
use metrics_exporter_prometheus::BuildError;
use metrics_process::Collector;
use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
    time::Duration,
};
use thiserror::Error;

/// Why the recorder could not be set up.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it all")]
pub enum RecorderError {
    #[error("the metrics recorder cannot be set up: {0}")]
    Build(#[from] BuildError),
    #[error("the metrics recorder cannot be set up: another one is installed")]
    Installed,
}

/// Renders the recorded metrics, and those of the process.
#[derive(Debug, Clone)]
pub struct Recorder {
    series: Arc<Series>,
    process: Collector,
}

/// What the process-wide recorder keeps.
static INSTALLED: OnceLock<Arc<Series>> = OnceLock::new();

/// Whether the process has its recorder.
pub(super) fn is_installed() -> bool {
    INSTALLED.get().is_some()
}

/// Histograms keep their samples until they are drained. A server that nobody scrapes must not grow.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

impl Recorder {
    /// Installs the process-wide recorder, which describes every metric.
    pub fn install() -> Result<Self, RecorderError> {
        let series = Arc::new(Series::new()?);
        metrics::set_global_recorder(Arc::clone(&series)).map_err(|_taken| RecorderError::Installed)?;
        // Only the first recorder can be installed, so this is never set twice.
        let _ = INSTALLED.set(Arc::clone(&series));
        let process = Collector::default();
        process.describe();
        Ok(Recorder { series, process })
    }

    /// Renders all metrics in the text format that Prometheus scrapes.
    pub fn render(&self) -> String {
        self.process.collect();
        self.series.render()
    }

    /// Drains histograms at regular intervals. Never returns; drop the future to stop it.
    pub async fn keep_up(self) {
        let mut ticks = tokio::time::interval(UPKEEP_EVERY);
        loop {
            ticks.tick().await;
            self.series.run_upkeep();
        }
    }
}

/// Forgets the series of all models and configs but these. Does nothing if no recorder is installed, as in unit tests.
pub(super) fn forget_all_but(owners: &HashSet<Owner>) {
    if let Some(series) = INSTALLED.get() {
        series.forget_all_but(owners);
    }
}
