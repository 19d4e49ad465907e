//! What each scenario sends, and in which phases it is measured.

use super::{
    Args,
    scrape::Scrape,
    traffic::{self, Answers, Client},
};
use crate::wire::proto::Item;
use anyhow::ensure;
use fastrand::Rng;
use std::time::{Duration, Instant};

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
}

impl Phase {
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
    pub(super) items: Vec<Item>,
    pub(super) args: &'a Args,
}

/// What w5-overload sends, as a multiple of what the server took in its first phase.
const OVERLOAD: f64 = 3.0;
const OVERLOAD_DEADLINE_MS: u64 = 100;

impl Bench<'_> {
    pub(super) async fn w1_hot(&self) -> anyhow::Result<Vec<Phase>> {
        self.prepare().await?;
        Ok(vec![self.phase("hot", self.args).await?])
    }

    pub(super) async fn w2_cold(&self) -> anyhow::Result<Vec<Phase>> {
        // What the first batches grow is not the steady state.
        let cold = |n| traffic::made_up(n, &format!("cold-{}", Rng::new().u64(..)), &mut Rng::new());
        traffic::warm(self.server.clone(), &cold(64)).await?;
        let items = cold(self.args.items);
        let ((), cost) = self.measure(traffic::warm(self.server.clone(), &items)).await?;
        let n_units = items.len() as u64;
        Ok(vec![Phase { name: "cold items", unit: "item", n_units, answers: None, cost }])
    }

    pub(super) async fn w4_hot_while_cold(&self) -> anyhow::Result<Vec<Phase>> {
        ensure!(self.args.rate.is_some(), "w4-hot-while-cold wants a --rate that the server keeps up with alone");
        self.prepare().await?;
        let alone = self.phase("hot alone", self.args).await?;
        let server = self.server.clone();
        let cold = tokio::spawn(async move {
            let mut rng = Rng::new();
            loop {
                let prefix = format!("cold-{}", rng.u64(..));
                // Ends with the phase; until then there is always more.
                if traffic::warm(server.clone(), &traffic::made_up(512, &prefix, &mut rng)).await.is_err() {
                    return;
                }
            }
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

    /// Warms the items, then the paths: what the first requests grow (arenas, connections) is not the steady state.
    async fn prepare(&self) -> anyhow::Result<()> {
        traffic::warm(self.server.clone(), &self.items).await?;
        let first = Args { requests: 40, rate: None, deadline_ms: None, ..self.args.clone() };
        traffic::send(&first, &self.server, &self.items).await.map(drop)
    }

    async fn phase(&self, name: &'static str, args: &Args) -> anyhow::Result<Phase> {
        let (answers, cost) = self.measure(traffic::send(args, &self.server, &self.items)).await?;
        Ok(Phase { name, unit: "request", n_units: answers.n_sent(), answers: Some(answers), cost })
    }

    /// What `work` gives, and what it cost the server.
    async fn measure<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<(T, Cost)> {
        let (before, start) = (self.scrape().await?, Instant::now());
        let result = work.await?;
        let took = start.elapsed();
        let after = self.scrape().await?;
        let cpu_seconds = after.cpu_seconds - before.cpu_seconds;
        Ok((result, Cost { took, cpu_seconds, resident_bytes: after.resident_bytes }))
    }

    async fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::read(&self.args.metrics).await
    }
}
