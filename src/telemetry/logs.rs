//! Log lines: JSON for machines, readable lines for people. Always written to standard error, by a thread of their own.

use super::log_queue::WriterThread;
use serde::Deserialize;
use std::{
    fs::File,
    io::{self, IsTerminal},
    os::fd::AsFd,
};
use thiserror::Error;
use tracing_subscriber::EnvFilter;

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `Human` if standard error is a terminal, else `Json`.
    Auto,
    /// One JSON object per line.
    Json,
    /// Readable lines.
    Human,
}

/// Why logging could not be set up.
#[derive(Debug, Error)]
pub enum LogError {
    /// The filter cannot be parsed.
    #[error("telemetry.log_filter {filter:?}: {source}")]
    Filter {
        /// The configured value.
        filter: String,
        /// The parser's error.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The filter is too long to be parsed.
    #[error("telemetry.log_filter has {n_bytes} bytes, at most {MAX_FILTER_BYTES} are allowed")]
    FilterLength {
        #[expect(missing_docs, reason = "the message says what it is")]
        n_bytes: usize,
    },
    /// Standard error cannot be opened again, or the thread that writes to it cannot be started.
    #[error("logging cannot be set up: {0}")]
    Writer(#[from] io::Error),
    /// A subscriber is already installed.
    #[error("logging cannot be set up: {0}")]
    Install(Box<dyn std::error::Error + Send + Sync>),
}

/// The most bytes of a filter. Operators write a few dozen.
pub const MAX_FILTER_BYTES: usize = 4096;

/// Parses a filter such as `info` or `midemb=debug,info`.
///
/// A field's value in it is compared as text. As a regular expression, which is what the library makes of it by default, a short
/// one could take gigabytes and a core for minutes.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, LogError> {
    if filter.len() > MAX_FILTER_BYTES {
        return Err(LogError::FilterLength { n_bytes: filter.len() });
    }
    let parsed = EnvFilter::builder().with_regex(false).parse(filter);
    parsed.map_err(|source| LogError::Filter { filter: filter.to_owned(), source })
}

/// Installs the process-wide subscriber. Lines that are logged after the drop of the returned value are lost.
pub fn install(format: LogFormat, filter: &str) -> Result<WriterThread, LogError> {
    let filter = parse_filter(filter)?;
    let stderr = io::stderr();
    // Not the standard library's handle: the thread would hold its lock while it waits for room in a full pipe.
    let (lines, thread) = WriterThread::start(File::from(stderr.as_fd().try_clone_to_owned()?))?;
    // Reports of its own errors would go to standard error directly, and panic if that fails.
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(lines).log_internal_errors(false);
    let is_terminal = stderr.is_terminal();
    let is_human = format == LogFormat::Human || format == LogFormat::Auto && is_terminal;
    let installed = if is_human {
        builder.with_ansi(is_terminal).with_target(false).try_init()
    } else {
        builder.json().flatten_event(true).with_target(false).try_init()
    };
    installed.map_err(LogError::Install)?;
    Ok(thread)
}

/// Makes panics appear in the log like any other event. A panic fails only its own job; see `inference::job`.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload_as_str().unwrap_or("no message");
        let thread = std::thread::current();
        tracing::error!(location, thread = thread.name().unwrap_or_default(), panic = message, "panicked");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// The value used to be compiled as a regular expression: its automaton doubles with every `(a|b)`.
    #[test]
    fn a_value_in_a_filter_is_no_regular_expression() {
        let filter = format!("[a{{f=(a|b)*a{}}}]=info", "(a|b)".repeat(60));
        let start = Instant::now();
        parse_filter(&filter).unwrap();
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        parse_filter("[a{f=(}]=info").unwrap();
    }

    #[test]
    fn a_filter_has_a_bound() {
        let targets = |n_bytes: usize| format!("info,{}=debug", "x".repeat(n_bytes - "info,=debug".len()));
        parse_filter(&targets(MAX_FILTER_BYTES)).unwrap();
        let error = parse_filter(&targets(MAX_FILTER_BYTES + 1)).unwrap_err().to_string();
        assert_eq!(error, "telemetry.log_filter has 4097 bytes, at most 4096 are allowed");
    }
}
