//! The command line.

use anyhow::{Context, ensure};
use midemb_client::AdminAccess;
use std::{fs, path::PathBuf, time::Duration};

/// The workloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// Everything is cached except the user: ids alone, and a history that was never sent. Closed loop, or open with --rate.
    W1Hot,
    /// Items that the server has never seen, through WarmItems.
    W2Cold,
    /// Items drawn by popularity (--zipf over --items) or as in a trace (--trace), each with its text: first into the caches as
    /// they are, then again.
    W3Zipf,
    /// Hot requests at --rate, alone and then while cold items keep the encoder busy.
    W4HotWhileCold,
    /// Three times the load that the server can take, with a deadline.
    W5Overload,
    /// Pages of items that the server has never seen, with a deadline that only some of them can meet; then each page again.
    W6ColdPage,
    /// w1-hot's load while configs (--configs) are pushed in turn: which requests fail, which answers mix two bundles, and what
    /// a push costs. Closed loop, or open with --rate.
    W7Reload,
}

impl Scenario {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Scenario::W1Hot => "w1-hot",
            Scenario::W2Cold => "w2-cold",
            Scenario::W3Zipf => "w3-zipf",
            Scenario::W4HotWhileCold => "w4-hot-while-cold",
            Scenario::W5Overload => "w5-overload",
            Scenario::W6ColdPage => "w6-cold-page",
            Scenario::W7Reload => "w7-reload",
        }
    }
}

/// Send a known workload to a running midemb server, and print throughput, latencies and the server's CPU time per request.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "midemb-bench", version)]
pub(crate) struct Args {
    /// What to send.
    #[arg(value_enum, default_value = "w1-hot")]
    pub(crate) scenario: Scenario,
    /// The server's `server.listen`.
    #[arg(long, default_value = "127.0.0.1:50051")]
    pub(crate) server: String,
    /// The server's `telemetry.metrics_listen`.
    #[arg(long, default_value = "127.0.0.1:9464")]
    pub(crate) metrics: String,
    /// Requests per phase; w7-reload sends this many before the first push.
    #[arg(long, default_value_t = 2000)]
    pub(crate) requests: u64,
    /// Closed loop: requests under way at once.
    #[arg(long, default_value_t = 2)]
    pub(crate) concurrency: usize,
    /// Open loop: requests per second. Each is sent when it is due, whether or not earlier ones were answered, and its latency
    /// counts from then.
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// The requests' deadline. Without it the server's default holds, but w5-overload takes 100 and w6-cold-page 50.
    #[arg(long)]
    pub(crate) deadline_ms: Option<u64>,
    /// Candidates per request.
    #[arg(long, default_value_t = 500)]
    pub(crate) candidates: usize,
    /// History items per request.
    #[arg(long, default_value_t = 80)]
    pub(crate) history: usize,
    /// Different items: warmed before the first request, sent cold by w2-cold, or drawn by w3-zipf.
    #[arg(long, default_value_t = 1000)]
    pub(crate) items: usize,
    /// Send every item's text with every request.
    #[arg(long)]
    pub(crate) send_text: bool,
    /// Ask for cvr alone, whose answers are small. w5-overload does: a load generator on the server's own cores would otherwise be
    /// overloaded before the server is.
    #[arg(long)]
    pub(crate) cvr_only: bool,
    /// Requests in a row with the same history, as the pages of one session have.
    #[arg(long, default_value_t = 1)]
    pub(crate) pages: u64,
    /// w3-zipf: the k-th most popular item is drawn in proportion to 1/k^S.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub(crate) zipf: f64,
    /// w3-zipf: ask for the items of this trace (of `midemb serve --record-trace`), with made-up texts.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// The seed of the hot items. Histories and cold items differ from run to run.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) reload: ReloadArgs,
    /// Print one JSON object per phase.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What w7-reload pushes, and how often.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    pub(crate) admin: AdminAccess,
    /// w7-reload: the config files to push in turn, two or more. All must fit the running server: they may differ from its own
    /// config only in `[[models]]` and other keys that take effect without a restart. Of two configs, the server keeps each
    /// one's models for a rollback and reuses them; of three, every push loads.
    #[arg(long, num_args = 2.., value_names = ["FILE"])]
    pub(crate) configs: Vec<PathBuf>,
    /// w7-reload: the number of pushes. Every tenth is rolled back before the next.
    #[arg(long, default_value_t = 200)]
    pub(crate) reloads: u64,
    /// w7-reload: the pause after each push.
    #[arg(long, default_value_t = 250)]
    pub(crate) pause_ms: u64,
    /// w7-reload: different pages, each with a history of its own. Their answers under every config are kept in memory.
    #[arg(long, default_value_t = 256)]
    pub(crate) different_pages: usize,
}

impl Args {
    /// Checks what clap cannot.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        ensure!(
            self.requests > 0 && self.concurrency > 0 && self.candidates > 0 && self.pages > 0 && self.items > 0,
            "--requests, --concurrency, --candidates, --pages and --items must be at least 1"
        );
        ensure!(self.rate.is_none_or(|rate| rate.is_finite() && rate > 0.0), "--rate must be above 0");
        ensure!(self.items >= self.candidates.max(self.history), "--items must cover the candidates and the history");
        // With a steeper law, a page would wait long for its rare items to be drawn.
        ensure!((0.0..=1.5).contains(&self.zipf), "--zipf must be from 0 to 1.5");
        if self.scenario == Scenario::W4HotWhileCold {
            ensure!(self.rate.is_some(), "w4-hot-while-cold needs a --rate that the server keeps up with alone");
        }
        if self.scenario == Scenario::W7Reload {
            ensure!(self.reload.configs.len() > 1, "w7-reload needs --configs with two config files or more");
            ensure!(
                self.reload.reloads > 0 && self.reload.different_pages > 0,
                "--reloads and --different-pages must be at least 1"
            );
        }
        Ok(())
    }

    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.deadline_ms.map(Duration::from_millis)
    }
}

impl ReloadArgs {
    /// The texts of the config files.
    pub(crate) fn read_configs(&self) -> anyhow::Result<Vec<String>> {
        let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("config {}", path.display()));
        self.configs.iter().map(read).collect()
    }
}
