//! Items, requests, and the two ways to send them: closed loop (as fast as answers come) and open loop (when they are due).

use super::{Args, draws::Draws};
use crate::{
    cli::client::refused,
    wire::proto::{
        GetMidEmbRequest, GetMidEmbResponse, Item, ItemText, RowStatus, WarmItemsRequest,
        mid_emb_service_client::MidEmbServiceClient,
    },
};
use anyhow::bail;
use fastrand::Rng;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};
use tokio_stream as stream;
use tonic::{Code, Request, Status, transport::Channel};

pub(super) type Client = MidEmbServiceClient<Channel>;

const WORDS: &[&str] = &[
    "silver", "river", "night", "garden", "winter", "paper", "lantern", "ocean", "copper", "mountain", "glass",
    "summer", "harbour", "velvet", "thunder", "orchard", "amber", "station", "violet", "desert", "island", "crystal",
    "forest", "echo",
];

/// `n` items whose texts are about as long as films' and whose ids start with `prefix`.
pub(super) fn made_up(n: usize, prefix: &str, rng: &mut Rng) -> Vec<Item> {
    let mut item =
        |i: usize| Item { id: format!("{prefix}-{i}"), text: Some(made_up_text(&format!("{prefix} {i}"), rng)) };
    (0..n).map(&mut item).collect()
}

/// A text about as long as a film's, with `tag` in its title.
pub(super) fn made_up_text(tag: &str, rng: &mut Rng) -> ItemText {
    let mut words = |n: usize| (0..n).map(|_| WORDS[rng.usize(..WORDS.len())]).collect::<Vec<_>>().join(" ");
    ItemText { title: format!("{} {tag}", words(4)), category: words(3), ..ItemText::default() }
}

/// Sends all of `items` through WarmItems; an error unless every one of them is cached afterwards.
pub(super) async fn warm(mut server: Client, items: &[Item]) -> anyhow::Result<()> {
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
    if warmed.encoded + warmed.already_cached != items.len() as u64 {
        bail!("not every item could be warmed: {warmed:?}");
    }
    Ok(())
}

pub(super) fn progress(n: u64, what: &'static str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(n).with_style(style).with_message(what)
}

/// What a phase asks for.
#[derive(Debug, Clone)]
pub(super) enum Workload {
    /// Ids of these items, which were warmed: every row has to be OK.
    Hot(Arc<[Item]>),
    /// Whatever is drawn, from this request on. Rows may be late.
    Drawn(Arc<Draws>, u64),
}

/// Where the requests of one loop come from.
enum Feed {
    Hot(Session),
    Drawn(Arc<Draws>, u64, Option<Duration>),
}

impl Feed {
    fn new(args: &Args, workload: &Workload) -> Self {
        match workload {
            Workload::Hot(items) => Feed::Hot(Session::new(args, items)),
            Workload::Drawn(draws, first) => Feed::Drawn(Arc::clone(draws), *first, args.deadline()),
        }
    }

    /// The loop's `own`-th request, which is the phase's `i`-th.
    fn next(&mut self, own: u64, i: u64) -> Request<GetMidEmbRequest> {
        match self {
            Feed::Hot(session) => session.next(own),
            Feed::Drawn(draws, first, deadline) => with_deadline(draws.request(*first + i), *deadline),
        }
    }
}

pub(super) fn with_deadline(request: GetMidEmbRequest, deadline: Option<Duration>) -> Request<GetMidEmbRequest> {
    let mut request = Request::new(request);
    deadline.into_iter().for_each(|deadline| request.set_timeout(deadline));
    request
}

/// Requests drawn beforehand and sent in turn.
struct Session {
    requests: Vec<GetMidEmbRequest>,
    /// After so many the history is one that was never sent: the server must not know its user.
    n_pages: u64,
    deadline: Option<Duration>,
    rng: Rng,
}

impl Session {
    fn new(args: &Args, items: &[Item]) -> Self {
        let mut rng = Rng::new();
        let requests = (0..16).map(|_| request(args, items, &mut rng)).collect();
        Session { requests, n_pages: args.pages, deadline: args.deadline(), rng }
    }

    fn next(&mut self, i: u64) -> Request<GetMidEmbRequest> {
        let n_requests = self.requests.len() as u64;
        if i.is_multiple_of(self.n_pages) {
            self.rng.shuffle(&mut self.requests[0].history);
        }
        let mut request = self.requests[(i % n_requests) as usize].clone();
        request.history.clone_from(&self.requests[0].history);
        with_deadline(request, self.deadline)
    }
}

/// Different items of `items` as history and as candidates.
pub(super) fn request(args: &Args, items: &[Item], rng: &mut Rng) -> GetMidEmbRequest {
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

/// What became of the requests of one phase.
#[derive(Debug)]
pub(super) struct Answers {
    /// Microseconds of those that were answered in full and in time.
    pub(super) latencies: Histogram<u64>,
    /// Turned away at once, with a time to come back.
    pub(super) n_shed: u64,
    /// DEADLINE_EXCEEDED, or the client's own deadline passed.
    pub(super) n_late: u64,
    /// Candidates of those that were answered.
    pub(super) n_rows: u64,
    /// Those of them that are OK.
    pub(super) n_rows_ok: u64,
}

impl Answers {
    fn new() -> anyhow::Result<Self> {
        Ok(Answers { latencies: Histogram::new(3)?, n_shed: 0, n_late: 0, n_rows: 0, n_rows_ok: 0 })
    }

    pub(super) fn n_sent(&self) -> u64 {
        self.latencies.len() + self.n_shed + self.n_late
    }

    /// `took` since the request was due, which is within `deadline` or too late.
    fn count(
        &mut self,
        answer: Result<GetMidEmbResponse, Status>,
        took: Duration,
        deadline: Option<Duration>,
    ) -> anyhow::Result<()> {
        match answer {
            Ok(answer) => {
                self.n_rows += answer.statuses.len() as u64;
                self.n_rows_ok += answer.statuses().filter(|status| *status == RowStatus::Ok).count() as u64;
                match deadline.is_none_or(|deadline| took <= deadline) {
                    true => self.latencies.record(took.as_micros() as u64)?,
                    false => self.n_late += 1,
                }
            }
            Err(status) if status.code() == Code::ResourceExhausted => self.n_shed += 1,
            // tonic's client says CANCELLED where its own timer was first.
            Err(status) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) => self.n_late += 1,
            Err(status) => return Err(refused("GetMidEmb")(status)),
        }
        Ok(())
    }

    fn add(&mut self, other: Answers) -> anyhow::Result<()> {
        self.latencies.add(other.latencies)?;
        self.n_shed += other.n_shed;
        self.n_late += other.n_late;
        self.n_rows += other.n_rows;
        self.n_rows_ok += other.n_rows_ok;
        Ok(())
    }
}

/// Sends `args.requests`, closed loop or, where there is a rate, open loop.
pub(super) async fn send(args: &Args, server: &Client, workload: &Workload) -> anyhow::Result<Answers> {
    let answers = match args.rate {
        None => closed_loop(args, server, workload).await?,
        Some(rate) => open_loop(args, server, workload, rate).await?,
    };
    if matches!(workload, Workload::Hot(_)) && answers.n_rows_ok < answers.n_rows {
        bail!(
            "{} rows of {} are not OK: this is not the hot workload",
            answers.n_rows - answers.n_rows_ok,
            answers.n_rows
        );
    }
    Ok(answers)
}

/// Sends one request after the other; `between` runs after each.
pub(super) async fn send_one_by_one(
    server: &Client,
    requests: &[GetMidEmbRequest],
    deadline: Option<Duration>,
    between: impl AsyncFn() -> anyhow::Result<()>,
) -> anyhow::Result<Answers> {
    let mut answers = Answers::new()?;
    for request in requests {
        let request = with_deadline(request.clone(), deadline);
        let start = Instant::now();
        let answer = server.clone().get_mid_emb(request).await.map(tonic::Response::into_inner);
        answers.count(answer, start.elapsed(), deadline)?;
        between().await?;
    }
    Ok(answers)
}

/// As many loops as there may be requests under way; each sends its next request when its last one was answered.
async fn closed_loop(args: &Args, server: &Client, workload: &Workload) -> anyhow::Result<Answers> {
    let left = Arc::new(AtomicU64::new(args.requests));
    let bar = progress(args.requests, "sending");
    let mut loops = JoinSet::new();
    for _ in 0..args.concurrency {
        let (mut server, left, bar) = (server.clone(), Arc::clone(&left), bar.clone());
        let mut feed = Feed::new(args, workload);
        let (deadline, n_requests) = (args.deadline(), args.requests);
        loops.spawn(async move {
            let mut answers = Answers::new()?;
            for own in 0.. {
                let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let Ok(n_left) = taken else { break };
                let request = feed.next(own, n_requests - n_left);
                let start = Instant::now();
                let answer = server.get_mid_emb(request).await.map(tonic::Response::into_inner);
                answers.count(answer, start.elapsed(), deadline)?;
                bar.inc(1);
            }
            anyhow::Ok(answers)
        });
    }
    let mut all = Answers::new()?;
    while let Some(one) = loops.join_next().await {
        all.add(one??)?;
    }
    bar.finish_and_clear();
    Ok(all)
}

/// A request whenever one is due, whatever became of those before: a slow server is not spared by a waiting client.
async fn open_loop(args: &Args, server: &Client, workload: &Workload, rate: f64) -> anyhow::Result<Answers> {
    let bar = progress(args.requests, "sending");
    let (mut feed, deadline) = (Feed::new(args, workload), args.deadline());
    let (mut under_way, mut all) = (JoinSet::new(), Answers::new()?);
    let start = Instant::now();
    for i in 0..args.requests {
        let due = start + Duration::from_secs_f64(i as f64 / rate);
        let (mut server, request) = (server.clone(), feed.next(i, i));
        tokio::time::sleep_until(due).await;
        under_way.spawn(async move {
            let answer = server.get_mid_emb(request).await.map(tonic::Response::into_inner);
            (answer, due.elapsed())
        });
        while let Some(done) = under_way.try_join_next() {
            let (answer, took) = done?;
            all.count(answer, took, deadline)?;
        }
        bar.inc(1);
    }
    while let Some(done) = under_way.join_next().await {
        let (answer, took) = done?;
        all.count(answer, took, deadline)?;
    }
    bar.finish_and_clear();
    Ok(all)
}
