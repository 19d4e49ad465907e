//! When snapshots are written and read: at a start before the first request, on a timer, and when the server has drained.
//!
//! All of it runs on threads that give way to those that serve. Nothing is written before the first item is known, so that
//! a snapshot which could not be read is not replaced by that of a server which nobody has called yet.

use super::{Counts, Served};
use crate::{
    cache::Caches,
    inference::background::{self, Urgency},
    telemetry::events,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// Writes the caches into a folder and fills them from it. Every outcome is logged and counted; none is an error for the
/// server.
#[derive(Debug)]
pub struct SnapshotKeeper {
    caches: Arc<Caches>,
    folder: PathBuf,
    /// Held while a snapshot is written.
    writing: Mutex<()>,
}

impl SnapshotKeeper {
    /// Keeps snapshots of `caches` in `folder`.
    pub fn new(caches: Arc<Caches>, folder: PathBuf) -> Self {
        SnapshotKeeper { caches, folder, writing: Mutex::new(()) }
    }

    /// Fills the caches from the newest snapshot, as far as the models in `served` can use it.
    pub async fn restore(&self, served: Vec<Served>) {
        let (caches, folder) = (Arc::clone(&self.caches), self.folder.clone());
        let began = Instant::now();
        let restore = move || super::restore(&folder, &caches, &served);
        let restored = match background::run(Urgency::Normal, restore).await {
            Ok(restored) => restored,
            Err(error) => {
                tracing::error!(%error, "the snapshot of the caches cannot be read, so they start empty");
                return;
            }
        };
        for refused in &restored.refused {
            let (file, reason) = (refused.file.display(), &refused.reason);
            tracing::warn!(%file, %reason, "a part of the snapshot of the caches is refused");
            events::snapshot_finished("refused");
        }
        if let Some(folder) = &restored.snapshot {
            log("caches restored", folder, restored.counts, began.elapsed());
            events::snapshot_finished("restored");
        }
    }

    /// Writes a snapshot `every` so often, of what the models that `served` gives have cached. Never ends.
    pub async fn write_regularly(&self, every: Duration, served: impl Fn() -> Vec<Served>) {
        loop {
            tokio::time::sleep(every).await;
            self.write(served()).await;
        }
    }

    /// Writes a snapshot of what the models in `served` have cached, if there is anything to write.
    pub async fn write(&self, served: Vec<Served>) {
        let _one_at_a_time = self.writing.lock().await;
        // Before the first request, what is cached are the golden texts; a snapshot that is there may hold much more.
        if served.is_empty() || self.caches.known_items.measure().n_entries == 0 {
            return;
        }
        let (caches, folder) = (Arc::clone(&self.caches), self.folder.clone());
        let began = Instant::now();
        let write = move || super::write(&folder, &caches, &served);
        match background::run(Urgency::GivesWay, write).await {
            Ok(Ok(written)) => {
                log("caches written", &written.snapshot, written.counts, began.elapsed());
                for path in &written.not_removed {
                    tracing::warn!(path = %path.display(), "an older snapshot cannot be removed");
                }
                events::snapshot_written();
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "the snapshot of the caches cannot be written, the previous one stays");
                events::snapshot_finished("failed");
            }
            Err(error) => {
                tracing::error!(%error, "the snapshot of the caches cannot be written");
                events::snapshot_finished("failed");
            }
        }
    }
}

fn log(message: &str, path: &Path, counts: Counts, took: Duration) {
    let Counts { n_contents, n_items, n_known_items, n_bytes } = counts;
    let took_ms = took.as_millis() as u64;
    tracing::info!(path = %path.display(), n_contents, n_items, n_known_items, n_bytes, took_ms, "{message}");
}
