//! Notices that the config file has changed, and SIGHUP.
//!
//! The watch is on the file's folder, because editors replace the file, and Kubernetes replaces the folder that a symlink
//! points to and never touches the file itself. Some changes cause no event there: a symlink whose target is edited in another
//! folder, a single file that is mounted into a container, a folder on a network. So the file is also read every few
//! seconds. Only a text that was not considered yet causes a reload, whichever way it was noticed.
//!
//! SIGHUP causes a reload even if the text is unchanged or another config was pushed over it, because the bundles of the config
//! in force may have changed. The text that is put in force is read by the reload, in its turn: see `turn.rs`.

use super::{Lifecycle, PushError, Trigger, on_blocking};
use crate::config::raw::read_file;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::MissedTickBehavior,
};

/// Files are written in pieces and folders replaced in steps, so the file is read only after no event for this long.
const QUIET: Duration = Duration::from_millis(200);
/// The file is read after this time even if events continue, because other files in the folder may change all the time.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the file is read without an event. A new text counts once it was read twice, in case it is still being written.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

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
    /// watched, changes of the file are noticed a few seconds later.
    pub fn open(file: &Path) -> io::Result<Self> {
        let (folder_changed, folder_changes) = mpsc::channel(1);
        let watcher = watch(file, folder_changed.clone()).inspect_err(|error| {
            tracing::warn!(%error, "the folder of the config file cannot be watched, so the file is read every 2 s instead");
        });
        let hang_up = signal(SignalKind::hangup())?;
        Ok(ConfigSource { folder_changed, folder_changes, hang_up, _watcher: watcher.ok() })
    }
}

/// Reloads the config whenever the text of the config file changes, and at every SIGHUP. Never returns.
pub async fn run(lifecycle: Arc<Lifecycle>, source: ConfigSource) {
    let ConfigSource { folder_changed, mut folder_changes, mut hang_up, _watcher } = source;
    let mut file = ConfigFile { lifecycle: Arc::clone(&lifecycle), polled: None, reported: None };
    let mut polls = tokio::time::interval(POLL_INTERVAL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The file may have changed after it was read and before it was watched.
    let _ = folder_changed.try_send(());
    loop {
        tokio::select! {
            // Never `None`, because `folder_changed` is alive.
            _ = folder_changes.recv() => {
                let quiet = async { while tokio::time::timeout(QUIET, folder_changes.recv()).await.is_ok() {} };
                let _ = tokio::time::timeout(PATIENCE, quiet).await;
                file.look().await;
            }
            _ = polls.tick() => file.poll().await,
            _ = hang_up.recv() => {
                if let Err(error) = lifecycle.reload(Trigger::Signal).await {
                    lifecycle.record_unreadable(Trigger::Signal, &error);
                }
            }
        }
    }
}

/// The config file as the watch sees it.
struct ConfigFile {
    lifecycle: Arc<Lifecycle>,
    /// What the last poll read, or why it could not.
    polled: Option<Result<String, String>>,
    /// What was reported last as unreadable.
    reported: Option<Unreadable>,
}

/// A config that could not be read. It is tried again at every poll and reported once.
#[derive(PartialEq, Eq)]
struct Unreadable {
    /// The text of the config file, if it is the pushed config beside it that cannot be read.
    file_text: Option<String>,
    reason: String,
}

impl ConfigFile {
    /// Reloads the config if the file's text is new.
    async fn look(&mut self) {
        match self.read().await {
            Ok(text) if self.lifecycle.has_considered(&text) => self.reported = None,
            Ok(text) => match self.lifecycle.reload(Trigger::File).await {
                Ok(()) => self.reported = None,
                Err(error) => self.report(Some(text), &error),
            },
            Err(error) => self.report(None, &error),
        }
    }

    fn report(&mut self, file_text: Option<String>, error: &PushError) {
        let unreadable = Some(Unreadable { file_text, reason: error.to_string() });
        if self.reported != unreadable {
            self.lifecycle.record_unreadable(Trigger::File, error);
            self.reported = unreadable;
        }
    }

    /// Does the same if two polls in a row have read the same.
    async fn poll(&mut self) {
        let read = Some(self.read().await.map_err(|error| error.to_string()));
        if self.polled == read {
            self.look().await;
        }
        self.polled = read;
    }

    async fn read(&self) -> Result<String, PushError> {
        let path = self.lifecycle.file().to_path_buf();
        Ok(on_blocking(move || read_file(&path)).await??)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cache::{CacheLimits, Caches},
        config::Settings,
        lifecycle::desired::pushed_path,
        pipeline::Pipeline,
    };
    use std::fs;
    use tokio::sync::watch as watch_channel;

    fn config_file(file: &Path, draining: watch_channel::Receiver<bool>) -> ConfigFile {
        let bytes = 1 << 20;
        let caches = Caches::new(CacheLimits {
            content_bytes: bytes,
            item_bytes: bytes,
            user_bytes: bytes,
            known_items_bytes: bytes,
            max_text_bytes: 100,
        });
        let pipeline = Arc::new(Pipeline::new(Arc::new(caches), 1, 1));
        let settings = Settings::from_text("[[models]]\nname = 'a'\nbundle = 'a'\n", file).unwrap();
        let lifecycle = Lifecycle::new(pipeline, None, file.to_path_buf(), settings, draining);
        ConfigFile { lifecycle: Arc::new(lifecycle), polled: None, reported: None }
    }

    /// A few polls, of which the first alone may find another text than the one before it. Returns the number of entries in the
    /// journal.
    async fn poll(file: &mut ConfigFile) -> usize {
        for _ in 0..4 {
            file.poll().await;
        }
        file.lifecycle.journal.past().len()
    }

    /// Every poll used to add an entry and a log line, for as long as the pushed config could not be read.
    #[tokio::test]
    async fn a_pushed_config_that_cannot_be_read_is_reported_once_per_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("midemb.toml");
        let (_drain, draining) = watch_channel::channel(false);
        let mut file = config_file(&path, draining);
        fs::create_dir(pushed_path(&path)).unwrap();
        for (n_before, text) in ["a = 1\n", "a = 2\n"].into_iter().enumerate() {
            fs::write(&path, text).unwrap();
            assert_eq!(poll(&mut file).await, n_before + 1, "{text}");
        }
        let past = file.lifecycle.journal.past();
        assert!(past[0].reason.contains("midemb.pushed.toml cannot be read"), "{}", past[0].reason);
        // What was desired is found as soon as it can be read.
        fs::remove_dir(pushed_path(&path)).unwrap();
        assert_eq!(poll(&mut file).await, 3);
        let past = file.lifecycle.journal.past();
        assert!(past[0].reason.contains("unknown key"), "{}", past[0].reason);
        fs::remove_file(&path).unwrap();
        assert_eq!(poll(&mut file).await, 4, "a config file that is away");
    }
}
