//! Pushes: the configs in turn, with every tenth push rolled back, and the server's report of each.

use super::{load::Span, pages::Pages};
use crate::{scenarios::Bench, scrape::Scrape, terminal::progress, traffic::Service};
use anyhow::{Context, ensure};
use midemb_client::{
    AdminClient, Error,
    proto::{ConfigInfo, GetMidEmbRequest, PushConfigRequest, PushReport, RollbackRequest},
};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Memory that the first pushes allocate is not a leak: it is compared with the memory after this many.
pub(super) const N_FIRST_PUSHES: u64 = 20;
/// A rollback comes after every so many pushes.
const N_PUSHES_PER_ROLLBACK: u64 = 10;
/// A push that warms caches within its bounds is over sooner.
const MAX_PUSH_TIME: Duration = Duration::from_secs(300);
const MAX_ROLLBACK_TIME: Duration = Duration::from_secs(30);

/// How the pushes went.
#[derive(Debug, Default)]
pub(super) struct Pushed {
    /// When a push or a rollback was under way, as this client saw it.
    pub(super) windows: Vec<Span>,
    /// The server's own milliseconds per push.
    pub(super) push_ms: Vec<u64>,
    /// In the order in which they first came.
    pub(super) steps: Vec<Step>,
    /// From the call of each rollback to the first answer of the model before.
    pub(super) rollbacks: Vec<Duration>,
    /// The server's memory in bytes after push [`N_FIRST_PUSHES`]; none where there were fewer.
    pub(super) resident_after_first: Option<f64>,
    /// The server's memory in bytes after the last push.
    pub(super) resident_at_end: f64,
}

/// One kind of step.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) name: String,
    /// Milliseconds per push, over all subjects of the step.
    pub(super) took_ms: Vec<u64>,
}

impl Pushed {
    fn note(&mut self, window: Span, report: &PushReport) {
        self.windows.push(window);
        self.push_ms.push(report.took_ms);
        let mut took_ms: Vec<(&str, u64)> = Vec::new();
        for step in &report.steps {
            match took_ms.iter_mut().find(|(name, _)| *name == step.step) {
                Some((_, sum)) => *sum += step.took_ms,
                None => took_ms.push((&step.step, step.took_ms)),
            }
        }
        for (name, took_ms) in took_ms {
            match self.steps.iter_mut().find(|step| step.name == name) {
                Some(step) => step.took_ms.push(took_ms),
                None => self.steps.push(Step { name: name.to_owned(), took_ms: vec![took_ms] }),
            }
        }
    }
}

/// Puts one of the configs in force.
pub(super) struct Pusher {
    admin: AdminClient,
    server: Service,
    metrics: String,
    configs: Vec<String>,
    /// A place in `configs`, once a config was pushed.
    in_force: usize,
    /// The config that was in force before.
    previous: usize,
    /// The digest of the config in force.
    digest: String,
    probe: Probe,
}

/// A page that is answered fast and shows which config is in force.
#[derive(Default)]
struct Probe {
    request: GetMidEmbRequest,
    /// The digest of the model that answers, by config.
    digests: Vec<String>,
}

impl Pusher {
    pub(super) async fn new(admin: AdminClient, bench: &Bench<'_>, configs: Vec<String>) -> anyhow::Result<Self> {
        let digest = digest(admin.get_status().await?.config)?;
        let (server, metrics) = (bench.server.clone(), bench.args.metrics.clone());
        Ok(Pusher { admin, server, metrics, configs, in_force: 0, previous: 0, digest, probe: Probe::default() })
    }

    /// Takes a part of the first page as the probe, which times rollbacks.
    pub(super) fn set_probe(&mut self, pages: &Pages) {
        let mut request = pages.requests[0].clone();
        request.history.clear();
        request.candidates.truncate(1);
        let digest = |config| pages.reference(config, 0).model.digest.clone();
        self.probe = Probe { request, digests: (0..pages.n_configs()).map(digest).collect() };
    }

    /// Puts a config in force. It may be in force already.
    pub(super) async fn push(&mut self, config: usize) -> anyhow::Result<PushReport> {
        let request = PushConfigRequest {
            config: self.configs[config].clone(),
            expected_digest: self.digest.clone(),
            dry_run: false,
        };
        let pushed = timeout(MAX_PUSH_TIME, self.admin.push_config(request)).await;
        let pushed = pushed.with_context(|| format!("PushConfig took longer than {MAX_PUSH_TIME:?}"))??;
        self.digest = digest(pushed.config)?;
        (self.previous, self.in_force) = (self.in_force, config);
        Ok(PushReport { result: pushed.result, ..pushed.report.unwrap_or_default() })
    }

    /// Pushes one config after the other.
    pub(super) async fn run(&mut self, n_reloads: u64, pause: Duration) -> anyhow::Result<Pushed> {
        let bar = progress(n_reloads, "pushing");
        let mut pushed = Pushed::default();
        sleep(pause).await;
        for i in 1..=n_reloads {
            self.reload(&mut pushed).await.with_context(|| format!("push {i} of {n_reloads}"))?;
            sleep(pause).await;
            if i == N_FIRST_PUSHES {
                pushed.resident_after_first = Some(self.resident_bytes().await?);
            }
            if i == n_reloads {
                pushed.resident_at_end = self.resident_bytes().await?;
            }
            if i.is_multiple_of(N_PUSHES_PER_ROLLBACK) {
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
        let is_idle = |config: &usize| *config != self.in_force && *config != self.previous;
        let next = (0..self.configs.len()).find(is_idle).unwrap_or(self.previous);
        let report = self.push(next).await?;
        pushed.note(Span { start, end: Instant::now() }, &report);
        ensure!(report.result == "applied", "the push of config {next} was {:?}: nothing was reloaded", report.result);
        Ok(())
    }

    async fn roll_back(&mut self, pushed: &mut Pushed) -> anyhow::Result<()> {
        let (start, previous) = (Instant::now(), self.previous);
        let request = RollbackRequest { expected_digest: self.digest.clone() };
        let rolled_back = async { Ok(self.admin.rollback(request).await?) };
        let both = async { tokio::try_join!(rolled_back, self.first_answer_by(previous)) };
        let both = timeout(MAX_ROLLBACK_TIME, both).await;
        let (answer, served_at) =
            both.with_context(|| format!("Rollback took longer than {MAX_ROLLBACK_TIME:?}"))??;
        pushed.windows.push(Span { start, end: Instant::now() });
        pushed.rollbacks.push(served_at - start);
        self.digest = digest(answer.config)?;
        (self.previous, self.in_force) = (self.in_force, previous);
        Ok(())
    }

    /// Sends the probe again and again until that config's model answers it, and gives the time of that answer.
    async fn first_answer_by(&self, config: usize) -> anyhow::Result<Instant> {
        let Probe { request, digests } = &self.probe;
        loop {
            let answer = self.server.clone().get_mid_emb(request.clone()).await.map_err(Error::failed("GetMidEmb"))?;
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
