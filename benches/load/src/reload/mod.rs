//! `w7-reload`: configs are pushed in turn while requests go on, and every answer is held to what each of them answers alone.
//!
//! First each config is put in force and asked all [`pages`]: their answers are the references. Then [`load`] sends the
//! pages, alone and while [`pushes`] pushes; it counts what failed and what is the answer of neither config. Histories are
//! those of the references, so the user cache is emptied often enough that no request finds its user, as in w1-hot.
//! [`report`] prints. The server keeps what was pushed: at the end that is the first config.

mod load;
mod pages;
mod pushes;
mod report;

use super::{scenarios::Bench, scrape::Scrape, traffic};
use crate::cli::client;
use anyhow::{Context, ensure};
use load::{Load, Outcome};
use pages::Pages;
use pushes::{Pushed, Pusher};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What is pushed, and how often.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ReloadArgs {
    #[command(flatten)]
    admin: client::AdminServer,
    /// w7-reload: the config files to push in turn, two or more. All must fit the running server: only `[[models]]` and what else
    /// is live may differ from its own. Of two, the server has each one's models at hand for a rollback, and takes them over; of
    /// three, every push loads.
    #[arg(long, num_args = 2.., value_names = ["FILE"])]
    configs: Vec<PathBuf>,
    /// w7-reload: pushes. Every tenth is rolled back before the next.
    #[arg(long, default_value_t = 200)]
    reloads: u64,
    /// w7-reload: the pause after a push.
    #[arg(long, default_value_t = 250)]
    pause_ms: u64,
    /// w7-reload: different pages, each with a history of its own. Their answers under both configs are kept in memory.
    #[arg(long, default_value_t = 256)]
    different_pages: usize,
}

impl ReloadArgs {
    fn read_configs(&self) -> anyhow::Result<Vec<String>> {
        ensure!(self.configs.len() > 1, "w7-reload wants --configs with two config files or more");
        let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("config {}", path.display()));
        self.configs.iter().map(read).collect()
    }
}

/// What was sent and what it cost the server.
struct Phase {
    outcome: Outcome,
    took: Duration,
    scrapes: [Scrape; 2],
}

pub(super) async fn run(bench: &Bench<'_>) -> anyhow::Result<()> {
    let (args, reload) = (bench.args, &bench.args.reload);
    ensure!(reload.reloads > 0 && reload.different_pages > 0, "reloads and different pages must be at least 1");
    let admin = reload.admin.connect().await?;
    let mut pusher = Pusher::new(admin.clone(), bench, reload.read_configs()?).await?;
    let pages = Arc::new(references(bench, &mut pusher).await?);
    pusher.will_probe(&pages);

    let load = Arc::new(Load::new(bench, admin, pages));
    let n_requests = args.requests;
    let before = phase(bench, load.send(move |i| i < n_requests)).await?;
    let mut pushed = None;
    let during = phase(bench, async {
        let (outcome, what) = send_while_pushing(&load, &mut pusher, reload).await?;
        pushed = Some(what);
        Ok(outcome)
    });
    let during = during.await?;
    let pushed = pushed.context("nothing was pushed")?;
    report::print(args, &before, &during, &pushed);
    pusher.push(0).await?;
    verdict(&before.outcome, &during.outcome)
}

/// Puts each config in force and asks all pages. The server has the last one afterwards.
async fn references(bench: &Bench<'_>, pusher: &mut Pusher) -> anyhow::Result<Pages> {
    let requests = pages::draw(bench.args, &bench.items);
    let reload = &bench.args.reload;
    let mut answers = Vec::with_capacity(reload.configs.len());
    for which in 0..reload.configs.len() {
        pusher.push(which).await?;
        // With text: whatever encoder this config brings knows every item afterwards.
        traffic::warm(bench.server.clone(), &bench.items).await?;
        bench.settle().await?;
        answers.push(pages::ask_all(&bench.server, &requests).await?);
    }
    Pages::new(requests, answers)
}

async fn phase(bench: &Bench<'_>, send: impl Future<Output = anyhow::Result<Outcome>>) -> anyhow::Result<Phase> {
    let (first, start) = (bench.scrape().await?, Instant::now());
    let outcome = send.await?;
    let took = start.elapsed();
    Ok(Phase { outcome, took, scrapes: [first, bench.scrape().await?] })
}

/// The load is a task of its own and goes on until the last push is over, however that ends.
async fn send_while_pushing(
    load: &Arc<Load>,
    pusher: &mut Pusher,
    args: &ReloadArgs,
) -> anyhow::Result<(Outcome, Pushed)> {
    let is_over = Arc::new(AtomicBool::new(false));
    let sending = tokio::spawn({
        let (load, is_over) = (Arc::clone(load), Arc::clone(&is_over));
        async move { load.send(move |_| !is_over.load(Ordering::Relaxed)).await }
    });
    let pushed = pusher.run(args.reloads, Duration::from_millis(args.pause_ms)).await;
    is_over.store(true, Ordering::Relaxed);
    let outcome = sending.await??;
    let pushed = pushed.with_context(|| format!("until then {outcome}"))?;
    Ok((outcome, pushed))
}

fn verdict(before: &Outcome, during: &Outcome) -> anyhow::Result<()> {
    for (outcome, when) in [(before, "before the pushes"), (during, "while pushing")] {
        ensure!(outcome.n_failed + outcome.n_mixed == 0, "{when}, {outcome}");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
