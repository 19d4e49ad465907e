//! The folders of snapshots: how they are named, created and removed, so that a snapshot is complete or absent.
//!
//! A snapshot is written in a folder whose name begins with `.new-` and is renamed once all of it is on the disk. Its number is
//! Unix time in milliseconds, or one more than the previous number if the clock went back, so the highest number is the newest.
//! The process that writes holds a lock on `.lock`, so that two processes do not remove each other's snapshots.
//! Only folders with these names are ever removed; everything else in the folder belongs to somebody else and stays.

use super::SnapshotError;
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

const SNAPSHOT: &str = "snapshot-";
const NEW: &str = ".new-";
const LOCK: &str = ".lock";
const N_DIGITS: usize = 15;

/// Holds a folder for the snapshots of this process until it is dropped or the process ends.
#[derive(Debug)]
pub(super) struct FolderLock {
    _file: File,
}

/// Locks a folder, which is created if it does not exist. An error of the kind `WouldBlock` means that another process holds it.
pub(super) fn lock(folder: &Path) -> io::Result<FolderLock> {
    fs::create_dir_all(folder)?;
    let path = folder.join(LOCK);
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(FolderLock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
        Err(TryLockError::Error(error)) => {
            tracing::warn!(%error, folder = %folder.display(), "the folder of snapshots cannot be locked: no other process may use it");
            Ok(FolderLock { _file: file })
        }
    }
}

/// Creates a snapshot: calls `fill` with an empty folder, then renames the folder. If anything fails, the folder is removed.
///
/// Returns the snapshot's folder and the result of `fill`.
pub(super) fn create<T>(
    folder: &Path,
    fill: impl FnOnce(&Path) -> Result<T, SnapshotError>,
) -> Result<(PathBuf, T), SnapshotError> {
    fs::create_dir_all(folder).map_err(SnapshotError::at(folder))?;
    // A process that was killed while it wrote left these behind, and they may be what fills the disk.
    for left_over in entries_named(folder, is_new).map_err(SnapshotError::at(folder))? {
        fs::remove_dir_all(&left_over).map_err(SnapshotError::at(&left_over))?;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let newest = newest(folder).map_err(SnapshotError::at(folder))?.as_deref().and_then(number);
    let number = newest.map_or(now, |newest| now.max(newest.saturating_add(1)));
    let new = folder.join(format!("{NEW}{number:0N_DIGITS$}-{}", process::id()));
    let snapshot = folder.join(format!("{SNAPSHOT}{number:0N_DIGITS$}"));
    let filled = fill_and_rename(&new, &snapshot, fill);
    if filled.is_err() {
        // If this fails too, the next snapshot removes the folder. The first error says what is wrong.
        let _ = fs::remove_dir_all(&new);
    }
    let filled = filled?;
    sync_folder(folder)?;
    Ok((snapshot, filled))
}

fn fill_and_rename<T>(
    new: &Path,
    snapshot: &Path,
    fill: impl FnOnce(&Path) -> Result<T, SnapshotError>,
) -> Result<T, SnapshotError> {
    DirBuilder::new().mode(0o700).create(new).map_err(SnapshotError::at(new))?;
    let filled = fill(new)?;
    sync_folder(new)?;
    fs::rename(new, snapshot).map_err(SnapshotError::at(snapshot))?;
    Ok(filled)
}

/// Makes sure that the names in a folder are on the disk.
fn sync_folder(folder: &Path) -> Result<(), SnapshotError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(SnapshotError::at(folder))
}

/// Removes all snapshots except `kept` and returns those that could not be removed.
pub(super) fn remove_all_but(folder: &Path, kept: &Path) -> Vec<PathBuf> {
    let mut not_removed = Vec::new();
    for snapshot in entries_named(folder, |name| snapshot_number(name).is_some()).unwrap_or_default() {
        if snapshot != kept && fs::remove_dir_all(&snapshot).is_err() {
            not_removed.push(snapshot);
        }
    }
    not_removed
}

/// The newest snapshot, or `None` if there is none.
pub(super) fn newest(folder: &Path) -> io::Result<Option<PathBuf>> {
    match entries_named(folder, |name| snapshot_number(name).is_some()) {
        Ok(snapshots) => Ok(snapshots.into_iter().max_by_key(|path| number(path))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files of a snapshot's parts, ordered by name. Within one kind this is the order in which they were written.
pub(super) fn parts(snapshot: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = entries_named(snapshot, |name| name.ends_with(".safetensors"))?;
    files.sort_unstable();
    Ok(files)
}

fn entries_named(folder: &Path, matches: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(&matches) {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn number(snapshot: &Path) -> Option<u64> {
    snapshot.file_name()?.to_str().and_then(snapshot_number)
}

fn snapshot_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(SNAPSHOT)?;
    if digits.len() != N_DIGITS || !is_digits(digits) {
        return None;
    }
    digits.parse().ok()
}

fn is_new(name: &str) -> bool {
    let numbers = name.strip_prefix(NEW).and_then(|rest| rest.split_once('-'));
    numbers.is_some_and(|(number, process)| is_digits(number) && is_digits(process))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}
