//! The folder of the files: how they are named, found, measured and removed.
//!
//! A file is `date=2026-11-28/20261128T031642-<bundle>-<random>.parquet`, where `date` is the UTC day of its rows, as readers of
//! Hive partitions expect it. While it is written it has a hidden name that no reader's `*.parquet` matches, and its writer holds
//! a lock on it: an unfinished file without a lock was left by a process that is gone. So several processes may use one folder.
//! Only files with exactly these names are ever removed; everything else in the folder belongs to somebody else, and so does a
//! `date=` folder that cannot be read.

use super::{sample::unix_micros, sampler::random_id};
use humantime::format_rfc3339_seconds;
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const DATE: &str = "date=";
const FINISHED: &str = ".parquet";
const UNFINISHED: &str = ".unfinished";

/// A file that is being written.
#[derive(Debug)]
pub(super) struct NewFile {
    pub(super) file: File,
    unfinished: PathBuf,
    finished: PathBuf,
}

/// Creates a file for the rows of one day and of the bundle with this digest.
pub(super) fn create(folder: &Path, time: &UtcTime, bundle_digest: &str) -> io::Result<NewFile> {
    match try_to_create(folder, time, bundle_digest) {
        // The day's folder or the file was removed in between, by an upload or a process that starts.
        Err(error) if error.kind() == io::ErrorKind::NotFound => try_to_create(folder, time, bundle_digest),
        created => created,
    }
}

fn try_to_create(folder: &Path, time: &UtcTime, bundle_digest: &str) -> io::Result<NewFile> {
    let partition = folder.join(format!("{DATE}{}", time.date()));
    // Rows say who was served what, so only the owner may read them.
    DirBuilder::new().mode(0o700).recursive(true).create(&partition)?;
    let bundle = bundle_digest.get(..12).unwrap_or(bundle_digest);
    let name = format!("{}-{bundle}-{}{FINISHED}", time.compact(), &random_id()[..16]);
    let unfinished = partition.join(format!(".{name}{UNFINISHED}"));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    match file.try_lock() {
        // Where files cannot be locked, none is taken for a left-over.
        Ok(()) | Err(TryLockError::Error(_)) => {}
        Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::NotFound.into()),
    }
    if file.metadata()?.nlink() == 0 {
        // A process that started just then took it for a left-over.
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(NewFile { file, unfinished, finished: partition.join(name) })
}

impl NewFile {
    /// Makes the file visible to readers once all of it is on the disk.
    pub(super) fn publish(self) -> io::Result<PathBuf> {
        self.file.sync_all()?;
        fs::rename(&self.unfinished, &self.finished)?;
        if let Some(partition) = self.finished.parent() {
            // Not every file system can do it, and a crash loses the name at most.
            let _ = File::open(partition).and_then(|partition| partition.sync_all());
        }
        Ok(self.finished)
    }

    pub(super) fn unfinished_path(&self) -> &Path {
        &self.unfinished
    }
}

/// Removes the unfinished files of processes that are gone, and returns their number. Leaves what it may not remove.
pub(super) fn remove_left_overs(folder: &Path) -> io::Result<usize> {
    let unfinished = files(folder)?.into_iter().filter(|path| is_unfinished(path));
    Ok(unfinished.filter(|path| remove_left_over(path).is_ok()).count())
}

fn remove_left_over(path: &Path) -> io::Result<()> {
    // Some file systems lock only what may be written.
    let file = OpenOptions::new().write(true).open(path)?;
    file.try_lock()?;
    // While the lock is held, so that its writer cannot have locked it in between.
    fs::remove_file(path)
}

/// The finished files, oldest first.
pub(super) fn finished(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = files(folder)?;
    paths.retain(|path| !is_unfinished(path));
    paths.sort_unstable();
    Ok(paths)
}

/// What all files of the folder take.
pub(super) fn n_bytes(folder: &Path) -> io::Result<u64> {
    // A file may be uploaded or removed in the meantime.
    Ok(files(folder)?.iter().filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.len()).sum())
}

/// Removes a finished file, and the folder of its day if that was its last one and another day is `today`.
pub(super) fn remove(path: &Path, today: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(partition) = path.parent().filter(|partition| name(partition) != format!("{DATE}{today}")) {
        // It fails where there are other files, which is as it should be.
        let _ = fs::remove_dir(partition);
    }
    Ok(())
}

/// The finished and unfinished files; none if there is no folder yet.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for partition in entries(folder)?.into_iter().filter(|path| name(path).starts_with(DATE) && path.is_dir()) {
        let is_ours = |path: &PathBuf| (is_unfinished(path) || is_finished(path)) && path.is_file();
        found.extend(entries(&partition).unwrap_or_default().into_iter().filter(is_ours));
    }
    Ok(found)
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn is_finished(path: &Path) -> bool {
    is_name(name(path))
}

fn is_unfinished(path: &Path) -> bool {
    name(path).strip_prefix('.').and_then(|name| name.strip_suffix(UNFINISHED)).is_some_and(is_name)
}

/// Whether a file is called as [`create`] calls files.
fn is_name(name: &str) -> bool {
    let parts = name.strip_suffix(FINISHED).map(|stem| stem.split('-').collect::<Vec<_>>());
    let Some([time, bundle, random]) = parts.as_deref() else { return false };
    let has_shape = |text: &str, shape: &str| {
        text.len() == shape.len()
            && text.bytes().zip(shape.bytes()).all(|(found, of_shape)| match of_shape {
                b'0' => found.is_ascii_digit(),
                b'x' => found.is_ascii_hexdigit(),
                letter => found == letter,
            })
    };
    has_shape(time, "00000000T000000") && !bundle.is_empty() && has_shape(random, "xxxxxxxxxxxxxxxx")
}

/// A second of UTC, as `2026-11-28T03:16:42Z`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct UtcTime(String);

/// The last second that has four digits of a year.
const LAST_SECOND: u64 = 253_402_300_799;

impl UtcTime {
    /// The time with these microseconds since 1970.
    pub(super) fn from_micros(micros: i64) -> Self {
        let seconds = (micros.max(0) as u64 / 1_000_000).min(LAST_SECOND);
        UtcTime(format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string())
    }

    pub(super) fn now() -> Self {
        Self::from_micros(unix_micros(SystemTime::now()))
    }

    /// `2026-11-28`
    pub(super) fn date(&self) -> &str {
        self.0.split('T').next().unwrap_or_default()
    }

    /// `20261128T031642`, which sorts by time.
    fn compact(&self) -> String {
        self.0.chars().filter(|c| c.is_ascii_digit() || *c == 'T').collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn noon() -> UtcTime {
        UtcTime::from_micros(1_795_867_200_000_000)
    }

    #[test]
    fn times_are_written_as_utc() {
        assert_eq!((noon().date(), noon().compact().as_str()), ("2026-11-28", "20261128T120000"));
        assert_eq!(UtcTime::from_micros(951_827_696_999_999).compact(), "20000229T123456");
        assert_eq!(UtcTime::from_micros(i64::MIN).date(), "1970-01-01");
        assert_eq!(UtcTime::from_micros(i64::MAX).date(), "9999-12-31");
    }

    #[test]
    fn a_file_is_hidden_until_it_is_complete_and_only_its_owner_may_read_it() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("features");
        let new = create(&folder, &noon(), &"ab".repeat(32)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder), mode(new.unfinished_path())), (0o700, 0o600));
        assert_eq!(mode(&folder.join("date=2026-11-28")), 0o700);
        assert!(finished(&folder).unwrap().is_empty());
        let path = new.publish().unwrap();
        let expected = folder.join("date=2026-11-28/20261128T120000-abababababab-");
        assert!(path.to_str().unwrap().starts_with(expected.to_str().unwrap()), "{}", path.display());
        assert_eq!(finished(&folder).unwrap(), std::slice::from_ref(&path));
        assert_ne!(
            create(&folder, &noon(), &"ab".repeat(32)).unwrap().publish().unwrap(),
            path,
            "names must be unique"
        );
    }

    #[test]
    fn only_unfinished_files_that_nobody_writes_are_left_overs() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(remove_left_overs(&folder.join("not-there")).unwrap(), 0);
        let left = create(folder, &noon(), "abc").unwrap().unfinished_path().to_owned();
        let being_written = create(folder, &noon(), "abc").unwrap();
        let whole = create(folder, &noon(), "abc").unwrap().publish().unwrap();
        let foreign = [".notes", ".notes.unfinished", "training.parquet", "20261128T120000-abc-mine.parquet"]
            .map(|name| folder.join("date=2026-11-28").join(name));
        for path in &foreign {
            fs::write(path, "somebody else's").unwrap();
        }
        assert_eq!(remove_left_overs(folder).unwrap(), 1);
        assert!(!left.exists() && being_written.unfinished_path().exists());
        assert!(foreign.iter().all(|path| path.exists()));
        assert_eq!(finished(folder).unwrap(), [whole], "somebody else's file would be uploaded and removed");
    }

    #[test]
    fn the_size_is_that_of_all_files_and_a_folder_is_removed_after_its_last_day() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(n_bytes(folder).unwrap(), 0);
        let new = create(folder, &noon(), "abc").unwrap();
        new.file.set_len(70).unwrap();
        fs::write(folder.join("somebody else's"), [0; 1000]).unwrap();
        assert_eq!(n_bytes(folder).unwrap(), 70);
        let first = new.publish().unwrap();
        let second = create(folder, &noon(), "abc").unwrap().publish().unwrap();
        remove(&first, "2026-11-29").unwrap();
        remove(&first, "2026-11-29").unwrap();
        assert!(second.exists());
        remove(&second, "2026-11-28").unwrap();
        assert!(second.parent().unwrap().exists(), "the folder of today was removed");
        let third = create(folder, &noon(), "abc").unwrap().publish().unwrap();
        remove(&third, "2026-11-29").unwrap();
        assert!(!third.parent().unwrap().exists());
    }
}
