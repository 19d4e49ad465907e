//! Snapshots of the caches: read at a start, before the first request; written on a timer and when the server has drained.
//!
//! All of it runs on a thread that gives way to those that serve. Before the first item is known nothing is written,
//! so that a snapshot that could not be read is not lost to a server that nobody asked yet.

use super::{Lifecycle, PushError, Step, load::Candidate};
use crate::{
    bundle::{Model, Snapshot},
    cache_snapshot::{self, Counts, Imported, ReadError, Served},
    telemetry::events,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

impl Lifecycle {
    /// Fills the caches from the last snapshot, as far as the models to come can use it. Whatever is wrong with it, the server
    /// starts.
    pub(super) async fn restore(&self, candidate: &Candidate) {
        let Some(folder) = self.start.snapshot_folder.clone() else { return };
        self.journal.step(Step::Restore, "");
        let (pipeline, served) = (Arc::clone(&self.pipeline), served(&candidate.snapshot));
        let began = Instant::now();
        let read = self.on_loader(move || cache_snapshot::restore(&folder, &pipeline.caches(), &served)).await;
        match read {
            Ok(restored) => {
                for refused in &restored.refused {
                    let (file, reason) = (refused.file.display(), &refused.reason);
                    tracing::warn!(%file, %reason, "a part of the caches' snapshot is not taken");
                    events::snapshot_finished("refused");
                }
                if let Some(folder) = &restored.snapshot {
                    log("caches restored", folder, restored.counts, began.elapsed());
                    events::snapshot_finished("restored");
                }
            }
            Err(error) => tracing::error!(%error, "the caches start empty"),
        }
    }

    /// Writes a snapshot every `snapshot.interval_seconds`. Ends with the process.
    pub async fn snapshot_regularly(self: Arc<Self>) {
        let Some(every) = self.start.snapshot_every.filter(|_| self.start.snapshot_folder.is_some()) else { return };
        loop {
            tokio::time::sleep(every).await;
            self.snapshot().await;
        }
    }

    /// Writes a snapshot, where one is wanted and there is something to write.
    pub async fn snapshot(&self) {
        let (Some(folder), Some(config)) = (self.start.snapshot_folder.clone(), self.in_force()) else { return };
        let _one_at_a_time = self.snapshotting.lock().await;
        let (pipeline, served) = (Arc::clone(&self.pipeline), served(&config.snapshot));
        // No request came yet: what is cached are the golden texts, and a snapshot that is there may hold much more.
        if pipeline.caches().known_items.measure().n_entries == 0 {
            return;
        }
        let began = Instant::now();
        let write = move || cache_snapshot::write(&folder, &pipeline.caches(), &served);
        match self.on_loader(write).await.map(|written| written.map_err(|error| error.to_string())) {
            Ok(Ok(written)) => {
                log("caches written", &written.snapshot, written.counts, began.elapsed());
                for path in &written.not_removed {
                    tracing::warn!(path = %path.display(), "an older snapshot cannot be removed");
                }
                events::snapshot_written();
            }
            Ok(Err(error)) => {
                tracing::error!(error, "the caches' snapshot cannot be written, the one before stays");
                events::snapshot_finished("failed");
            }
            Err(error) => tracing::error!(%error, "the caches' snapshot cannot be written"),
        }
    }

    /// Takes a file of vectors into the caches, if a model that serves can use it.
    pub async fn import(&self, file: Vec<u8>) -> Result<Result<Imported, ReadError>, PushError> {
        let served = self.in_force().map(|config| served(&config.snapshot)).unwrap_or_default();
        let pipeline = Arc::clone(&self.pipeline);
        self.on_loader(move || cache_snapshot::import(&file, &pipeline.caches(), &served)).await
    }

    /// The file of one cache's vectors of `model`, whole, to `out`.
    pub async fn export(
        &self,
        model: Arc<Model>,
        of_contents: bool,
        mut out: impl std::io::Write + Send + 'static,
    ) -> Result<std::io::Result<cache_snapshot::Exported>, PushError> {
        let pipeline = Arc::clone(&self.pipeline);
        self.on_loader(move || {
            let (caches, manifest) = (pipeline.caches(), &model.manifest);
            match of_contents {
                true => cache_snapshot::export(&mut out, caches.contents, model.encoder.digest(), manifest.encoder.dim),
                false => cache_snapshot::export(&mut out, caches.items, model.tower_digest, manifest.item_tower.dim),
            }
        })
        .await
    }
}

fn served(snapshot: &Snapshot) -> Vec<Served> {
    let of = |model: &Arc<Model>| Served {
        encoder: model.encoder.digest(),
        content_dim: model.manifest.encoder.dim,
        tower: model.tower_digest,
        item_dim: model.manifest.item_tower.dim,
    };
    snapshot.all().map(of).collect()
}

fn log(message: &str, path: &std::path::Path, counts: Counts, took: Duration) {
    let Counts { n_contents, n_items, n_known_items, n_bytes } = counts;
    let took_ms = took.as_millis() as u64;
    tracing::info!(path = %path.display(), n_contents, n_items, n_known_items, n_bytes, took_ms, "{message}");
}
