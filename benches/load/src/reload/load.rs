//! The load: all pages in turn, closed or open loop, every answer checked.

use super::pages::{Pages, Verdict};
use crate::{
    cli::{
        bench::{
            scenarios::Bench,
            traffic::{self, Client},
        },
        client::AdminClient,
    },
    wire::proto::FlushCacheRequest,
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

/// No server takes that long to say that a deadline is over.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// From when something began (or a request was due) to its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: Instant,
    pub(super) end: Instant,
}

impl Span {
    pub(super) fn took(self) -> Duration {
        self.end - self.start
    }

    pub(super) fn overlaps(self, other: Span) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Those that were answered.
    pub(super) answered: Vec<Span>,
    /// Those that were not, for whatever reason.
    pub(super) n_failed: u64,
    /// Answers that no config gives alone.
    pub(super) n_mixed: u64,
    /// Rows that could not be checked.
    pub(super) n_rows_not_ok: u64,
    first_fault: Option<String>,
}

impl Outcome {
    pub(super) fn n_sent(&self) -> u64 {
        self.answered.len() as u64 + self.n_failed
    }

    fn count(&mut self, span: Span, answer: Result<Verdict, String>) {
        let fault = match answer {
            Err(reason) => {
                self.n_failed += 1;
                Some(reason)
            }
            Ok(verdict) => {
                self.answered.push(span);
                self.judge(verdict)
            }
        };
        self.first_fault = self.first_fault.take().or(fault);
    }

    fn judge(&mut self, verdict: Verdict) -> Option<String> {
        match verdict {
            Verdict::Whole { n_rows_not_ok } => {
                self.n_rows_not_ok += n_rows_not_ok;
                None
            }
            Verdict::Mixed(reason) => {
                self.n_mixed += 1;
                Some(reason)
            }
        }
    }

    fn add(&mut self, other: Outcome) {
        self.answered.extend(other.answered);
        self.n_failed += other.n_failed;
        self.n_mixed += other.n_mixed;
        self.n_rows_not_ok += other.n_rows_not_ok;
        self.first_fault = self.first_fault.take().or(other.first_fault);
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} requests failed, {} answers were mixed", self.n_failed, self.n_sent(), self.n_mixed)?;
        self.first_fault.iter().try_for_each(|fault| write!(f, "; the first one: {fault}"))
    }
}

/// How fast requests follow each other.
#[derive(Debug, Clone, Copy)]
enum Pace {
    /// Closed loop: so many at once.
    AtOnce(usize),
    /// Open loop: so many a second.
    ASecond(f64),
}

/// Sends pages.
pub(super) struct Load {
    server: Client,
    admin: AdminClient,
    pages: Arc<Pages>,
    pace: Pace,
    deadline: Option<Duration>,
}

impl Load {
    pub(super) fn new(bench: &Bench<'_>, admin: AdminClient, pages: Arc<Pages>) -> Self {
        let pace = bench.args.rate.map_or(Pace::AtOnce(bench.args.concurrency), Pace::ASecond);
        Load { server: bench.server.clone(), admin, pages, pace, deadline: bench.args.deadline() }
    }

    /// Sends requests while there is `more`, which gets the number of the next one.
    pub(super) async fn send(
        self: &Arc<Self>,
        more: impl Fn(u64) -> bool + Send + Sync + 'static,
    ) -> anyhow::Result<Outcome> {
        match self.pace {
            Pace::AtOnce(n) => self.closed_loop(n, Arc::new(more)).await,
            Pace::ASecond(rate) => self.open_loop(rate, more).await,
        }
    }

    async fn closed_loop(
        self: &Arc<Self>,
        n_at_once: usize,
        more: Arc<impl Fn(u64) -> bool + Send + Sync + 'static>,
    ) -> anyhow::Result<Outcome> {
        let next = Arc::new(AtomicU64::new(0));
        let mut loops = JoinSet::new();
        for _ in 0..n_at_once {
            let (load, next, more) = (Arc::clone(self), Arc::clone(&next), Arc::clone(&more));
            loops.spawn(async move {
                let mut outcome = Outcome::default();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if !more(i) {
                        return outcome;
                    }
                    let (span, answer) = load.ask(i, Instant::now()).await;
                    outcome.count(span, answer);
                }
            });
        }
        let mut all = Outcome::default();
        while let Some(one) = loops.join_next().await {
            all.add(one?);
        }
        Ok(all)
    }

    async fn open_loop(self: &Arc<Self>, rate: f64, more: impl Fn(u64) -> bool) -> anyhow::Result<Outcome> {
        let (mut under_way, mut all) = (JoinSet::new(), Outcome::default());
        let start = Instant::now();
        for i in 0.. {
            let due = start + Duration::from_secs_f64(i as f64 / rate);
            tokio::time::sleep_until(due).await;
            if !more(i) {
                break;
            }
            let load = Arc::clone(self);
            under_way.spawn(async move { load.ask(i, due).await });
            while let Some(done) = under_way.try_join_next() {
                let (span, answer) = done?;
                all.count(span, answer);
            }
        }
        while let Some(done) = under_way.join_next().await {
            let (span, answer) = done?;
            all.count(span, answer);
        }
        Ok(all)
    }

    /// Asks the next page and checks the answer after its time was taken.
    async fn ask(&self, i: u64, due: Instant) -> (Span, Result<Verdict, String>) {
        self.forget_users(i);
        let page = (i % self.pages.requests.len() as u64) as usize;
        let request = traffic::with_deadline(self.pages.requests[page].clone(), self.deadline);
        let answer = timeout(ANSWER_WITHIN, self.server.clone().get_mid_emb(request)).await;
        let span = Span { start: due, end: Instant::now() };
        let verdict = match answer {
            Ok(Ok(answer)) => Ok(self.pages.check(page, answer.get_ref())),
            Ok(Err(status)) => Err(format!("page {page}: {:?}: {}", status.code(), status.message())),
            Err(_) => Err(format!("page {page}: no answer within {ANSWER_WITHIN:?}")),
        };
        (span, verdict)
    }

    /// Empties the user cache twice a round, beside the load. Where it fails, users are found: the report shows how many.
    fn forget_users(&self, i: u64) {
        let n_pages = self.pages.requests.len() as u64;
        if i.is_multiple_of((n_pages / 2).max(1)) {
            let mut admin = self.admin.clone();
            let flush = async move { admin.flush_cache(FlushCacheRequest { cache: "user".to_owned() }).await };
            drop(tokio::spawn(flush));
        }
    }
}
