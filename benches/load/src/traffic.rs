//! Two ways to send requests: a closed loop (the next one when the last was answered) and an open loop (when they are due).

use crate::{args::Args, draws::Draws, items::id_alone, terminal::progress};
use anyhow::{bail, ensure};
use fastrand::Rng;
use hdrhistogram::Histogram;
use midemb_client::{
    Channel, Code, Error, Status,
    proto::{
        GetMidEmbRequest, GetMidEmbResponse, Item, Output, RowStatus, WarmItemsRequest,
        mid_emb_service_client::MidEmbServiceClient,
    },
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{task::JoinSet, time::Instant};
use tokio_stream as stream;
use tonic::Request;

/// Sends every call once, as it is.
pub(crate) type Service = MidEmbServiceClient<Channel>;

const WARM_UP_CHUNK: usize = 64;
/// How many different pages w1-hot sends in turn.
const N_DIFFERENT_PAGES: usize = 16;

/// Sends all of `items` through WarmItems; an error unless all are cached afterwards.
pub(crate) async fn warm(mut server: Service, items: &[Item]) -> anyhow::Result<()> {
    let chunks: Vec<WarmItemsRequest> =
        items.chunks(WARM_UP_CHUNK).map(|chunk| WarmItemsRequest { items: chunk.to_vec() }).collect();
    let bar = progress(chunks.len() as u64, "warming");
    let counted = {
        let bar = bar.clone();
        stream::StreamExt::map(stream::iter(chunks), move |chunk| {
            bar.inc(1);
            chunk
        })
    };
    let warmed = server.warm_items(counted).await.map_err(Error::failed("WarmItems"))?.into_inner();
    bar.finish_and_clear();
    ensure!(
        warmed.encoded + warmed.already_cached == items.len() as u64,
        "of {} items {} were invalid and {} failed: they cannot all be warmed",
        items.len(),
        warmed.invalid,
        warmed.failed
    );
    Ok(())
}

/// What a phase asks for.
#[derive(Debug, Clone)]
pub(crate) enum Workload {
    /// These items, which were warmed: every row must be OK.
    Hot(Arc<[Item]>),
    /// Drawn requests. Rows may be late.
    Drawn {
        /// All of them.
        draws: Arc<Draws>,
        /// The number of the phase's first request.
        first: u64,
    },
}

/// The requests of one loop.
enum Feed {
    Hot(HotPages),
    Drawn { draws: Arc<Draws>, first: u64 },
}

impl Feed {
    fn new(args: &Args, workload: &Workload) -> Self {
        match workload {
            Workload::Hot(items) => Feed::Hot(HotPages::new(args, items)),
            Workload::Drawn { draws, first } => Feed::Drawn { draws: Arc::clone(draws), first: *first },
        }
    }

    /// The next request, which is the loop's `i_in_loop`-th and the phase's `i_in_phase`-th.
    fn next(&mut self, i_in_loop: u64, i_in_phase: u64) -> GetMidEmbRequest {
        match self {
            Feed::Hot(pages) => pages.next(i_in_loop),
            Feed::Drawn { draws, first } => draws.request(*first + i_in_phase),
        }
    }
}

/// A request with its deadline, if there is one.
pub(crate) fn with_deadline(request: GetMidEmbRequest, deadline: Option<Duration>) -> Request<GetMidEmbRequest> {
    let mut request = Request::new(request);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    request
}

/// Pages drawn beforehand and sent in turn, all with one history, which changes from session to session.
struct HotPages {
    pages: Vec<GetMidEmbRequest>,
    history: Vec<Item>,
    /// How many requests in a row send the same history. After that it is one that was never sent, so that the server does not
    /// find the user in its cache.
    n_pages_per_session: u64,
    rng: Rng,
}

impl HotPages {
    fn new(args: &Args, items: &[Item]) -> Self {
        let mut rng = Rng::new();
        let mut pages: Vec<GetMidEmbRequest> =
            (0..N_DIFFERENT_PAGES).map(|_| draw_page(args, items, &mut rng)).collect();
        let history = std::mem::take(&mut pages[0].history);
        HotPages { pages, history, n_pages_per_session: args.pages, rng }
    }

    fn next(&mut self, i: u64) -> GetMidEmbRequest {
        if i.is_multiple_of(self.n_pages_per_session) {
            self.rng.shuffle(&mut self.history);
        }
        let page = &self.pages[(i % self.pages.len() as u64) as usize];
        GetMidEmbRequest {
            user_id: page.user_id.clone(),
            history: self.history.clone(),
            candidates: page.candidates.clone(),
            ..Default::default()
        }
    }
}

/// Different items as history and as candidates.
pub(crate) fn draw_page(args: &Args, items: &[Item], rng: &mut Rng) -> GetMidEmbRequest {
    let mut draw = |n: usize| -> Vec<Item> {
        let chosen = rng.choose_multiple(items, n).into_iter();
        if args.send_text { chosen.cloned().collect() } else { chosen.map(id_alone).collect() }
    };
    let (history, candidates) = (draw(args.history), draw(args.candidates));
    let outputs = if args.cvr_only { vec![Output::Cvr.into()] } else { Vec::new() };
    GetMidEmbRequest {
        user_id: format!("bench-user-{}", rng.u32(..)),
        history,
        candidates,
        outputs,
        ..Default::default()
    }
}

/// The answers of one phase, counted.
#[derive(Debug)]
pub(crate) struct Answers {
    /// Microseconds of the requests that were answered in time.
    pub(crate) latencies: Histogram<u64>,
    /// Requests that were turned away at once (RESOURCE_EXHAUSTED).
    pub(crate) n_shed: u64,
    /// Requests that ended with DEADLINE_EXCEEDED, or whose answer came after the deadline.
    pub(crate) n_late: u64,
    /// Candidates of answered requests.
    pub(crate) n_rows: u64,
    /// Candidates that are OK.
    pub(crate) n_rows_ok: u64,
}

impl Answers {
    fn new() -> anyhow::Result<Self> {
        Ok(Answers { latencies: Histogram::new(3)?, n_shed: 0, n_late: 0, n_rows: 0, n_rows_ok: 0 })
    }

    pub(crate) fn n_sent(&self) -> u64 {
        self.latencies.len() + self.n_shed + self.n_late
    }

    /// `took` counts from when the request was due.
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
                if deadline.is_none_or(|deadline| took <= deadline) {
                    self.latencies.record(took.as_micros() as u64)?;
                } else {
                    self.n_late += 1;
                }
            }
            Err(status) if status.code() == Code::ResourceExhausted => self.n_shed += 1,
            // tonic's client says CANCELLED where its own timer was first.
            Err(status) if matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled) => self.n_late += 1,
            Err(status) => return Err(Error::failed("GetMidEmb")(status).into()),
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

/// Sends `args.requests` requests, in an open loop where there is a rate and in a closed loop otherwise.
pub(crate) async fn send(args: &Args, server: &Service, workload: &Workload) -> anyhow::Result<Answers> {
    let answers = match args.rate {
        None => closed_loop(args, server, workload).await?,
        Some(rate) => open_loop(args, server, workload, rate).await?,
    };
    if matches!(workload, Workload::Hot(_)) && answers.n_rows_ok < answers.n_rows {
        let n_not_ok = answers.n_rows - answers.n_rows_ok;
        bail!("{n_not_ok} of {} rows are not OK, though all items were warmed", answers.n_rows);
    }
    Ok(answers)
}

/// Sends one request after the other and awaits `pause` after each.
pub(crate) async fn send_one_by_one(
    server: &Service,
    requests: &[GetMidEmbRequest],
    deadline: Option<Duration>,
    pause: impl AsyncFn() -> anyhow::Result<()>,
) -> anyhow::Result<Answers> {
    let mut answers = Answers::new()?;
    for request in requests {
        let request = with_deadline(request.clone(), deadline);
        let start = Instant::now();
        let answer = server.clone().get_mid_emb(request).await.map(tonic::Response::into_inner);
        answers.count(answer, start.elapsed(), deadline)?;
        pause().await?;
    }
    Ok(answers)
}

/// Runs `args.concurrency` loops, each of which sends its next request when its last one was answered.
async fn closed_loop(args: &Args, server: &Service, workload: &Workload) -> anyhow::Result<Answers> {
    let n_left = Arc::new(AtomicU64::new(args.requests));
    let bar = progress(args.requests, "sending");
    let mut loops = JoinSet::new();
    for _ in 0..args.concurrency {
        let (mut server, n_left, bar) = (server.clone(), Arc::clone(&n_left), bar.clone());
        let mut feed = Feed::new(args, workload);
        let (deadline, n_requests) = (args.deadline(), args.requests);
        loops.spawn(async move {
            let mut answers = Answers::new()?;
            for i_in_loop in 0.. {
                let taken = n_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                let Ok(n_left) = taken else { break };
                let request = with_deadline(feed.next(i_in_loop, n_requests - n_left), deadline);
                let start = Instant::now();
                let answer = server.get_mid_emb(request).await.map(tonic::Response::into_inner);
                answers.count(answer, start.elapsed(), deadline)?;
                bar.inc(1);
            }
            anyhow::Ok(answers)
        });
    }
    let mut all = Answers::new()?;
    while let Some(answers) = loops.join_next().await {
        all.add(answers??)?;
    }
    bar.finish_and_clear();
    Ok(all)
}

/// Sends each request when it is due, whether or not earlier ones were answered: a waiting client would spare a slow server.
async fn open_loop(args: &Args, server: &Service, workload: &Workload, rate: f64) -> anyhow::Result<Answers> {
    let bar = progress(args.requests, "sending");
    let (mut feed, deadline) = (Feed::new(args, workload), args.deadline());
    let (mut under_way, mut all) = (JoinSet::new(), Answers::new()?);
    let start = Instant::now();
    for i in 0..args.requests {
        let due = start + Duration::from_secs_f64(i as f64 / rate);
        let (mut server, request) = (server.clone(), with_deadline(feed.next(i, i), deadline));
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
