//! When snapshots are read and written: at the start, before the first request; on a timer; and after the server has drained.
//!
//! Snapshots are written on threads that give way to those that serve. Nothing is written before the first item is known, so
//! that the snapshot of a server that nobody has called yet does not replace one that could not be read.

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

/// Writes snapshots of the caches into a folder and restores them. Every outcome is logged and counted; none is an error for
/// the server.
#[derive(Debug)]
pub struct SnapshotKeeper {
    caches: Arc<Caches>,
    folder: PathBuf,
    /// Held while a snapshot is written, so that only one is written at a time.
    writing: Mutex<()>,
}

impl SnapshotKeeper {
    /// Keeps snapshots of `caches` in `folder`.
    pub fn new(caches: Arc<Caches>, folder: PathBuf) -> Self {
        SnapshotKeeper { caches, folder, writing: Mutex::new(()) }
    }

    /// Fills the caches from the newest snapshot with everything that the models in `served` can use.
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
            tracing::warn!(%file, %reason, "a part of the snapshot of the caches was refused");
            events::snapshot_finished("refused");
        }
        if let Some(folder) = &restored.snapshot {
            log("caches restored", folder, restored.counts, began.elapsed());
            events::snapshot_finished("restored");
        }
    }

    /// Writes a snapshot of the caches of the models that `served` returns, once per `every`. Never returns.
    pub async fn write_regularly(&self, every: Duration, served: impl Fn() -> Vec<Served>) {
        loop {
            tokio::time::sleep(every).await;
            self.write(served()).await;
        }
    }

    /// Writes a snapshot of the caches of the models in `served`, if at least one item is known.
    pub async fn write(&self, served: Vec<Served>) {
        let _one_at_a_time = self.writing.lock().await;
        // Before the first request the caches hold only the golden texts, and an existing snapshot may hold much more.
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
                    tracing::warn!(path = %path.display(), "an older snapshot of the caches cannot be removed");
                }
                events::snapshot_written();
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "the snapshot of the caches cannot be written, the previous one is kept");
                events::snapshot_finished("failed");
            }
            Err(error) => {
                tracing::error!(%error, "the snapshot of the caches cannot be written, the previous one is kept");
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
