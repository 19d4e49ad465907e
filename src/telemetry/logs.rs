//! Log lines: JSON for machines, one readable line for people. Always on standard error; answers go to standard output.

use serde::Deserialize;
use std::io::IsTerminal;
use thiserror::Error;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `human` where standard error is a terminal, `json` elsewhere.
    Auto,
    /// One JSON object a line.
    Json,
    /// A line that a person reads.
    Human,
}

/// The log could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// `telemetry.log_filter` is no filter.
    #[error("telemetry.log_filter {filter:?}: {source}")]
    Filter {
        /// As configured.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// A subscriber is installed already.
    #[error("logs: {0}")]
    Install(Box<dyn std::error::Error + Send + Sync>),
}

/// Parses a filter such as `info` or `midemb=debug,info`.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter).map_err(|source| LogError::Filter { filter: filter.to_owned(), source })
}

/// Installs the process-wide subscriber.
pub fn install(format: LogFormat, filter: &str) -> Result<(), LogError> {
    let builder = tracing_subscriber::fmt().with_env_filter(parse_filter(filter)?).with_writer(std::io::stderr);
    let human = format == LogFormat::Human || format == LogFormat::Auto && std::io::stderr().is_terminal();
    if human {
        builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).with_target(false).try_init()
    }
    .map_err(LogError::Install)
}

/// Logs panics as any other event. They fail their own job and no more; see `inference::pool`.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        let thread = std::thread::current();
        tracing::error!(location, thread = thread.name().unwrap_or_default(), panic = message, "panicked");
    }));
}
