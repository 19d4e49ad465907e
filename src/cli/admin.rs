//! `midemb admin status|push|rollback|flush`: what is asked and in which order. How answers look is in `show`.

mod show;

use super::client::{self, AdminClient, AdminServer, refused};
use crate::wire::proto::{
    FlushCacheRequest, GetStatusRequest, GetStatusResponse, PushConfigRequest, PushConfigResponse, PushReport,
    RollbackRequest,
};
use anyhow::Context;
use indicatif::ProgressBar;
use std::{
    convert::Infallible,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time;

const POLLED_EVERY: Duration = Duration::from_millis(200);
const N_DIGEST_CHARS: usize = 64;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    server: AdminServer,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print the config in force, models, caches, the push under way and the last ones.
    Status {
        /// Print everything as one JSON object, digests in full, with the field names of `GetStatusResponse`.
        #[arg(long)]
        json: bool,
    },
    /// Put a config in force: checked, loaded and warmed first, then all of it at once, or none of it.
    ///
    /// The push goes on when this command is stopped; `midemb admin status` shows it. A push that is refused changes nothing,
    /// prints the reason and exits with 1.
    Push(Push),
    /// Put the config before the last push in force again, with the models that served then. A second one undoes the first.
    Rollback {
        /// The digest of the config that has to be in force, or at least its first 12 characters. Absent: whatever is.
        #[arg(long, value_name = "DIGEST")]
        expect: Option<String>,
    },
    /// Empty a cache.
    Flush {
        /// content, item, user or known_items; all of them where this is absent.
        cache: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Push {
    /// A whole config file, TOML; `-` reads standard input. Relative paths start from the folder of the server's own config
    /// file, and the server's environment wins over it.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The digest of the config that has to be in force, or at least its first 12 characters; the push is refused where
    /// another one is. Absent: the one in force just before, as the server's status says it, so that only a change between
    /// the two calls is noticed.
    #[arg(long, value_name = "DIGEST")]
    expect: Option<String>,
    /// Do everything but put it in force.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object, digests in full, with the field names of `PushConfigResponse`.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let mut admin = args.server.connect().await?;
    match args.command {
        Command::Status { json } => {
            let status = status(&mut admin).await?;
            if json {
                println!("{}", show::status_json(&status));
            } else {
                print!("{}", show::status(&status));
            }
        }
        Command::Push(push) => {
            let answer = push.run(&mut admin).await?;
            if push.json {
                println!("{}", show::pushed_json(&answer));
            } else {
                print!("{}", show::pushed(&answer));
            }
        }
        Command::Rollback { expect } => {
            let expected_digest = match &expect {
                Some(said) => full_digest(&mut admin, Some(said)).await?,
                None => String::new(),
            };
            let answer = admin.rollback(RollbackRequest { expected_digest }).await.map_err(refused("Rollback"))?;
            print!("{}", show::rolled_back(&answer.into_inner()));
        }
        Command::Flush { cache } => {
            let request = FlushCacheRequest { cache: cache.unwrap_or_default() };
            let flushed = admin.flush_cache(request).await.map_err(refused("FlushCache"))?.into_inner();
            println!("{} entries removed", flushed.entries_removed);
        }
    }
    Ok(())
}

impl Push {
    async fn run(&self, admin: &mut AdminClient) -> anyhow::Result<PushConfigResponse> {
        let config = read(&self.file)?;
        let expected_digest = full_digest(admin, self.expect.as_deref()).await?;
        let request = PushConfigRequest { config, expected_digest, dry_run: self.dry_run };
        let bar = client::progress(STEP);
        let watching = watch(admin.clone(), &bar);
        // What is dropped when the push ends is one poll, whose answer nobody needs any more.
        let answer = tokio::select! {
            answer = admin.push_config(request) => answer,
            never = watching => match never {},
        };
        bar.finish_and_clear();
        Ok(answer.map_err(refused("PushConfig"))?.into_inner())
    }
}

async fn status(admin: &mut AdminClient) -> anyhow::Result<GetStatusResponse> {
    Ok(admin.get_status(GetStatusRequest {}).await.map_err(refused("GetStatus"))?.into_inner())
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file != Path::new("-") {
        return fs::read_to_string(file).with_context(|| format!("config {}", file.display()));
    }
    let mut config = String::new();
    io::stdin().read_to_string(&mut config).context("config from standard input")?;
    Ok(config)
}

/// The digest to expect: the one in force where nothing was said. What tables print is cut short, so a start will do, if it is
/// the start of the one in force; the server compares it in full and refuses everything else.
async fn full_digest(admin: &mut AdminClient, said: Option<&str>) -> anyhow::Result<String> {
    if let Some(said) = said.filter(|said| said.len() >= N_DIGEST_CHARS) {
        return Ok(said.to_owned());
    }
    let in_force = status(admin).await?.config.unwrap_or_default().digest;
    Ok(match said {
        Some(said) if said.len() < show::N_SHORT_CHARS || !in_force.starts_with(said) => said.to_owned(),
        _ => in_force,
    })
}

const STEP: &str = "{spinner} {msg}";
const COUNTED_STEP: &str = "{spinner} {msg} {wide_bar} {pos}/{len}";

/// Shows how far the push is, until it is dropped. A poll that fails is none: what matters is what the push itself answers.
async fn watch(mut admin: AdminClient, bar: &ProgressBar) -> Infallible {
    if bar.is_hidden() {
        return std::future::pending().await;
    }
    let mut polls = time::interval(POLLED_EVERY);
    polls.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        polls.tick().await;
        let push = status(&mut admin).await.ok().and_then(|status| status.push);
        draw(bar, push.as_ref());
    }
}

fn draw(bar: &ProgressBar, push: Option<&PushReport>) {
    if let Some(push) = push {
        bar.set_message(show::step_under_way(push));
        bar.set_length(push.total);
        bar.set_position(push.done);
        bar.set_style(client::style(if push.total == 0 { STEP } else { COUNTED_STEP }));
    }
    bar.tick();
}
