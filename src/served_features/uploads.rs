//! Uploads finished files, oldest first, and removes them once the store has them.
//!
//! What is to be uploaded is what lies in the folder: a file that an earlier process left, or that could not be uploaded before, is
//! found like a new one. Two processes that upload the same file put the same bytes under the same name.

use super::folder::{self, UtcTime};
use crate::{
    bundle::store::{StoreError, UploadFolder},
    telemetry::events,
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Mutex, Notify},
    task::spawn_blocking,
    time::timeout,
};

/// The time between two attempts after failures: doubled from one to the next, from the first to the last of these.
const BACKOFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(300)];
/// A store that failed so often in one pass is left alone until the next one.
const MAX_FAILURES: usize = 3;

#[derive(Debug)]
pub(super) struct Uploads {
    folder: PathBuf,
    store: UploadFolder,
    /// Notified of every file that is finished.
    finished: Arc<Notify>,
    /// Held during a pass. Whether the last one failed.
    is_failing: Mutex<bool>,
}

impl Uploads {
    pub(super) fn new(folder: PathBuf, store: UploadFolder, finished: Arc<Notify>) -> Self {
        Uploads { folder, store, finished, is_failing: Mutex::default() }
    }

    /// Uploads what is there and whatever is finished later. Never returns; drop the future to stop it.
    pub(super) async fn run(&self) {
        let [first, last] = BACKOFF;
        let mut backoff = first;
        loop {
            if self.pass().await {
                backoff = first;
                self.finished.notified().await;
            } else {
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(last);
            }
        }
    }

    /// Uploads what is there, for at most as long as this.
    pub(super) async fn run_once(&self, within: Duration) {
        if timeout(within, self.pass()).await.is_err() {
            tracing::warn!(url = %self.store.url(), "served features are not uploaded in time, the next process uploads the rest");
        }
    }

    /// Uploads every file once. False if some are left.
    async fn pass(&self) -> bool {
        let mut is_failing = self.is_failing.lock().await;
        let failure = match self.on_disk(|folder| folder::finished(&folder)).await {
            Ok(files) => self.upload_all(files).await,
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = &failure
            && !*is_failing
        {
            tracing::warn!(url = %self.store.url(), reason, "some served features cannot be uploaded, they stay on the disk and are tried again");
        }
        *is_failing = failure.is_some();
        failure.is_none()
    }

    /// Returns why files are left, if some are.
    async fn upload_all(&self, files: Vec<PathBuf>) -> Option<String> {
        let (mut failures, mut n_failures_of_store) = (Vec::new(), 0);
        let n_files = files.len();
        for path in files {
            match self.upload(&path).await {
                Ok(()) => {
                    events::served_features_file("uploaded");
                    failures.extend(self.remove(path).await.err());
                }
                // Another process has uploaded it, or a reader has taken it.
                Err(StoreError::Disk { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    events::served_features_file("upload_failed");
                    n_failures_of_store += usize::from(!matches!(error, StoreError::Disk { .. }));
                    failures.push(error.to_string());
                }
            }
            if n_failures_of_store == MAX_FAILURES {
                break;
            }
        }
        if n_files > 0
            && let Ok(n_bytes) = self.on_disk(|folder| folder::n_bytes(&folder)).await
        {
            events::served_features_measured(n_bytes);
        }
        failures.into_iter().next()
    }

    async fn upload(&self, path: &Path) -> Result<(), StoreError> {
        // The store has the partitions that the folder has.
        let relative = path.strip_prefix(&self.folder).unwrap_or(path);
        self.store.upload(&relative.to_string_lossy(), path).await
    }

    /// Removes an uploaded file, or returns why it will be uploaded again.
    async fn remove(&self, path: PathBuf) -> Result<(), String> {
        let shown = path.display().to_string();
        let removed = self.on_disk(move |_folder| folder::remove(&path, UtcTime::now().date())).await;
        removed.map_err(|error| format!("{shown} is uploaded, but cannot be removed: {error}"))
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(PathBuf) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let folder = self.folder.clone();
        spawn_blocking(move || work(folder)).await.map_err(io::Error::other)?
    }
}
