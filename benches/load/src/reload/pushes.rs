//! Pushes: the configs in turn, every tenth one rolled back, with what the server says of each.

use super::{load::Span, pages::Pages};
use crate::{
    cli::{
        bench::{
            scenarios::Bench,
            scrape::Scrape,
            traffic::{self, Client},
        },
        client::{AdminClient, refused},
    },
    wire::proto::{ConfigInfo, GetMidEmbRequest, GetStatusRequest, PushConfigRequest, PushReport, RollbackRequest},
};
use anyhow::{Context, ensure};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// After so many pushes memory is as it will be: what the first ones grow is not a leak.
pub(super) const N_GROWING: u64 = 20;
/// So many pushes, then a rollback.
const N_BEFORE_ROLLBACK: u64 = 10;
/// Longer than any push that warms caches within its bounds.
const PUSHED_WITHIN: Duration = Duration::from_secs(300);
const ROLLED_BACK_WITHIN: Duration = Duration::from_secs(30);

/// What the pushes were.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    /// While a push or a rollback was under way, for this client.
    pub(super) windows: Vec<Span>,
    /// The server's own milliseconds of each push.
    pub(super) push_ms: Vec<u64>,
    /// Milliseconds of each step, of all its subjects together, a push; in the order of their first push.
    pub(super) steps: Vec<(String, Vec<u64>)>,
    /// From the call of each rollback to the first answer of the model before.
    pub(super) rollbacks: Vec<Duration>,
    /// Bytes after push [`N_GROWING`]; none where there were not so many.
    pub(super) resident_grown: Option<f64>,
    /// Bytes after the last push.
    pub(super) resident_end: f64,
}

impl Pushed {
    fn note(&mut self, window: Span, report: &PushReport) {
        self.windows.push(window);
        self.push_ms.push(report.took_ms);
        let mut steps: Vec<(&str, u64)> = Vec::new();
        for step in &report.steps {
            match steps.iter_mut().find(|(name, _)| *name == step.step) {
                Some((_, took_ms)) => *took_ms += step.took_ms,
                None => steps.push((&step.step, step.took_ms)),
            }
        }
        for (name, took_ms) in steps {
            match self.steps.iter_mut().find(|(known, _)| known == name) {
                Some((_, all)) => all.push(took_ms),
                None => self.steps.push((name.to_owned(), vec![took_ms])),
            }
        }
    }
}

/// Puts one of the configs in force.
pub(super) struct Pusher {
    admin: AdminClient,
    server: Client,
    metrics: String,
    configs: Vec<String>,
    /// A place in `configs`, once something was pushed.
    in_force: usize,
    /// What was in force before.
    previous: usize,
    /// The digest of the config in force.
    digest: String,
    /// A page that is quickly answered, and the model's digest of its answer under each config.
    probe: (GetMidEmbRequest, Vec<String>),
}

impl Pusher {
    pub(super) async fn new(mut admin: AdminClient, bench: &Bench<'_>, configs: Vec<String>) -> anyhow::Result<Self> {
        let status = admin.get_status(GetStatusRequest {}).await.map_err(refused("GetStatus"))?.into_inner();
        let digest = digest(status.config)?;
        let (server, metrics) = (bench.server.clone(), bench.args.metrics.clone());
        Ok(Pusher { admin, server, metrics, configs, in_force: 0, previous: 0, digest, probe: Default::default() })
    }

    /// Rollbacks are timed with a part of the first page.
    pub(super) fn will_probe(&mut self, pages: &Pages) {
        let mut request = pages.requests[0].clone();
        request.history.clear();
        request.candidates.truncate(1);
        let digest = |config| pages.reference(config, 0).model.digest.clone();
        self.probe = (request, (0..pages.n_configs()).map(digest).collect());
    }

    /// Puts config 0 or 1 in force, which it may be already.
    pub(super) async fn push(&mut self, which: usize) -> anyhow::Result<PushReport> {
        let request = PushConfigRequest {
            config: self.configs[which].clone(),
            expected_digest: self.digest.clone(),
            dry_run: false,
        };
        let pushed = timeout(PUSHED_WITHIN, self.admin.push_config(request)).await;
        let pushed = pushed.context("PushConfig takes too long")?.map_err(refused("PushConfig"))?.into_inner();
        self.digest = digest(pushed.config)?;
        (self.previous, self.in_force) = (self.in_force, which);
        Ok(PushReport { result: pushed.result, ..pushed.report.unwrap_or_default() })
    }

    /// Pushes one config after the other.
    pub(super) async fn run(&mut self, n_reloads: u64, pause: Duration) -> anyhow::Result<Pushed> {
        let bar = traffic::progress(n_reloads, "pushing");
        let mut pushed = Pushed::default();
        sleep(pause).await;
        for i in 1..=n_reloads {
            self.reload(&mut pushed).await.with_context(|| format!("push {i} of {n_reloads}"))?;
            sleep(pause).await;
            if i == N_GROWING {
                pushed.resident_grown = Some(self.resident_bytes().await?);
            }
            if i == n_reloads {
                pushed.resident_end = self.resident_bytes().await?;
            }
            if i.is_multiple_of(N_BEFORE_ROLLBACK) {
                self.roll_back(&mut pushed).await.with_context(|| format!("rollback of push {i}"))?;
                sleep(pause).await;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(pushed)
    }

    async fn reload(&mut self, pushed: &mut Pushed) -> anyhow::Result<()> {
        let start = Instant::now();
        let is_neither = |config: &usize| *config != self.in_force && *config != self.previous;
        let next = (0..self.configs.len()).find(is_neither).unwrap_or(self.previous);
        let report = self.push(next).await?;
        pushed.note(Span { start, end: Instant::now() }, &report);
        ensure!(report.result == "applied", "the config is {:?}: nothing was reloaded", report.result);
        Ok(())
    }

    async fn roll_back(&mut self, pushed: &mut Pushed) -> anyhow::Result<()> {
        let (start, previous) = (Instant::now(), self.previous);
        let mut admin = self.admin.clone();
        let request = RollbackRequest { expected_digest: self.digest.clone() };
        let rolled_back = async { admin.rollback(request).await.map_err(refused("Rollback")) };
        let both = async { tokio::try_join!(rolled_back, self.until_answered_by(previous)) };
        let (answer, served) = timeout(ROLLED_BACK_WITHIN, both).await.context("Rollback takes too long")??;
        pushed.windows.push(Span { start, end: Instant::now() });
        pushed.rollbacks.push(served - start);
        self.digest = digest(answer.into_inner().config)?;
        (self.previous, self.in_force) = (self.in_force, previous);
        Ok(())
    }

    /// Asks one row after the other until it comes from that config's model; when that was.
    async fn until_answered_by(&self, config: usize) -> anyhow::Result<Instant> {
        let (request, digests) = &self.probe;
        loop {
            let answer = self.server.clone().get_mid_emb(request.clone()).await.map_err(refused("GetMidEmb"))?;
            let model = answer.into_inner().model.unwrap_or_default();
            if model.digest == digests[config] {
                return Ok(Instant::now());
            }
        }
    }

    async fn resident_bytes(&self) -> anyhow::Result<f64> {
        Ok(Scrape::read(&self.metrics).await?.resident_bytes)
    }
}

fn digest(config: Option<ConfigInfo>) -> anyhow::Result<String> {
    Ok(config.context("the server does not say which config is in force")?.digest)
}
