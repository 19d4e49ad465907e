//! What each scenario sends, and in which phases it is measured.

use crate::{
    args::Args,
    draws::Draws,
    items::{cold, id_alone},
    scrape::{HitRates, Scrape},
    traffic::{self, Answers, Service, Workload},
};
use anyhow::ensure;
use midemb_client::proto::{GetMidEmbRequest, Item};
use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

/// One measured phase of a scenario.
#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    pub(crate) n_units: u64,
    /// None where single requests were not timed.
    pub(crate) answers: Option<Answers>,
    pub(crate) cost: Cost,
}

/// What a phase counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Request,
    Item,
}

impl Unit {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Unit::Request => "request",
            Unit::Item => "item",
        }
    }
}

/// What a phase cost.
#[derive(Debug)]
pub(crate) struct Measured<T> {
    result: T,
    cost: Cost,
}

/// The time that a phase took, and what it cost the server.
#[derive(Debug)]
pub(crate) struct Cost {
    pub(crate) took: Duration,
    pub(crate) cpu_seconds: f64,
    /// At the end of the phase.
    pub(crate) resident_bytes: f64,
    pub(crate) hit_rates: HitRates,
}

impl Phase {
    fn new(name: &'static str, measured: Measured<Answers>) -> Self {
        let Measured { result: answers, cost } = measured;
        Phase { name, unit: Unit::Request, n_units: answers.n_sent(), answers: Some(answers), cost }
    }

    /// The part of the answered rows that is OK.
    pub(crate) fn rows_ok(&self) -> Option<f64> {
        let answers = self.answers.as_ref().filter(|answers| answers.n_rows > 0)?;
        Some(answers.n_rows_ok as f64 / answers.n_rows as f64)
    }

    /// Units per second that were answered in time.
    pub(crate) fn goodput(&self) -> f64 {
        let n_good = self.answers.as_ref().map_or(self.n_units, |answers| answers.latencies.len());
        n_good as f64 / self.cost.took.as_secs_f64()
    }

    /// Server CPU milliseconds per unit sent.
    pub(crate) fn cpu_ms(&self) -> f64 {
        self.cost.cpu_seconds * 1e3 / self.n_units as f64
    }

    pub(crate) fn latency_ms(&self, quantile: f64) -> Option<f64> {
        let latencies = &self.answers.as_ref()?.latencies;
        (!latencies.is_empty()).then(|| latencies.value_at_quantile(quantile) as f64 / 1e3)
    }
}

/// A server and what is sent to it.
pub(crate) struct Bench<'a> {
    pub(crate) server: Service,
    pub(crate) items: Arc<[Item]>,
    pub(crate) args: &'a Args,
}

/// The load of w5-overload, as a multiple of the server's capacity in the first phase.
/// Cold pages of one item: about three times what the encoder of the shipped bundle takes on two cores.
const COLD_PAGES_PER_SECOND: u32 = 600;
const COLD_CALL_DEADLINE: Duration = Duration::from_secs(1);
const OVERLOAD: f64 = 3.0;
const OVERLOAD_DEADLINE_MS: u64 = 100;
const COLD_PAGES: usize = 5;
const COLD_PAGE_DEADLINE_MS: u64 = 50;
/// The work that any scenario leaves behind is done sooner.
const MAX_SETTLING: Duration = Duration::from_secs(120);

impl Bench<'_> {
    pub(crate) async fn w1_hot(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        Ok(vec![self.phase("hot", self.args).await?])
    }

    pub(crate) async fn w2_cold(&self) -> anyhow::Result<Vec<Phase>> {
        // The first batches allocate memory, which is not the steady state.
        traffic::warm(self.server.clone(), &cold(64)).await?;
        self.settle().await?;
        let items = cold(self.args.items);
        let cost = self.measure(traffic::warm(self.server.clone(), &items)).await?.cost;
        let n_units = items.len() as u64;
        Ok(vec![Phase { name: "cold items", unit: Unit::Item, n_units, answers: None, cost }])
    }

    pub(crate) async fn w3_zipf(&self, draws: Arc<Draws>) -> anyhow::Result<Vec<Phase>> {
        self.settle().await?;
        let first = Workload::Drawn { draws: Arc::clone(&draws), first: 0 };
        let first = self.phase_of("caches as they are", self.args, &first).await?;
        self.settle().await?;
        let then = Workload::Drawn { draws, first: self.args.requests };
        Ok(vec![first, self.phase_of("then", self.args, &then).await?])
    }

    pub(crate) async fn w4_hot_while_cold(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        let alone = self.phase("hot alone", self.args).await?;
        let server = self.server.clone();
        let cold = tokio::spawn(async move {
            // Until the phase ends, there are always more.
            while traffic::warm(server.clone(), &cold(512)).await.is_ok() {}
        });
        // The encoder's queue fills first.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let beside = self.phase("hot beside cold", self.args).await;
        cold.abort();
        self.settle().await?;
        let cold_pages = tokio::spawn(send_cold_pages(self.server.clone()));
        // So many have to wait for the encoder by then that most of them are late.
        tokio::time::sleep(COLD_CALL_DEADLINE).await;
        let beside_pages = self.phase("hot beside cold pages", self.args).await;
        cold_pages.abort();
        Ok(vec![alone, beside?, beside_pages?])
    }

    pub(crate) async fn w5_overload(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        let closed = Args { rate: None, deadline_ms: None, concurrency: 8, cvr_only: true, ..self.args.clone() };
        let capacity = self.phase("capacity, closed loop", &closed).await?;
        let rate = OVERLOAD * capacity.goodput();
        let open = Args {
            rate: Some(rate),
            deadline_ms: Some(self.args.deadline_ms.unwrap_or(OVERLOAD_DEADLINE_MS)),
            requests: (self.args.requests as f64 * OVERLOAD) as u64,
            cvr_only: true,
            ..self.args.clone()
        };
        let overload = self.phase("three times that, open loop", &open).await?;
        let after = self.phase("afterwards, closed loop", &closed).await?;
        Ok(vec![capacity, overload, after])
    }

    /// The history is hot, so that a page waits for its own candidates only.
    pub(crate) async fn w6_cold_page(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        let history: Vec<Item> = self.items.iter().take(self.args.history).map(id_alone).collect();
        let page = |i| GetMidEmbRequest {
            user_id: format!("bench-user-{i}"),
            history: history.clone(),
            candidates: cold(self.args.candidates),
            ..Default::default()
        };
        let pages: Vec<GetMidEmbRequest> = (0..COLD_PAGES).map(page).collect();
        let deadline = Duration::from_millis(self.args.deadline_ms.unwrap_or(COLD_PAGE_DEADLINE_MS));
        let settle = async || self.settle().await;
        let first = traffic::send_one_by_one(&self.server, &pages, Some(deadline), settle);
        let first = Phase::new("never seen", self.measure(first).await?);
        let again = traffic::send_one_by_one(&self.server, &pages, None, async || Ok(()));
        Ok(vec![first, Phase::new("the same again", self.measure(again).await?)])
    }

    /// Waits until the server has encoded what earlier requests left behind, which would otherwise be in the next figures.
    pub(crate) async fn settle(&self) -> anyhow::Result<()> {
        let (start, mut n_idle) = (Instant::now(), 0);
        // Seen idle twice: between two batches the queue may be empty for a moment.
        while n_idle < 2 {
            n_idle = if self.scrape().await?.n_queued_to_encode > 0.0 { 0 } else { n_idle + 1 };
            ensure!(
                start.elapsed() <= MAX_SETTLING,
                "the server's encoder is still busy after {MAX_SETTLING:?}: stop its other clients"
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    /// Warms the items, then sends some requests: memory and connections that the first ones need are not the steady state.
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
        Ok(Phase::new(name, self.measure(traffic::send(args, &self.server, workload)).await?))
    }

    /// Runs `work` between two scrapes.
    async fn measure<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<Measured<T>> {
        let (before, start) = (self.scrape().await?, Instant::now());
        let result = work.await?;
        let took = start.elapsed();
        let after = self.scrape().await?;
        let cpu_seconds = after.cpu_seconds - before.cpu_seconds;
        let hit_rates = after.hit_rates_since(&before);
        let cost = Cost { took, cpu_seconds, resident_bytes: after.resident_bytes, hit_rates };
        Ok(Measured { result, cost })
    }

    pub(crate) async fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::read(&self.args.metrics).await
    }
}

/// Sends cold pages as requests, whether or not the server keeps up. Never returns.
async fn send_cold_pages(server: Service) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / COLD_PAGES_PER_SECOND);
    loop {
        ticks.tick().await;
        let mut server = server.clone();
        let page = GetMidEmbRequest { user_id: "cold".to_owned(), candidates: cold(1), ..Default::default() };
        let mut request = tonic::Request::new(page);
        request.set_timeout(COLD_CALL_DEADLINE);
        // Most of them are late or turned away, as they should be.
        tokio::spawn(async move { drop(server.get_mid_emb(request).await) });
    }
}
