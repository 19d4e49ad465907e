//! The doors that open by themselves: the config file, and SIGHUP.
//!
//! What is watched is the file's folder, as an editor replaces the file and Kubernetes replaces the folder behind it: it
//! swings one symlink, and the file itself never changes. So whatever happens in the folder is a reason to read the file, and
//! only another text in it is a reason to act. SIGHUP acts also where the text is the same, or where another config was pushed over
//! it: the bundles behind what is in force may be others.

use super::{Lifecycle, Push, Trigger, desired};
use crate::config::raw::read_file;
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use std::{io, path::Path, sync::Arc, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

/// A file is written in pieces, a folder replaced in steps: what is read once it is quiet is whole.
const QUIET: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(2);

/// The doors, open: what comes through is kept until somebody looks.
#[derive(Debug)]
pub struct Doors {
    told: mpsc::Sender<()>,
    events: mpsc::Receiver<()>,
    hang_up: Signal,
    /// Dropped, it would watch no longer.
    _watcher: Option<RecommendedWatcher>,
}

impl Doors {
    /// Watches the folder of `file`, and takes SIGHUP, which would end the process otherwise.
    pub fn open(file: &Path) -> io::Result<Self> {
        let (told, events) = mpsc::channel(1);
        let watcher = watch(file, told.clone()).inspect_err(|error| {
            tracing::warn!(%error, "the config file is not watched: use SIGHUP or `midemb admin push`");
        });
        Ok(Doors { told, events, hang_up: signal(SignalKind::hangup())?, _watcher: watcher.ok() })
    }
}

/// Pushes what the config file says whenever that changes, and what is to be in force at every SIGHUP. `seen` is what it said when the server started.
/// Ends with the process.
pub async fn run(lifecycle: Arc<Lifecycle>, doors: Doors, seen: String) {
    let Doors { told, mut events, mut hang_up, _watcher } = doors;
    let mut seen = Ok(seen);
    // The file may have changed between being read and being watched.
    let _ = told.try_send(());
    loop {
        let trigger = tokio::select! {
            // `told` lives here, so this never ends.
            _ = events.recv() => Trigger::File,
            _ = hang_up.recv() => Trigger::Signal,
        };
        if trigger == Trigger::File {
            let quiet = async { while tokio::time::timeout(QUIET, events.recv()).await.is_ok() {} };
            // Other files of the folder may never rest.
            let _ = tokio::time::timeout(PATIENCE, quiet).await;
        }
        let found = read_file(lifecycle.file());
        let text = found.as_ref().map(String::clone).map_err(ToString::to_string);
        if trigger == Trigger::File && text == seen {
            continue;
        }
        seen = text;
        let who = format!("{} of {}", trigger.as_str(), lifecycle.file().display());
        let wish = match trigger {
            // Whoever sends it wants what is there to be looked at again, not a push to be undone.
            Trigger::Signal => desired::read(lifecycle.file()).map(|desired| desired.text),
            _ => found,
        };
        match wish {
            // The journal says how it ended.
            Ok(text) => drop(lifecycle.apply(push(text, trigger, who)).await),
            Err(error) => lifecycle.refuse(trigger, &who, error.into()),
        }
    }
}

fn push(text: String, trigger: Trigger, who: String) -> Push {
    Push { text, trigger, who, expected: None, is_dry_run: false, pushed_file: None }
}

fn watch(file: &Path, told: mpsc::Sender<()>) -> notify::Result<RecommendedWatcher> {
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let is_change = event.is_ok_and(|event| !event.kind.is_access());
        if is_change {
            // Full is fine: the file will be read.
            let _ = told.try_send(());
        }
    })?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    watcher.watch(folder, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
