//! When snapshots are read and written: at the start, before the first request; on a timer; and after the server has drained.
//!
//! Snapshots are written on threads that give way to those that serve; the last one, after the drain, has a time limit, because
//! an orchestrator kills a process that does not end. Nothing is written before the first item is known, so that the snapshot
//! of a server that nobody has called yet does not replace one that could not be read.
//!
//! A folder belongs to one process, which holds a lock on it until it ends: replicas that share a folder would overwrite each
//! other's snapshots. A process that finds the folder locked reads from it, and writes once the other process has ended, as
//! in a rolling update.

use super::{
    Counts, Served,
    folder::{self, FolderLock},
};
use crate::{
    cache::Caches,
    inference::background::{self, Urgency},
    telemetry::events,
};
use std::{
    io,
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
    /// Held while a snapshot is written, so that only one is written at a time. None until this process has the folder.
    folder_lock: Mutex<Option<FolderLock>>,
}

impl SnapshotKeeper {
    /// Keeps snapshots of `caches` in `folder`.
    pub fn new(caches: Arc<Caches>, folder: PathBuf) -> Self {
        SnapshotKeeper { caches, folder, folder_lock: Mutex::new(None) }
    }

    /// Fills the caches from the newest snapshot with everything that the models in `served` can use.
    pub async fn restore(&self, served: Vec<Served>) {
        let mut folder_lock = self.folder_lock.lock().await;
        if let Err(error) = self.take_folder(&mut folder_lock).await
            && error.kind() == io::ErrorKind::WouldBlock
        {
            let folder = self.folder.display();
            tracing::info!(%folder, "another process writes its snapshots here, this one does once that one has ended");
        }
        drop(folder_lock);
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

    /// Writes a snapshot of the caches of the models in `served`, if at least one item is known and the folder is this process's.
    pub async fn write(&self, served: Vec<Served>) {
        self.write_with(Urgency::GivesWay, served).await;
    }

    /// Does the same for a server that has drained, and gives up after `within`. What was written by then is removed by the next
    /// snapshot.
    pub async fn write_last(&self, served: Vec<Served>, within: Duration) {
        if tokio::time::timeout(within, self.write_with(Urgency::Normal, served)).await.is_err() {
            let within_ms = within.as_millis() as u64;
            tracing::warn!(within_ms, "the caches could not be written in time, the previous snapshot is kept");
            events::snapshot_finished("failed");
        }
    }

    async fn write_with(&self, urgency: Urgency, served: Vec<Served>) {
        let mut folder_lock = self.folder_lock.lock().await;
        // Before the first request the caches hold only the golden texts, and an existing snapshot may hold much more.
        if served.is_empty() || self.caches.known_items.measure().n_entries == 0 {
            return;
        }
        if let Err(error) = self.take_folder(&mut folder_lock).await {
            self.log_not_taken(&error);
            return;
        }
        let (caches, folder) = (Arc::clone(&self.caches), self.folder.clone());
        let began = Instant::now();
        let write = move || super::write(&folder, &caches, &served);
        match background::run(urgency, write).await {
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

impl SnapshotKeeper {
    /// Locks the folder, unless this process has it already.
    async fn take_folder(&self, lock: &mut Option<FolderLock>) -> io::Result<()> {
        if lock.is_none() {
            let folder = self.folder.clone();
            let taken = background::run(Urgency::Normal, move || folder::lock(&folder)).await;
            *lock = Some(taken.map_err(io::Error::other)??);
        }
        Ok(())
    }

    fn log_not_taken(&self, error: &io::Error) {
        let folder = self.folder.display();
        if error.kind() == io::ErrorKind::WouldBlock {
            tracing::warn!(%folder, "another process writes its snapshots here, so this one writes none: give each replica a folder of its own");
            events::snapshot_finished("skipped");
        } else {
            tracing::error!(%error, "the snapshot of the caches cannot be written, the previous one is kept");
            events::snapshot_finished("failed");
        }
    }
}

fn log(message: &str, path: &Path, counts: Counts, took: Duration) {
    let Counts { n_contents, n_items, n_known_items, n_bytes } = counts;
    let took_ms = took.as_millis() as u64;
    tracing::info!(path = %path.display(), n_contents, n_items, n_known_items, n_bytes, took_ms, "{message}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::CacheLimits,
        domain::{Digest, Item, ItemText, Priority},
    };

    fn keeper(folder: &Path) -> SnapshotKeeper {
        let limits = CacheLimits {
            content_bytes: 1 << 20,
            item_bytes: 1 << 20,
            user_bytes: 1 << 20,
            known_items_bytes: 1 << 20,
            max_text_bytes: 1 << 10,
        };
        let caches = Arc::new(Caches::new(limits));
        let text = ItemText::titled("a");
        caches.known_items.resolve(vec![Item { id: "a", text: Some(Ok(text)) }], Priority::WarmUp);
        SnapshotKeeper::new(caches, folder.to_path_buf())
    }

    fn served() -> Vec<Served> {
        let (encoder, tower) = (Digest::from_bytes([1; 16]), Digest::from_bytes([2; 16]));
        vec![Served { encoder, content_dim: 4, tower, record_dim: 2 }]
    }

    /// Replicas that share a folder used to remove each other's snapshots without a word.
    #[tokio::test]
    async fn a_folder_belongs_to_the_process_that_holds_it_until_that_one_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (keeper(folder.path()), keeper(folder.path()));
        old.write(served()).await;
        let first = folder::newest(folder.path()).unwrap().expect("nothing was written");
        new.restore(served()).await;
        new.write(served()).await;
        assert_eq!(folder::newest(folder.path()).unwrap(), Some(first.clone()), "the other's snapshot was replaced");
        drop(old);
        new.write(served()).await;
        assert_ne!(
            folder::newest(folder.path()).unwrap(),
            Some(first),
            "nothing was written after the other had ended"
        );
    }

    /// An orchestrator kills a process that writes for too long, and then the log does not say what was lost.
    #[tokio::test]
    async fn the_last_snapshot_does_not_hold_up_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = keeper(folder.path());
        let _one_that_never_ends = keeper.folder_lock.lock().await;
        let patience = Duration::from_secs(60);
        let ended = tokio::time::timeout(patience, keeper.write_last(served(), Duration::ZERO)).await;
        assert!(ended.is_ok(), "it waited without a limit");
        assert_eq!(folder::newest(folder.path()).unwrap(), None);
    }
}
