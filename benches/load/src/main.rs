//! `midemb-bench`: known workloads against a running server, for capacity planning and for comparing versions.
//!
//! The figure that counts most is the server's own CPU time (its `process_cpu_seconds_total`), as latencies on a shared
//! machine vary too much. In reading order:
//!
//! - [`args`]: the scenarios and their flags.
//! - [`scenarios`]: what each scenario sends, and in which phases it is measured.
//! - [`traffic`]: requests sent in a closed or an open loop.
//! - [`draws`], [`trace`] and [`items`]: which items requests ask for.
//! - [`scrape`]: the server's own metrics.
//! - [`report`], [`terminal`]: figures as tables and as JSON.
//! - [`reload`]: the scenario that pushes configs and checks every answer.

mod args;
mod draws;
mod items;
mod reload;
mod report;
mod scenarios;
mod scrape;
mod terminal;
mod trace;
mod traffic;

use args::{Args, Scenario};
use clap::Parser;
use fastrand::Rng;
use midemb_client::Client;
use std::{io, process::ExitCode, sync::Arc};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of standard output has seen enough, as `| head` does.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

async fn run(args: Args) -> anyhow::Result<()> {
    args.check()?;
    // The generated stub: shed and late calls are counted here, so nothing may send them again.
    let server = Client::connect([args.server.as_str()]).await?.service();
    let items = items::made_up(args.items, "hot", &mut Rng::with_seed(args.seed)).into();
    let bench = scenarios::Bench { server, items, args: &args };
    let phases = match args.scenario {
        Scenario::W1Hot => bench.w1_hot().await?,
        Scenario::W2Cold => bench.w2_cold().await?,
        Scenario::W3Zipf => bench.w3_zipf(Arc::new(draws::Draws::new(&args)?)).await?,
        Scenario::W4HotWhileCold => bench.w4_hot_while_cold().await?,
        Scenario::W5Overload => bench.w5_overload().await?,
        Scenario::W6ColdPage => bench.w6_cold_page().await?,
        Scenario::W7Reload => return reload::run(&bench).await,
    };
    terminal::print(&report::text(&args, &phases)?)?;
    Ok(())
}
