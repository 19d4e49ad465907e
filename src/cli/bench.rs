//! `midemb bench`: the standard workload W1, closed loop.
//!
//! Items are made up from a seed and warmed first, so that every request is hot: ids alone, a history and a page of
//! candidates drawn at random. What counts is the server's own CPU time a request (from its `process_cpu_seconds_total`),
//! as latencies on a shared machine hold little.

use super::client::{self, refused, table};
use crate::wire::proto::{
    GetMidEmbRequest, Item, ItemText, RowStatus, WarmItemsRequest, mid_emb_service_client::MidEmbServiceClient,
};
use anyhow::{Context, bail, ensure};
use fastrand::Rng;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::{
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio_stream as stream;
use tonic::transport::Channel;

#[derive(Debug, Clone, clap::Args)]
pub(super) struct Args {
    /// The server's `server.listen`.
    #[arg(long, default_value = "127.0.0.1:50051")]
    server: String,
    /// The server's `telemetry.metrics_listen`.
    #[arg(long, default_value = "127.0.0.1:9464")]
    metrics: String,
    /// Requests in all.
    #[arg(long, default_value_t = 2000)]
    requests: u64,
    /// Requests under way at once.
    #[arg(long, default_value_t = 2)]
    concurrency: usize,
    /// Candidates of a request.
    #[arg(long, default_value_t = 500)]
    candidates: usize,
    /// History items of a request.
    #[arg(long, default_value_t = 80)]
    history: usize,
    /// Different items, all warmed before the first request.
    #[arg(long, default_value_t = 1000)]
    items: usize,
    /// Send every item's text with every request.
    #[arg(long)]
    send_text: bool,
    /// Requests in a row that send the same history, as the pages of one session do.
    #[arg(long, default_value_t = 1)]
    pages: u64,
    /// What the items are made up from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

type Client = MidEmbServiceClient<Channel>;

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    ensure!(
        args.requests > 0 && args.concurrency > 0 && args.candidates > 0 && args.pages > 0,
        "requests, concurrency, candidates and pages must be at least 1"
    );
    ensure!(args.items >= args.candidates.max(args.history), "--items must cover the candidates and the history");
    let server = client::mid_emb(&args.server).await?;
    let mut rng = Rng::with_seed(args.seed);
    let items: Vec<Item> = (0..args.items).map(|i| made_up(i, &mut rng)).collect();
    warm(server.clone(), &items).await?;
    // What the first requests grow (arenas, connections) is not the steady state.
    let warm_up = Args { requests: 20 * args.concurrency as u64, seed: rng.u64(..), ..args.clone() };
    drive(&warm_up, &server, &items).await?;
    let before = Scrape::read(&args.metrics).await?;
    let start = Instant::now();
    let latencies = drive(&args, &server, &items).await?;
    let took = start.elapsed();
    let after = Scrape::read(&args.metrics).await?;
    let result = Outcome { args: &args, latencies, took, before, after };
    if args.json {
        println!("{}", result.to_json())
    } else {
        result.print()
    }
    Ok(())
}

const WORDS: &[&str] = &[
    "silver", "river", "night", "garden", "winter", "paper", "lantern", "ocean", "copper", "mountain", "glass",
    "summer", "harbour", "velvet", "thunder", "orchard", "amber", "station", "violet", "desert", "island", "crystal",
    "forest", "echo",
];

/// An item whose text is about as long as a film's.
fn made_up(i: usize, rng: &mut Rng) -> Item {
    let mut words = |n: usize| (0..n).map(|_| WORDS[rng.usize(..WORDS.len())]).collect::<Vec<_>>().join(" ");
    let text = ItemText { title: format!("{} {i}", words(4)), category: words(3), ..ItemText::default() };
    Item { id: format!("bench-{i}"), text: Some(text) }
}

async fn warm(mut server: Client, items: &[Item]) -> anyhow::Result<()> {
    let chunks: Vec<_> = items.chunks(64).map(|chunk| WarmItemsRequest { items: chunk.to_vec() }).collect();
    let bar = progress(chunks.len() as u64, "warming");
    let counted = {
        let bar = bar.clone();
        stream::StreamExt::map(stream::iter(chunks), move |chunk| {
            bar.inc(1);
            chunk
        })
    };
    let warmed = server.warm_items(counted).await.map_err(refused("WarmItems"))?.into_inner();
    bar.finish_and_clear();
    ensure!(warmed.encoded + warmed.already_cached == items.len() as u64, "not every item could be warmed: {warmed:?}");
    Ok(())
}

fn progress(n: u64, what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(n).with_style(style).with_message(what)
}

/// Sends `args.requests` from as many loops as there may be requests under way.
async fn drive(args: &Args, server: &Client, items: &[Item]) -> anyhow::Result<Histogram<u64>> {
    let left = Arc::new(AtomicU64::new(args.requests));
    let bar = progress(args.requests, "sending");
    let mut loops = tokio::task::JoinSet::new();
    for i in 0..args.concurrency {
        let mut rng = Rng::with_seed(args.seed ^ (i as u64 + 1));
        let requests: Vec<GetMidEmbRequest> = (0..16).map(|_| request(args, items, &mut rng)).collect();
        loops.spawn(send(
            server.clone(),
            Session { requests, n_pages: args.pages, rng },
            Arc::clone(&left),
            bar.clone(),
        ));
    }
    let mut all = Histogram::new(3)?;
    while let Some(one) = loops.join_next().await {
        all.add(one??)?;
    }
    bar.finish_and_clear();
    Ok(all)
}

/// What one loop sends.
struct Session {
    /// Drawn beforehand, sent in turn.
    requests: Vec<GetMidEmbRequest>,
    /// After so many the history is one that was never sent: the server must not know its user.
    n_pages: u64,
    rng: Rng,
}

impl Session {
    fn next(&mut self, i: u64) -> GetMidEmbRequest {
        let n_requests = self.requests.len() as u64;
        let mut request = self.requests[(i % n_requests) as usize].clone();
        if i.is_multiple_of(self.n_pages) {
            self.rng.shuffle(&mut self.requests[0].history);
        }
        request.history.clone_from(&self.requests[0].history);
        request
    }
}

async fn send(
    mut server: Client,
    mut session: Session,
    left: Arc<AtomicU64>,
    bar: ProgressBar,
) -> anyhow::Result<Histogram<u64>> {
    let mut latencies = Histogram::new(3)?;
    for i in 0.. {
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_err() {
            break;
        }
        let request = session.next(i);
        let start = Instant::now();
        let answer = server.get_mid_emb(request).await.map_err(refused("GetMidEmb"))?.into_inner();
        latencies.record(start.elapsed().as_micros() as u64)?;
        if let Some(status) = answer.statuses().find(|status| *status != RowStatus::Ok) {
            bail!("a row is {}, so this is not the hot workload", status.as_str_name());
        }
        bar.inc(1);
    }
    Ok(latencies)
}

fn request(args: &Args, items: &[Item], rng: &mut Rng) -> GetMidEmbRequest {
    let mut draw = |n: usize| -> Vec<Item> {
        let chosen = rng.choose_multiple(items, n);
        chosen
            .into_iter()
            .map(|item| Item { id: item.id.clone(), text: item.text.clone().filter(|_| args.send_text) })
            .collect()
    };
    let (history, candidates) = (draw(args.history), draw(args.candidates));
    GetMidEmbRequest { user_id: format!("bench-user-{}", rng.u32(..)), history, candidates, ..Default::default() }
}

/// What the server says of itself.
#[derive(Debug, Clone, Copy)]
struct Scrape {
    cpu_seconds: f64,
    resident_bytes: f64,
}

impl Scrape {
    async fn read(address: &str) -> anyhow::Result<Self> {
        let url = format!("http://{address}/metrics");
        let fetch = move || -> anyhow::Result<String> {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).build().into();
            Ok(agent.get(&url).call().with_context(|| url.clone())?.body_mut().read_to_string()?)
        };
        let text = tokio::task::spawn_blocking(fetch).await??;
        let read = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.trim().parse::<f64>().ok()).with_context(|| format!("{address} has no {name}"))
        };
        Ok(Scrape {
            cpu_seconds: read("process_cpu_seconds_total")?,
            resident_bytes: read("process_resident_memory_bytes")?,
        })
    }
}

struct Outcome<'a> {
    args: &'a Args,
    latencies: Histogram<u64>,
    took: Duration,
    before: Scrape,
    after: Scrape,
}

impl Outcome<'_> {
    fn requests_per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }

    fn cpu_ms_per_request(&self) -> f64 {
        (self.after.cpu_seconds - self.before.cpu_seconds) * 1e3 / self.latencies.len() as f64
    }

    fn latency_ms(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64 / 1e3
    }

    fn print(&self) {
        let args = self.args;
        println!(
            "w1-hot: {} requests of {} history items and {} candidates, {} at once, {}",
            self.latencies.len(),
            args.history,
            args.candidates,
            args.concurrency,
            if args.send_text { "with text" } else { "ids alone" },
        );
        let mut figures =
            table(&["requests/s", "server CPU ms/request", "p50 ms", "p99 ms", "max ms", "server RSS MB"]);
        figures.add_row([
            format!("{:.0}", self.requests_per_second()),
            format!("{:.3}", self.cpu_ms_per_request()),
            format!("{:.2}", self.latency_ms(0.5)),
            format!("{:.2}", self.latency_ms(0.99)),
            format!("{:.2}", self.latencies.max() as f64 / 1e3),
            format!("{:.0}", self.after.resident_bytes / 1e6),
        ]);
        println!("{figures}");
    }

    fn to_json(&self) -> serde_json::Value {
        let args = self.args;
        json!({
            "scenario": "w1-hot",
            "requests": self.latencies.len(),
            "concurrency": args.concurrency,
            "history": args.history,
            "candidates": args.candidates,
            "send_text": args.send_text,
            "seconds": self.took.as_secs_f64(),
            "requests_per_second": self.requests_per_second(),
            "server_cpu_ms_per_request": self.cpu_ms_per_request(),
            "p50_ms": self.latency_ms(0.5),
            "p99_ms": self.latency_ms(0.99),
            "max_ms": self.latencies.max() as f64 / 1e3,
            "server_rss_bytes": self.after.resident_bytes,
        })
    }
}
