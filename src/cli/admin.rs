//! `midemb admin status|push|rollback|flush`: the calls and their order. [`show`] formats the answers.

mod show;

use super::terminal;
use anyhow::Context;
use indicatif::ProgressBar;
use midemb_client::{
    AdminAccess, AdminClient,
    proto::{FlushCacheRequest, PushConfigRequest, PushConfigResponse, PushReport, RollbackRequest},
};
use std::{
    convert::Infallible,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time;

const POLL_INTERVAL: Duration = Duration::from_millis(200);
const N_DIGEST_CHARS: usize = 64;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    access: AdminAccess,
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
    /// Put a config in force. It is checked, loaded and warmed first, and then all of it serves at once, or none of it.
    ///
    /// The push goes on when this command is stopped; `midemb admin status` shows it. A refused push changes nothing; the
    /// command prints the reason and exits with 1.
    Push(Push),
    /// Put the config before the last push in force again, with the models that served then. A second rollback undoes the
    /// first.
    Rollback {
        /// The digest of the config that must be in force, or at least its first 12 characters. Without it, any config may be.
        #[arg(long, value_name = "DIGEST")]
        expect: Option<String>,
    },
    /// Empty a cache.
    Flush {
        /// content, item, user or known_items. Without it, all of them.
        cache: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Push {
    /// A whole config file, TOML; `-` reads standard input. Relative paths start from the folder of the server's own config
    /// file, and the server's environment wins over it.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The digest of the config that must be in force, or at least its first 12 characters; otherwise the push is refused.
    /// Without it, the digest is taken from the server's status just before the push, so that only a change between these two
    /// calls is noticed.
    #[arg(long, value_name = "DIGEST")]
    expect: Option<String>,
    /// Do everything except putting the config in force.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object, digests in full, with the field names of `PushConfigResponse`.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let admin = AdminClient::connect(&args.access).await?;
    match args.command {
        Command::Status { json } => {
            let status = admin.get_status().await?;
            if json {
                println!("{}", serde_json::to_string(&status)?);
            } else {
                print!("{}", show::status(&status));
            }
        }
        Command::Push(push) => {
            let answer = push.run(&admin).await?;
            if push.json {
                println!("{}", serde_json::to_string(&answer)?);
            } else {
                print!("{}", show::pushed(&answer));
            }
        }
        Command::Rollback { expect } => {
            let expected_digest = match &expect {
                Some(digest) => full_digest(&admin, Some(digest)).await?,
                None => String::new(),
            };
            let answer = admin.rollback(RollbackRequest { expected_digest }).await?;
            print!("{}", show::rolled_back(&answer));
        }
        Command::Flush { cache } => {
            let flushed = admin.flush_cache(FlushCacheRequest { cache: cache.unwrap_or_default() }).await?;
            println!("{} entries removed", flushed.entries_removed);
        }
    }
    Ok(())
}

impl Push {
    async fn run(&self, admin: &AdminClient) -> anyhow::Result<PushConfigResponse> {
        let config = read(&self.file)?;
        let expected_digest = full_digest(admin, self.expect.as_deref()).await?;
        let request = PushConfigRequest { config, expected_digest, dry_run: self.dry_run };
        let bar = terminal::progress(STEP);
        let watching = watch(admin, &bar);
        // When the push ends, at most one poll is dropped, whose answer is not needed any more.
        let answer = tokio::select! {
            answer = admin.push_config(request) => answer,
            never = watching => match never {},
        };
        bar.finish_and_clear();
        Ok(answer?)
    }
}

fn read(file: &Path) -> anyhow::Result<String> {
    if file != Path::new("-") {
        return fs::read_to_string(file).with_context(|| format!("config {}", file.display()));
    }
    let mut config = String::new();
    io::stdin().read_to_string(&mut config).context("config from standard input")?;
    Ok(config)
}

/// The digest to expect, in full: the one in force where `given` is none. Tables print the start of a digest, so a start is
/// completed where it is that of the digest in force. Anything else is sent as it is, and the server refuses it.
async fn full_digest(admin: &AdminClient, given: Option<&str>) -> anyhow::Result<String> {
    if let Some(given) = given.filter(|given| given.len() >= N_DIGEST_CHARS) {
        return Ok(given.to_owned());
    }
    let in_force = admin.get_status().await?.config.unwrap_or_default().digest;
    Ok(match given {
        Some(given) if given.len() < show::N_SHORT_CHARS || !in_force.starts_with(given) => given.to_owned(),
        _ => in_force,
    })
}

const STEP: &str = "{spinner} {msg}";
const COUNTED_STEP: &str = "{spinner} {msg} {wide_bar} {pos}/{len}";

/// Shows the push's progress until it is dropped. A poll that fails is ignored: the push's own answer says what went wrong.
async fn watch(admin: &AdminClient, bar: &ProgressBar) -> Infallible {
    if bar.is_hidden() {
        return std::future::pending().await;
    }
    let mut polls = time::interval(POLL_INTERVAL);
    polls.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        polls.tick().await;
        let push = admin.get_status().await.ok().and_then(|status| status.push);
        draw(bar, push.as_ref());
    }
}

fn draw(bar: &ProgressBar, push: Option<&PushReport>) {
    if let Some(push) = push {
        bar.set_message(show::step_under_way(push));
        bar.set_length(push.total);
        bar.set_position(push.done);
        bar.set_style(terminal::progress_style(if push.total == 0 { STEP } else { COUNTED_STEP }));
    }
    bar.tick();
}
