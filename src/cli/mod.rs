//! The commands, one file each. Results go to standard output, everything else to standard error.
//!
//! Commands that talk to a server use `midemb-client`; `terminal` draws tables and progress bars, `output` writes results.

/// Replaces the standard library's macro of that name, which panics where standard output is closed.
macro_rules! print {
    ($($arg:tt)*) => { $crate::cli::output::write(format_args!($($arg)*)) };
}

/// `print!` with a line end.
macro_rules! println {
    ($($arg:tt)*) => { $crate::cli::output::write(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Replaces the standard library's macro of that name, which panics where standard error is closed and waits where it is full.
macro_rules! eprintln {
    ($($arg:tt)*) => { $crate::cli::output::write_error(format_args!("{}\n", format_args!($($arg)*))) };
}

mod admin;
mod bundle;
mod cache;
mod cache_curve;
mod config;
mod items;
mod output;
mod query;
mod serve;
mod terminal;

use crate::{
    bundle::BundleError,
    config::{ConfigError, prepare_process},
    inference::LibraryError,
    lifecycle::PushError,
    server::ServerError,
};
use anyhow::Context;
use clap::{Parser, Subcommand};
use output::end_process;
use std::future::Future;

/// LEARN's mid-emb vectors for ranking models, over gRPC.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage or config; 3 ONNX Runtime cannot be loaded; 4 a bundle failed its checks.
#[derive(Debug, Parser)]
#[command(version, about, verbatim_doc_comment)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT.
    Serve(serve::Args),
    /// Ask a running server for mid-embs and print the answer.
    Query(query::Args),
    /// Print what a bundle holds, or check it.
    #[command(subcommand)]
    Bundle(bundle::Command),
    /// Check a config, or print it with all defaults.
    #[command(subcommand)]
    Config(config::Command),
    /// Print a running server's status, push a config, roll the last push back, or empty caches.
    Admin(admin::Args),
    /// Export the vectors of a running server's caches to a file, or import such files.
    Cache(cache::Args),
    /// Print the hit rates that caches of several sizes would have. Needs no server.
    CacheCurve(cache_curve::Args),
}

impl Command {
    /// Whether the command loads ONNX Runtime.
    fn loads_library(&self) -> bool {
        matches!(self, Command::Serve(_) | Command::Bundle(bundle::Command::Verify { .. }))
    }
}

/// Runs one command and ends the process with its exit code.
pub fn main(cli: Cli) -> ! {
    let Err(error) = run(cli) else { end_process(0) };
    eprintln!("midemb: error: {}", one_line(&error));
    end_process(exit_code(&error))
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if cli.command.loads_library() {
        prepare_process().context(
            "the environment cannot be set: set ORT_DISABLE_TELEMETRY=1, MALLOC_ARENA_MAX, MALLOC_MMAP_THRESHOLD_ and \
             MALLOC_TRIM_THRESHOLD_ yourself",
        )?;
    }
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Query(args) => block_on(query::run(args)),
        Command::Bundle(command) => bundle::run(command),
        Command::Config(command) => config::run(command),
        Command::Admin(args) => block_on(admin::run(args)),
        Command::Cache(args) => block_on(cache::run(args)),
        Command::CacheCurve(args) => cache_curve::run(&args),
    }
}

/// Runs a command that talks to a server, on one thread.
fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

/// The error and its causes; a cause that an outer message repeats is left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string().replace('\n', " ")) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let codes = [CONFIG_FAILED, LIBRARY_FAILED, BUNDLE_FAILED];
    let is_in_chain = |code: &u8| error.chain().any(|cause| code_of_cause(cause) == Some(*code));
    codes.into_iter().find(is_in_chain).unwrap_or(FAILED)
}

const FAILED: u8 = 1;
const CONFIG_FAILED: u8 = 2;
const LIBRARY_FAILED: u8 = 3;
const BUNDLE_FAILED: u8 = 4;

fn code_of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if cause.is::<ConfigError>() || matches!(cause.downcast_ref(), Some(midemb_client::Error::Options(_))) {
        return Some(CONFIG_FAILED);
    }
    if cause.is::<LibraryError>() {
        return Some(LIBRARY_FAILED);
    }
    if cause.is::<BundleError>() {
        return Some(BUNDLE_FAILED);
    }
    match cause.downcast_ref() {
        Some(ServerError::Start(PushError::Config(_))) => Some(CONFIG_FAILED),
        Some(ServerError::Start(PushError::Library(_))) => Some(LIBRARY_FAILED),
        Some(ServerError::Start(PushError::Bundle { .. } | PushError::Fetch { .. } | PushError::Shadow { .. })) => {
            Some(BUNDLE_FAILED)
        }
        _ => None,
    }
}
