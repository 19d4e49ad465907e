//! The load: all pages in turn, in a closed or an open loop, with every answer checked.

use super::pages::{Pages, Verdict};
use crate::{
    scenarios::Bench,
    traffic::{self, Service},
};
use midemb_client::{AdminClient, proto::FlushCacheRequest};
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

/// A server that is alive answers sooner, if only that a deadline has passed.
const MAX_ANSWER_TIME: Duration = Duration::from_secs(30);

/// The time of a call, from its start (or from when a request was due) to its answer.
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

/// How the requests ended.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// The times of those that were answered.
    pub(super) answered: Vec<Span>,
    /// Requests without an answer.
    pub(super) n_failed: u64,
    /// Answers that are those of no config.
    pub(super) n_mixed: u64,
    /// Rows that could not be checked.
    pub(super) n_rows_not_ok: u64,
    first_fault: Option<String>,
}

impl Outcome {
    pub(super) fn n_sent(&self) -> u64 {
        self.answered.len() as u64 + self.n_failed
    }

    fn count(&mut self, span: Span, answer: Answer) {
        match answer {
            Answer::Failed(reason) => {
                self.n_failed += 1;
                self.first_fault.get_or_insert(reason);
            }
            Answer::Checked(Verdict::Whole { n_rows_not_ok }) => {
                self.answered.push(span);
                self.n_rows_not_ok += n_rows_not_ok;
            }
            Answer::Checked(Verdict::Mixed(reason)) => {
                self.answered.push(span);
                self.n_mixed += 1;
                self.first_fault.get_or_insert(reason);
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
        if let Some(fault) = &self.first_fault {
            write!(f, "; the first of these: {fault}")?;
        }
        Ok(())
    }
}

/// How one request ended.
enum Answer {
    /// It was answered.
    Checked(Verdict),
    /// It was not, and why.
    Failed(String),
}

/// How fast requests follow each other.
#[derive(Debug, Clone, Copy)]
enum Pace {
    /// Closed loop, with so many requests under way.
    Closed { n_under_way: usize },
    /// Open loop.
    Open { requests_per_second: f64 },
}

/// Sends pages.
pub(super) struct Load {
    server: Service,
    admin: AdminClient,
    pages: Arc<Pages>,
    pace: Pace,
    deadline: Option<Duration>,
}

impl Load {
    pub(super) fn new(bench: &Bench<'_>, admin: AdminClient, pages: Arc<Pages>) -> Self {
        let pace = match bench.args.rate {
            Some(requests_per_second) => Pace::Open { requests_per_second },
            None => Pace::Closed { n_under_way: bench.args.concurrency },
        };
        Load { server: bench.server.clone(), admin, pages, pace, deadline: bench.args.deadline() }
    }

    /// Sends requests until `more` is false for the number of the next one.
    pub(super) async fn send(
        self: &Arc<Self>,
        more: impl Fn(u64) -> bool + Send + Sync + 'static,
    ) -> anyhow::Result<Outcome> {
        match self.pace {
            Pace::Closed { n_under_way } => self.closed_loop(n_under_way, Arc::new(more)).await,
            Pace::Open { requests_per_second } => self.open_loop(requests_per_second, more).await,
        }
    }

    async fn closed_loop(
        self: &Arc<Self>,
        n_under_way: usize,
        more: Arc<impl Fn(u64) -> bool + Send + Sync + 'static>,
    ) -> anyhow::Result<Outcome> {
        let next = Arc::new(AtomicU64::new(0));
        let mut loops = JoinSet::new();
        for _ in 0..n_under_way {
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
        while let Some(outcome) = loops.join_next().await {
            all.add(outcome?);
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

    /// Asks the next page. The check of its answer is not part of its time.
    async fn ask(&self, i: u64, due: Instant) -> (Span, Answer) {
        self.flush_users(i);
        let page = (i % self.pages.requests.len() as u64) as usize;
        let request = traffic::with_deadline(self.pages.requests[page].clone(), self.deadline);
        let answer = timeout(MAX_ANSWER_TIME, self.server.clone().get_mid_emb(request)).await;
        let span = Span { start: due, end: Instant::now() };
        let answer = match answer {
            Ok(Ok(answer)) => Answer::Checked(self.pages.check(page, answer.get_ref())),
            Ok(Err(status)) => Answer::Failed(format!("page {page}: {:?}: {}", status.code(), status.message())),
            Err(_) => Answer::Failed(format!("page {page}: no answer within {MAX_ANSWER_TIME:?}")),
        };
        (span, answer)
    }

    /// Empties the user cache twice per round of all pages, without waiting for it. Where that fails, requests find their users,
    /// and the report shows how many.
    fn flush_users(&self, i: u64) {
        let n_pages = self.pages.requests.len() as u64;
        if i.is_multiple_of((n_pages / 2).max(1)) {
            let admin = self.admin.clone();
            let flush = async move { admin.flush_cache(FlushCacheRequest { cache: "user".to_owned() }).await };
            drop(tokio::spawn(flush));
        }
    }
}
