//! `midemb admin status|flush`.

use super::client::{self, refused, table};
use crate::wire::proto::{FlushCacheRequest, GetStatusRequest};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The server's `admin.listen`.
    #[arg(long, default_value = "127.0.0.1:50052", global = true)]
    admin: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print models and caches.
    Status,
    /// Empty a cache.
    Flush {
        /// content, item, user or known_items; all of them where this is absent.
        cache: Option<String>,
    },
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let mut admin = client::admin(&args.admin).await?;
    match args.command {
        Command::Status => {
            let status = admin.get_status(GetStatusRequest {}).await.map_err(refused("GetStatus"))?.into_inner();
            println!("{}, up {} s", if status.ready { "ready" } else { "not ready" }, status.uptime_seconds);
            let mut models = table(&["model", "version", "share", "provider", "digest"]);
            for model in status.models {
                let reference = model.model.unwrap_or_default();
                let share = format!("{} %", model.share);
                models.add_row([reference.name, reference.version, share, model.provider, reference.digest]);
            }
            println!("{models}");
            let mut caches = table(&["cache", "entries", "bytes", "bound"]);
            for cache in status.caches {
                caches.add_row([
                    cache.cache,
                    cache.entries.to_string(),
                    cache.bytes.to_string(),
                    cache.max_bytes.to_string(),
                ]);
            }
            println!("{caches}");
        }
        Command::Flush { cache } => {
            let request = FlushCacheRequest { cache: cache.unwrap_or_default() };
            let flushed = admin.flush_cache(request).await.map_err(refused("FlushCache"))?.into_inner();
            println!("{} entries removed", flushed.entries_removed);
        }
    }
    Ok(())
}
