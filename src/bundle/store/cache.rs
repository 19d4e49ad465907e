//! The local folder of fetched bundles.
//!
//! ```text
//! <digest>/             a bundle: always complete, because it is renamed into place
//! files/<sha256>        one file, hard-linked into every bundle that contains it
//! latest/<sha256>       the digest of the bundle that served last from the URL with this SHA-256
//! .new-*  .old-*  *.part-*   work in progress, or left over from a process that died
//! ```
//!
//! Several processes may share the folder: names of work in progress have random suffixes, and if two processes finish the
//! same bundle or file, the second one finds it done. The folder of a bundle in progress is locked (flock) by its process, because
//! one large file may take hours, during which nothing changes in the folder. Entries with other names are never touched. This
//! module does not use the network.

use super::StoreError;
use crate::{
    bundle::{
        files,
        manifest::{self, FileSpec, Manifest},
    },
    domain::digest::{hex, sha256_hex},
};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeSet, HashSet},
    fs::{self, File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::sync::mpsc;

const FILES: &str = "files";
const LATEST: &str = "latest";
const PART: &str = ".part-";
/// Bundles that [`Cache::prune`] keeps besides those in use, for rollbacks.
const N_NEWEST: usize = 5;
/// An entry that was not written for this long, and that is not locked, belongs to no running process.
const LEFT_OVER_AGE: Duration = Duration::from_hours(1);
/// The same where the file system has no locks.
const UNLOCKED_AGE: Duration = Duration::from_hours(24);

/// The numbers of bundles and files that [`super::Store::prune`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "names and types say it all")]
pub struct Pruned {
    pub n_bundles: usize,
    pub n_files: usize,
}

/// The size and the digest of the bytes received for a file.
pub(super) struct Received {
    pub(super) n_bytes: u64,
    pub(super) sha256: String,
}

/// A cached bundle, and where it is.
pub(super) struct Located {
    pub(super) digest: String,
    pub(super) folder: PathBuf,
}

#[derive(Debug, Clone)]
pub(super) struct Cache {
    pub(super) folder: PathBuf,
}

impl Cache {
    pub(super) fn new(folder: PathBuf) -> Self {
        Cache { folder }
    }

    /// The path of a file in `files/`.
    fn blob(&self, sha256: &str) -> PathBuf {
        self.folder.join(FILES).join(sha256)
    }

    /// The folder of a bundle, if it is cached with this manifest and its files have the right sizes.
    pub(super) fn find(&self, digest: &str) -> Option<PathBuf> {
        let folder = self.folder.join(digest);
        let manifest = self.manifest(digest)?;
        let has_file =
            |file: &FileSpec| fs::metadata(folder.join(&file.path)).is_ok_and(|found| found.len() == file.bytes);
        manifest.files.iter().all(has_file).then_some(folder)
    }

    /// The manifest of a cached bundle, if its SHA-256 is the bundle's digest.
    fn manifest(&self, digest: &str) -> Option<Manifest> {
        let text = fs::read_to_string(self.folder.join(digest).join(manifest::FILE)).ok()?;
        if sha256_hex(text.as_bytes()) != digest {
            return None;
        }
        Manifest::parse(&text).ok()
    }

    /// Whether `files/` has the file with the right size.
    pub(super) fn has_file(&self, file: &FileSpec) -> bool {
        fs::metadata(self.blob(&file.sha256)).is_ok_and(|found| found.len() == file.bytes)
    }

    /// Writes `chunks` to disk, and keeps the file if its size and digest are those of `file`. Blocks.
    pub(super) fn receive(
        &self,
        file: &FileSpec,
        mut chunks: mpsc::Receiver<impl AsRef<[u8]>>,
    ) -> Result<Received, StoreError> {
        let blob = self.blob(&file.sha256);
        let part = RemoveOnDrop(part_path(&blob));
        let mut out = File::create_new(&part.0).map_err(disk_error(&part.0))?;
        let mut hasher = Sha256::new();
        let mut n_bytes = 0;
        while let Some(chunk) = chunks.blocking_recv() {
            let chunk = chunk.as_ref();
            out.write_all(chunk).map_err(disk_error(&part.0))?;
            hasher.update(chunk);
            n_bytes += chunk.len() as u64;
        }
        let received = Received { n_bytes, sha256: hex(&hasher.finalize()) };
        // The sender may have been dropped in the middle of the file, so the digest decides whether the file is complete.
        if received.n_bytes == file.bytes && received.sha256 == file.sha256 {
            out.sync_all().map_err(disk_error(&part.0))?;
            fs::rename(&part.0, &blob).map_err(disk_error(&blob))?;
            sync_folder(&self.folder.join(FILES));
        }
        Ok(received)
    }

    /// Starts a new bundle, and removes what other processes left over.
    pub(super) fn start_bundle(&self, digest: &str) -> Result<NewBundle, StoreError> {
        for folder in [&self.folder, &self.folder.join(FILES), &self.folder.join(LATEST)] {
            fs::create_dir_all(folder).map_err(disk_error(folder))?;
        }
        self.remove_left_overs();
        let folder = self.folder.join(format!(".new-{digest}-{}", random_suffix()));
        fs::create_dir(&folder).map_err(disk_error(&folder))?;
        let folder = RemoveOnDrop(folder);
        let lock = File::open(&folder.0).map_err(disk_error(&folder.0))?;
        // Without locks, others go by the folder's age.
        let _ = lock.try_lock();
        Ok(NewBundle { cache: self.clone(), digest: digest.to_owned(), folder, _lock: lock })
    }

    /// Removes the left-overs of processes that died. One that cannot be removed does not fail a fetch.
    fn remove_left_overs(&self) {
        for folder in [&self.folder, &self.folder.join(FILES), &self.folder.join(LATEST)] {
            for (name, path) in entries(folder).unwrap_or_default() {
                if is_left_over(&name) && is_abandoned(&path) {
                    drop(RemoveOnDrop(path));
                }
            }
        }
    }

    /// Removes a bundle; renames it first, so that it disappears at once.
    fn discard(&self, digest: &str) -> Result<(), StoreError> {
        let folder = self.folder.join(digest);
        let old = RemoveOnDrop(self.folder.join(format!(".old-{digest}-{}", random_suffix())));
        match fs::rename(&folder, &old.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk_error(&folder)(error)),
            _ => Ok(()),
        }
    }

    /// Records which bundle serves from a URL.
    pub(super) fn remember(&self, url: &str, digest: &str) -> Result<(), StoreError> {
        let path = self.folder.join(LATEST).join(sha256_hex(url.as_bytes()));
        let part = RemoveOnDrop(part_path(&path));
        let written = fs::create_dir_all(self.folder.join(LATEST))
            .and_then(|()| File::create_new(&part.0))
            .and_then(|mut file| file.write_all(digest.as_bytes()).and_then(|()| file.sync_all()));
        written.and_then(|()| fs::rename(&part.0, &path)).map_err(disk_error(&path))
    }

    /// The bundle that served last from a URL, if it is still cached.
    pub(super) fn last_served(&self, url: &str) -> Option<Located> {
        let digest = fs::read_to_string(self.folder.join(LATEST).join(sha256_hex(url.as_bytes()))).ok()?;
        if !is_digest(&digest) {
            return None;
        }
        let folder = self.find(&digest)?;
        Some(Located { digest, folder })
    }

    /// Checks every file of the bundle against its digest; removes the damaged ones, and then the bundle's folder. Returns
    /// the number of damaged files.
    pub(super) fn remove_damaged(&self, digest: &str) -> Result<usize, StoreError> {
        let folder = self.folder.join(digest);
        let Some(manifest) = self.manifest(digest) else { return Ok(0) };
        let damaged = manifest.files.iter().filter(|file| files::check(&folder, file).is_err());
        let blobs: Vec<PathBuf> = damaged.map(|file| self.blob(&file.sha256)).collect();
        for blob in &blobs {
            remove_file(blob)?;
        }
        if !blobs.is_empty() {
            self.discard(digest)?;
        }
        Ok(blobs.len())
    }

    /// Removes the bundles that are neither in `keep` nor among the newest, then the files that no bundle uses.
    pub(super) fn prune(&self, keep: &[String]) -> Result<Pruned, StoreError> {
        let mut pruned = Pruned::default();
        let mut used = HashSet::new();
        for (i, bundle) in self.bundles_newest_first()?.into_iter().enumerate() {
            if i < N_NEWEST || keep.contains(&bundle.digest) {
                used.extend(bundle.manifest.files.into_iter().map(|file| file.sha256));
            } else {
                self.discard(&bundle.digest)?;
                pruned.n_bundles += 1;
            }
        }
        for (name, path) in entries(&self.folder.join(FILES))? {
            // A recent file may belong to a bundle that is being fetched.
            if is_digest(&name) && !used.contains(&name) && is_older_than(&path, LEFT_OVER_AGE) {
                remove_file(&path)?;
                pruned.n_files += 1;
            }
        }
        Ok(pruned)
    }

    fn bundles_newest_first(&self) -> Result<Vec<CachedBundle>, StoreError> {
        let mut bundles = Vec::new();
        for (digest, path) in entries(&self.folder)? {
            let is_folder = fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir());
            if !is_digest(&digest) || !is_folder {
                continue;
            }
            if let (Some(modified), Some(manifest)) = (modified(&path), self.manifest(&digest)) {
                bundles.push(CachedBundle { digest, modified, manifest });
            }
        }
        bundles.sort_by_key(|bundle| std::cmp::Reverse(bundle.modified));
        Ok(bundles)
    }
}

struct CachedBundle {
    digest: String,
    modified: SystemTime,
    manifest: Manifest,
}

/// A bundle that is being assembled. Its folder is removed if this is dropped before [`NewBundle::finish`].
pub(super) struct NewBundle {
    cache: Cache,
    digest: String,
    folder: RemoveOnDrop,
    /// Tells other processes that the folder is in use, as long as it is open.
    _lock: File,
}

impl NewBundle {
    /// Adds a file to the bundle if it is cached; returns false if it has to be fetched first. A linked file stays in the
    /// bundle even if another process prunes `files/`.
    pub(super) fn link(&self, file: &FileSpec) -> Result<bool, StoreError> {
        let (blob, target) = (self.cache.blob(&file.sha256), self.folder.0.join(&file.path));
        if !self.cache.has_file(file) {
            // A file of the wrong size is damaged, and its name is needed.
            remove_file(&blob)?;
            return Ok(false);
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(disk_error(parent))?;
        }
        match fs::hard_link(&blob, &target) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // Some file systems have no hard links.
            Err(_) => copy(&blob, &target).map(|()| true).map_err(disk_error(&target)),
        }
    }

    /// Writes the manifest and renames the complete bundle into place.
    pub(super) fn finish(&self, text: &str, files: &[FileSpec]) -> Result<PathBuf, StoreError> {
        let path = self.folder.0.join(manifest::FILE);
        File::create_new(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(disk_error(&path))?;
        let folders: BTreeSet<&Path> =
            files.iter().flat_map(|file| Path::new(&file.path).ancestors().skip(1)).collect();
        for folder in folders {
            sync_folder(&self.folder.0.join(folder));
        }
        let bundle = self.cache.folder.join(&self.digest);
        if fs::rename(&self.folder.0, &bundle).is_err() {
            // Either another process was faster, or the existing bundle is damaged.
            if let Some(folder) = self.cache.find(&self.digest) {
                return Ok(folder);
            }
            self.cache.discard(&self.digest)?;
            fs::rename(&self.folder.0, &bundle).map_err(disk_error(&bundle))?;
        }
        sync_folder(&self.cache.folder);
        Ok(bundle)
    }
}

/// Removes a file or folder when dropped, unless it has been renamed.
struct RemoveOnDrop(PathBuf);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        // If removing fails, a later fetch removes it as a left-over.
        let is_folder = fs::symlink_metadata(&self.0).is_ok_and(|found| found.is_dir());
        let _ = if is_folder { fs::remove_dir_all(&self.0) } else { fs::remove_file(&self.0) };
    }
}

/// Whether the text is a SHA-256 in lower-case hex, which is also safe as a file name.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_left_over(name: &str) -> bool {
    let bundle = name.strip_prefix(".new-").or_else(|| name.strip_prefix(".old-"));
    let halves = bundle.map_or_else(|| name.split_once(PART), |rest| rest.split_once('-'));
    halves.is_some_and(|(digest, end)| is_digest(digest) && end.len() == 16 && is_hex(end))
}

fn random_suffix() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn part_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{PART}{}", random_suffix()));
    name.into()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::symlink_metadata(path).and_then(|found| found.modified()).ok()
}

fn is_older_than(path: &Path, age: Duration) -> bool {
    modified(path).and_then(|time| time.elapsed().ok()).is_some_and(|since| since > age)
}

/// Whether no running process works on this entry.
fn is_abandoned(path: &Path) -> bool {
    if !is_older_than(path, LEFT_OVER_AGE) {
        return false;
    }
    match File::open(path).map(|entry| entry.try_lock()) {
        Ok(Ok(())) => true,
        Ok(Err(TryLockError::WouldBlock)) => false,
        Ok(Err(TryLockError::Error(_))) | Err(_) => is_older_than(path, UNLOCKED_AGE),
    }
}

/// The names and paths of a folder's entries; none if the folder does not exist.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(disk_error(folder)(error)),
    };
    let named = entries.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    Ok(named.collect())
}

fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk_error(path)(error)),
        _ => Ok(()),
    }
}

/// Fails if `to` exists: it may be a hard link to another bundle's file.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut to = File::create_new(to)?;
    io::copy(&mut File::open(from)?, &mut to)?;
    to.sync_all()
}

/// Makes renames in a folder durable. Errors are ignored, because some file systems cannot sync a folder.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

fn disk_error(path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_path_buf();
    move |source| StoreError::Disk { path, source }
}
