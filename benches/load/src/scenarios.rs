//! What each scenario sends, and in which phases it is measured.

use super::{
    Args,
    draws::Draws,
    scrape::{HitRates, Scrape},
    traffic::{self, Answers, Client, Workload},
};
use crate::wire::proto::{GetMidEmbRequest, Item};
use anyhow::{bail, ensure};
use fastrand::Rng;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// One measured phase of a scenario.
#[derive(Debug)]
pub(super) struct Phase {
    pub(super) name: &'static str,
    /// "request" or "item": what is counted.
    pub(super) unit: &'static str,
    pub(super) n_units: u64,
    /// None where no single requests were timed.
    pub(super) answers: Option<Answers>,
    pub(super) cost: Cost,
}

/// What a phase took, of time and of the server.
#[derive(Debug)]
pub(super) struct Cost {
    pub(super) took: Duration,
    pub(super) cpu_seconds: f64,
    /// At the end of it.
    pub(super) resident_bytes: f64,
    pub(super) hit_rates: HitRates,
}

impl Phase {
    fn of(name: &'static str, (answers, cost): (Answers, Cost)) -> Self {
        Phase { name, unit: "request", n_units: answers.n_sent(), answers: Some(answers), cost }
    }

    /// Of the rows answered, those that are OK.
    pub(super) fn rows_ok(&self) -> Option<f64> {
        let answers = self.answers.as_ref().filter(|answers| answers.n_rows > 0)?;
        Some(answers.n_rows_ok as f64 / answers.n_rows as f64)
    }

    /// Answered in full and in time, a second.
    pub(super) fn goodput(&self) -> f64 {
        let n_good = self.answers.as_ref().map_or(self.n_units, |answers| answers.latencies.len());
        n_good as f64 / self.cost.took.as_secs_f64()
    }

    /// Server CPU milliseconds for each unit sent.
    pub(super) fn cpu_ms(&self) -> f64 {
        self.cost.cpu_seconds * 1e3 / self.n_units as f64
    }

    pub(super) fn latency_ms(&self, quantile: f64) -> Option<f64> {
        let latencies = &self.answers.as_ref()?.latencies;
        (!latencies.is_empty()).then(|| latencies.value_at_quantile(quantile) as f64 / 1e3)
    }
}

/// Sends to one server.
pub(super) struct Bench<'a> {
    pub(super) server: Client,
    pub(super) items: Arc<[Item]>,
    pub(super) args: &'a Args,
}

/// What w5-overload sends, as a multiple of what the server took in its first phase.
const OVERLOAD: f64 = 3.0;
const OVERLOAD_DEADLINE_MS: u64 = 100;
const COLD_PAGES: usize = 5;
const COLD_PAGE_DEADLINE_MS: u64 = 50;
/// Longer than any scenario leaves work behind.
const SETTLING: Duration = Duration::from_secs(120);

/// `n` items that no server has seen.
fn cold(n: usize) -> Vec<Item> {
    let mut rng = Rng::new();
    traffic::made_up(n, &format!("cold-{}", rng.u64(..)), &mut rng)
}

impl Bench<'_> {
    pub(super) async fn w1_hot(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        Ok(vec![self.phase("hot", self.args).await?])
    }

    pub(super) async fn w2_cold(&self) -> anyhow::Result<Vec<Phase>> {
        // What the first batches grow is not the steady state.
        traffic::warm(self.server.clone(), &cold(64)).await?;
        self.settle().await?;
        let items = cold(self.args.items);
        let ((), cost) = self.measure(traffic::warm(self.server.clone(), &items)).await?;
        let n_units = items.len() as u64;
        Ok(vec![Phase { name: "cold items", unit: "item", n_units, answers: None, cost }])
    }

    pub(super) async fn w3_zipf(&self, draws: Arc<Draws>) -> anyhow::Result<Vec<Phase>> {
        self.settle().await?;
        let first = Workload::Drawn(Arc::clone(&draws), 0);
        let first = self.phase_of("caches as they are", self.args, &first).await?;
        self.settle().await?;
        let then = Workload::Drawn(draws, self.args.requests);
        Ok(vec![first, self.phase_of("then", self.args, &then).await?])
    }

    pub(super) async fn w4_hot_while_cold(&self) -> anyhow::Result<Vec<Phase>> {
        ensure!(self.args.rate.is_some(), "w4-hot-while-cold wants a --rate that the server keeps up with alone");
        self.prepare().await?;
        let alone = self.phase("hot alone", self.args).await?;
        let server = self.server.clone();
        let cold = tokio::spawn(async move {
            // Ends with the phase; until then there is always more.
            while traffic::warm(server.clone(), &cold(512)).await.is_ok() {}
        });
        // The encoder's queue fills first.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let beside = self.phase("hot beside cold", self.args).await;
        cold.abort();
        Ok(vec![alone, beside?])
    }

    pub(super) async fn w5_overload(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        let closed = Args { rate: None, deadline_ms: None, concurrency: 8, ..self.args.clone() };
        let capacity = self.phase("capacity, closed loop", &closed).await?;
        let rate = OVERLOAD * capacity.goodput();
        let open = Args {
            rate: Some(rate),
            deadline_ms: Some(self.args.deadline_ms.unwrap_or(OVERLOAD_DEADLINE_MS)),
            requests: (self.args.requests as f64 * OVERLOAD) as u64,
            ..self.args.clone()
        };
        let overload = self.phase("three times that, open loop", &open).await?;
        let after = self.phase("afterwards, closed loop", &closed).await?;
        Ok(vec![capacity, overload, after])
    }

    /// The history is hot, so all that a page waits for is its own.
    pub(super) async fn w6_cold_page(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        let id = |item: &Item| Item { id: item.id.clone(), text: None };
        let history: Vec<Item> = self.items.iter().take(self.args.history).map(id).collect();
        let page = |i| GetMidEmbRequest {
            user_id: format!("bench-user-{i}"),
            history: history.clone(),
            candidates: cold(self.args.candidates),
            ..Default::default()
        };
        let pages: Vec<GetMidEmbRequest> = (0..COLD_PAGES).map(page).collect();
        let deadline = Duration::from_millis(self.args.deadline_ms.unwrap_or(COLD_PAGE_DEADLINE_MS));
        let settled = async || self.settle().await;
        let first = traffic::send_one_by_one(&self.server, &pages, Some(deadline), settled);
        let first = Phase::of("never seen", self.measure(first).await?);
        let again = traffic::send_one_by_one(&self.server, &pages, None, async || Ok(()));
        Ok(vec![first, Phase::of("the same again", self.measure(again).await?)])
    }

    /// Waits until the server has done what was left to it: no request waits for it, and it would be in the figures.
    pub(super) async fn settle(&self) -> anyhow::Result<()> {
        let (start, mut n_idle) = (Instant::now(), 0);
        // Twice: between two batches the queue may be empty for a moment.
        while n_idle < 2 {
            n_idle = if self.scrape().await?.n_queued_to_encode > 0.0 { 0 } else { n_idle + 1 };
            if start.elapsed() > SETTLING {
                bail!("the server's encoder is still busy after {SETTLING:?}: does somebody else use it?");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Warms the items, then the paths: what the first requests grow (arenas, connections) is not the steady state.
    async fn prepare(&self) -> anyhow::Result<()> {
        traffic::warm(self.server.clone(), &self.items).await?;
        self.settle().await?;
        let first = Args { requests: 40, rate: None, deadline_ms: None, ..self.args.clone() };
        traffic::send(&first, &self.server, &self.hot()).await.map(drop)
    }

    fn hot(&self) -> Workload {
        Workload::Hot(Arc::clone(&self.items))
    }

    async fn phase(&self, name: &'static str, args: &Args) -> anyhow::Result<Phase> {
        self.phase_of(name, args, &self.hot()).await
    }

    async fn phase_of(&self, name: &'static str, args: &Args, workload: &Workload) -> anyhow::Result<Phase> {
        Ok(Phase::of(name, self.measure(traffic::send(args, &self.server, workload)).await?))
    }

    /// What `work` gives, and what it cost the server.
    async fn measure<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<(T, Cost)> {
        let (before, start) = (self.scrape().await?, Instant::now());
        let result = work.await?;
        let took = start.elapsed();
        let after = self.scrape().await?;
        let cpu_seconds = after.cpu_seconds - before.cpu_seconds;
        let hit_rates = after.hit_rates_since(&before);
        Ok((result, Cost { took, cpu_seconds, resident_bytes: after.resident_bytes, hit_rates }))
    }

    pub(super) async fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::read(&self.args.metrics).await
    }
}
