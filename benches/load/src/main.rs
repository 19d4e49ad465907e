//! `midemb bench`: known scenarios against a running server, for planning capacity and for keeping us honest.
//!
//! What counts most is the server's own CPU time (from its `process_cpu_seconds_total`): latencies on a shared machine hold
//! little. [`traffic`] sends, [`scenarios`] says what ([`draws`] which items), [`report`] prints; [`curve`] needs no server,
//! [`reload`] pushes configs and checks what answers hold.

mod curve;
mod draws;
mod reload;
mod report;
mod scenarios;
mod scrape;
mod traffic;

use super::client;
use anyhow::ensure;
use draws::Draws;
use fastrand::Rng;
use std::{path::PathBuf, sync::Arc, time::Duration};

/// What to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Scenario {
    /// Everything cached but the user: ids alone, a history that was never sent. Closed loop, or open with --rate.
    W1Hot,
    /// Items that were never seen, through WarmItems.
    W2Cold,
    /// Items drawn by popularity (--zipf over --items) or as a trace has them (--trace), each with its text: first into caches
    /// as they are, then again.
    W3Zipf,
    /// Hot requests at --rate, alone and then while cold items keep the encoder busy.
    W4HotWhileCold,
    /// Three times what the server can take, with a deadline.
    W5Overload,
    /// Pages of items that were never seen, with a deadline that only a part of them can make, and each again afterwards.
    W6ColdPage,
    /// w1-hot's load while two configs (--configs) are pushed in turn: what fails, what is answered by halves of two bundles,
    /// and what it costs. Closed loop, or open with --rate.
    W7Reload,
    /// Hit rates by cache size for the draws of w3-zipf; asks no server.
    CacheCurve,
}

impl Scenario {
    fn name(self) -> &'static str {
        match self {
            Scenario::W1Hot => "w1-hot",
            Scenario::W2Cold => "w2-cold",
            Scenario::W3Zipf => "w3-zipf",
            Scenario::W4HotWhileCold => "w4-hot-while-cold",
            Scenario::W5Overload => "w5-overload",
            Scenario::W6ColdPage => "w6-cold-page",
            Scenario::W7Reload => "w7-reload",
            Scenario::CacheCurve => "cache-curve",
        }
    }
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    #[arg(value_enum, default_value = "w1-hot")]
    scenario: Scenario,
    /// The server's `server.listen`.
    #[arg(long, default_value = "127.0.0.1:50051")]
    server: String,
    /// The server's `telemetry.metrics_listen`.
    #[arg(long, default_value = "127.0.0.1:9464")]
    metrics: String,
    /// Requests in all; w7-reload sends so many before the first push.
    #[arg(long, default_value_t = 2000)]
    requests: u64,
    /// Closed loop: requests under way at once.
    #[arg(long, default_value_t = 2)]
    concurrency: usize,
    /// Open loop: requests a second, sent when they are due, whatever became of those before. Latencies count from when a
    /// request was due.
    #[arg(long)]
    rate: Option<f64>,
    /// The deadline that requests carry; without it the server's default holds. w5-overload takes 100 where this is absent,
    /// w6-cold-page 50.
    #[arg(long)]
    deadline_ms: Option<u64>,
    /// Candidates of a request.
    #[arg(long, default_value_t = 500)]
    candidates: usize,
    /// History items of a request; cache-curve reads the newest so many of a trace, as the model does.
    #[arg(long, default_value_t = 80)]
    history: usize,
    /// Different items: warmed before the first request, sent cold by w2-cold, or drawn by w3-zipf and cache-curve.
    #[arg(long, default_value_t = 1000)]
    items: usize,
    /// Send every item's text with every request.
    #[arg(long)]
    send_text: bool,
    /// Requests in a row that send the same history, as the pages of one session do.
    #[arg(long, default_value_t = 1)]
    pages: u64,
    /// w3-zipf and cache-curve: the k-th most popular item is drawn in proportion to 1/k^S.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    zipf: f64,
    /// w3-zipf and cache-curve: ask for what this trace (of `midemb serve --record-trace`) asks for, with made-up texts.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// cache-curve: the width of content embeddings.
    #[arg(long, default_value_t = 384)]
    content_dim: usize,
    /// cache-curve: the width of item embeddings.
    #[arg(long, default_value_t = 64)]
    item_dim: usize,
    /// What the hot items are made up from. Histories and cold items are others every time.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    reload: reload::ReloadArgs,
    /// Print one JSON object a phase.
    #[arg(long)]
    json: bool,
}

impl Args {
    fn draws(&self) -> anyhow::Result<Draws> {
        match &self.trace {
            // Twice as many requests are sent as there are in a phase.
            Some(path) => Draws::trace(path, 2 * self.requests as usize),
            None => Ok(Draws::zipf(self.zipf, self.items, self.history, self.candidates, self.seed)),
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.deadline_ms.map(Duration::from_millis)
    }
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    ensure!(
        args.requests > 0 && args.concurrency > 0 && args.candidates > 0 && args.pages > 0 && args.items > 0,
        "requests, concurrency, candidates, pages and items must be at least 1"
    );
    ensure!(args.rate.is_none_or(|rate| rate.is_finite() && rate > 0.0), "--rate must be above 0");
    ensure!(args.items >= args.candidates.max(args.history), "--items must cover the candidates and the history");
    // Steeper than that, the rare items of a page are hardly ever drawn.
    ensure!((0.0..=1.5).contains(&args.zipf), "--zipf must be from 0 to 1.5");
    if args.scenario == Scenario::CacheCurve {
        curve::run(&args, &args.draws()?);
        return Ok(());
    }
    let server = client::mid_emb(&args.server).await?;
    let mut rng = Rng::with_seed(args.seed);
    let items = traffic::made_up(args.items, "hot", &mut rng).into();
    let bench = scenarios::Bench { server, items, args: &args };
    if args.scenario == Scenario::W7Reload {
        return reload::run(&bench).await;
    }
    let phases = match args.scenario {
        Scenario::W1Hot => bench.w1_hot().await?,
        Scenario::W2Cold => bench.w2_cold().await?,
        Scenario::W3Zipf => bench.w3_zipf(Arc::new(args.draws()?)).await?,
        Scenario::W4HotWhileCold => bench.w4_hot_while_cold().await?,
        Scenario::W5Overload => bench.w5_overload().await?,
        Scenario::W6ColdPage => bench.w6_cold_page().await?,
        Scenario::W7Reload | Scenario::CacheCurve => Vec::new(),
    };
    report::print(&args, &phases);
    Ok(())
}
