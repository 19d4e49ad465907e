//! Pushes the config when the config file changes and on SIGHUP.
//!
//! The watch is on the file's folder, because editors replace the file, and Kubernetes replaces the folder that a symlink
//! points to and never touches the file itself. Any event in the folder causes the file to be read, and only a changed text
//! causes a push. SIGHUP causes a push even if the text is unchanged or another config was pushed over it, because the
//! bundles of the config in force may have changed.

use super::{Lifecycle, Push, Trigger, desired};
use crate::config::raw::read_file;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// Files are written in pieces and folders replaced in steps, so the file is read only after no event for this long.
const QUIET: Duration = Duration::from_millis(200);
/// The file is read after this time even if events continue, because other files in the folder may change all the time.
const PATIENCE: Duration = Duration::from_secs(2);

/// The watched config file and the handler of SIGHUP. Events are kept until [`run`] handles them.
#[derive(Debug)]
pub struct ConfigSource {
    folder_changed: mpsc::Sender<()>,
    folder_changes: mpsc::Receiver<()>,
    hang_up: Signal,
    /// Watches the folder until it is dropped.
    _watcher: Option<RecommendedWatcher>,
}

impl ConfigSource {
    /// Watches the folder of `file` and handles SIGHUP, which would otherwise end the process. If the folder cannot be
    /// watched, only SIGHUP is handled.
    pub fn open(file: &Path) -> io::Result<Self> {
        let (folder_changed, folder_changes) = mpsc::channel(1);
        let watcher = watch(file, folder_changed.clone()).inspect_err(|error| {
            tracing::warn!(%error, "the config file is not watched: use SIGHUP or `midemb admin push`");
        });
        let hang_up = signal(SignalKind::hangup())?;
        Ok(ConfigSource { folder_changed, folder_changes, hang_up, _watcher: watcher.ok() })
    }
}

/// Pushes the config file whenever its text changes, and the desired config at every SIGHUP. `last_text` is the file's text
/// at the start of the server. Never returns.
pub async fn run(lifecycle: Arc<Lifecycle>, source: ConfigSource, last_text: String) {
    let ConfigSource { folder_changed, mut folder_changes, mut hang_up, _watcher } = source;
    let mut last_text = Ok(last_text);
    // The file may have changed after it was read and before it was watched.
    let _ = folder_changed.try_send(());
    loop {
        let trigger = tokio::select! {
            // Never `None`, because `folder_changed` is alive.
            _ = folder_changes.recv() => Trigger::File,
            _ = hang_up.recv() => Trigger::Signal,
        };
        if trigger == Trigger::File {
            let quiet = async { while tokio::time::timeout(QUIET, folder_changes.recv()).await.is_ok() {} };
            let _ = tokio::time::timeout(PATIENCE, quiet).await;
        }
        let read = read_file(lifecycle.file());
        let text = read.as_ref().map(String::clone).map_err(ToString::to_string);
        if trigger == Trigger::File && text == last_text {
            continue;
        }
        last_text = text;
        let who = format!("{} of {}", trigger.as_str(), lifecycle.file().display());
        let config = match trigger {
            // SIGHUP reloads the bundles of the desired config; it must not undo a push.
            Trigger::Signal => desired::read(lifecycle.file()).map(|desired| desired.text),
            _ => read,
        };
        match config {
            // The journal records the result.
            Ok(text) => drop(lifecycle.apply(new_push(text, trigger, who)).await),
            Err(error) => lifecycle.record_unreadable(trigger, &who, &error.into()),
        }
    }
}

fn new_push(text: String, trigger: Trigger, who: String) -> Push {
    Push { text, trigger, who, expected_digest: None, is_dry_run: false, pushed_file: None }
}

fn watch(file: &Path, folder_changed: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let is_change = event.is_ok_and(|event| !event.kind.is_access());
        if is_change {
            // If the channel is full, a read of the file is pending already.
            let _ = folder_changed.try_send(());
        }
    })?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
