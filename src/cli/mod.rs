//! The commands, one file each. Answers go to standard output, everything else to standard error.
#![expect(clippy::print_stderr, reason = "what goes wrong is said there")]

/// The standard library's macro of that name panics where standard output is closed.
macro_rules! print {
    ($($arg:tt)*) => { $crate::cli::output::write(format_args!($($arg)*)) };
}

/// As above, with the end of the line.
macro_rules! println {
    ($($arg:tt)*) => { $crate::cli::output::write(format_args!("{}\n", format_args!($($arg)*))) };
}

mod admin;
mod bench;
mod bundle;
mod cache;
mod client;
mod config;
mod items;
mod output;
mod query;
mod serve;

use crate::{
    bundle::BundleError, config::ConfigError, inference::LibraryError, lifecycle::PushError, server::ServerError,
};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// LEARN's mid-emb vectors for ranking models, over gRPC.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage or config; 3 ONNX Runtime cannot be had; 4 a bundle failed its checks.
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
    /// Ask a running server for mid-embs and print what comes back.
    Query(query::Args),
    /// Load a running server and print throughput, latencies and its CPU a request.
    Bench(bench::Args),
    /// Look into a bundle, or check it.
    #[command(subcommand)]
    Bundle(bundle::Command),
    /// Check a config, or print it with every default.
    #[command(subcommand)]
    Config(config::Command),
    /// Ask a running server for its status, push a config, roll the last push back, or empty caches.
    Admin(admin::Args),
    /// Take the vectors of a running server's caches out into a file, or put such files in.
    Cache(cache::Args),
}

/// Runs one command.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Query(args) => client::block_on(query::run(args)),
        Command::Bench(args) => client::block_on(bench::run(args)),
        Command::Bundle(command) => bundle::run(command),
        Command::Config(command) => config::run(command),
        Command::Admin(args) => client::block_on(admin::run(args)),
        Command::Cache(args) => client::block_on(cache::run(args)),
    }
}

/// Prints an error as one line and gives its exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("midemb: error: {}", one_line(error));
    ExitCode::from(exit_code(error))
}

/// The error and its causes, each said once.
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
    let is_in_chain = |test: fn(&(dyn std::error::Error + 'static)) -> bool| error.chain().any(test);
    let start = error.chain().find_map(|e| match e.downcast_ref() {
        Some(ServerError::Start(error)) => Some(error),
        _ => None,
    });
    if is_in_chain(|e| e.is::<ConfigError>() || e.is::<client::UsageError>())
        || matches!(start, Some(PushError::Config(_)))
    {
        2
    } else if is_in_chain(|e| e.is::<LibraryError>()) || matches!(start, Some(PushError::Library(_))) {
        3
    } else if is_in_chain(|e| e.is::<BundleError>())
        || matches!(start, Some(PushError::Bundle { .. } | PushError::Fetch { .. } | PushError::Shadow { .. }))
    {
        4
    } else {
        1
    }
}
