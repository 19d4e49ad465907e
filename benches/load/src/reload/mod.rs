//! `w7-reload`: configs are pushed in turn while requests go on, and every answer is compared with what each config answers
//! alone.
//!
//! First each config is put in force and asked all [`pages`]: these answers are the references. Then [`load`] sends the pages,
//! alone and while [`pushes`] pushes; it counts failed requests and answers that are those of no config. The histories are
//! those of the references, so the user cache is emptied often enough that no request finds its user in it, as in w1-hot.
//! [`report`] makes tables or JSON of it. The server keeps the last config that was pushed, which is the first one.

mod load;
mod pages;
mod phase;
mod pushes;
mod report;

use crate::{args::ReloadArgs, scenarios::Bench, terminal, traffic};
use anyhow::{Context, ensure};
use load::{Load, Outcome};
use midemb_client::AdminClient;
use pages::Pages;
use phase::Phase;
use pushes::{Pushed, Pusher};
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

pub(crate) async fn run(bench: &Bench<'_>) -> anyhow::Result<()> {
    let (args, reload) = (bench.args, &bench.args.reload);
    let admin = AdminClient::connect(&reload.admin).await?;
    let mut pusher = Pusher::new(admin.clone(), bench, reload.read_configs()?).await?;
    let pages = Arc::new(references(bench, &mut pusher).await?);
    pusher.set_probe(&pages);

    let load = Arc::new(Load::new(bench, admin, pages));
    let n_requests = args.requests;
    let before = phase(bench, load.send(move |i| i < n_requests)).await?;
    let mut pushed = None;
    let during = phase(bench, async {
        let (outcome, report) = send_while_pushing(&load, &mut pusher, reload).await?;
        pushed = Some(report);
        Ok(outcome)
    });
    let during = during.await?;
    let pushed = pushed.context("nothing was pushed")?;
    terminal::print(&report::text(args, &before, &during, &pushed)?)?;
    pusher.push(0).await?;
    check("before the pushes", &before.outcome)?;
    check("while pushing", &during.outcome)
}

/// Puts each config in force and asks all pages. The last config is in force afterwards.
async fn references(bench: &Bench<'_>, pusher: &mut Pusher) -> anyhow::Result<Pages> {
    let requests = pages::draw(bench.args, &bench.items);
    let n_configs = bench.args.reload.configs.len();
    let mut answers = Vec::with_capacity(n_configs);
    for config in 0..n_configs {
        pusher.push(config).await?;
        // With text: whatever encoder this config has, it knows every item afterwards.
        traffic::warm(bench.server.clone(), &bench.items).await?;
        bench.settle().await?;
        answers.push(pages::ask_all(&bench.server, &requests).await?);
    }
    Pages::new(requests, answers)
}

async fn phase(bench: &Bench<'_>, send: impl Future<Output = anyhow::Result<Outcome>>) -> anyhow::Result<Phase> {
    let (scrape_before, start) = (bench.scrape().await?, Instant::now());
    let outcome = send.await?;
    let took = start.elapsed();
    Ok(Phase { outcome, took, scrape_before, scrape_after: bench.scrape().await? })
}

/// The load is a task of its own and goes on until the last push is over, whether the pushes succeed or not.
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
    let pushed = pushed.with_context(|| format!("until then, {outcome}"))?;
    Ok((outcome, pushed))
}

fn check(when: &str, outcome: &Outcome) -> anyhow::Result<()> {
    ensure!(outcome.n_failed + outcome.n_mixed == 0, "{when}, {outcome}");
    Ok(())
}

#[cfg(test)]
mod tests;
