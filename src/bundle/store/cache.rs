//! The local folder that fetched bundles lie in.
//!
//! ```text
//! <digest>/             a bundle: complete, because it only ever appears by a rename
//! files/<sha256>        one file of any bundle, hard-linked into the bundles that have it
//! latest/<sha256>       the digest of the bundle of the URL with this SHA-256 that served last
//! .new-*  .old-*  *.part-*   work under way, or what a process left when it died
//! ```
//!
//! Several processes may share the folder: every name that is being worked on has a random end, and of two that finish
//! the same thing the later finds it done. What has a name of another form is never touched. Nothing here knows a store.

use super::StoreError;
use crate::{
    bundle::{
        digest,
        manifest::{self, FileSpec, Manifest},
    },
    domain::digest::{hex, sha256_hex},
};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeSet, HashSet},
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};
use tokio::sync::mpsc;

const FILES: &str = "files";
const LATEST: &str = "latest";
const PART: &str = ".part-";
/// Bundles that [`Cache::prune`] leaves beside those in use: some steps to roll back to.
const N_NEWEST: usize = 5;
/// What nobody has written to for so long, nobody works on.
const LEFT_OVER: Duration = Duration::from_hours(1);

/// What [`super::Store::prune`] removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pruned {
    /// Bundles.
    pub n_bundles: usize,
    /// Files that no bundle has any more.
    pub n_files: usize,
}

/// What came when a file was asked for.
pub(super) struct Received {
    pub(super) n_bytes: u64,
    pub(super) sha256: String,
}

/// The folder.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    pub(super) folder: PathBuf,
}

impl Cache {
    pub(super) fn new(folder: PathBuf) -> Self {
        Cache { folder }
    }

    fn blob(&self, sha256: &str) -> PathBuf {
        self.folder.join(FILES).join(sha256)
    }

    /// The bundle's folder, if it is here: its manifest is the one, and its files have the right sizes.
    pub(super) fn find(&self, digest: &str) -> Option<PathBuf> {
        let folder = self.folder.join(digest);
        let manifest = self.manifest(digest)?;
        let has = |file: &FileSpec| fs::metadata(folder.join(&file.path)).is_ok_and(|found| found.len() == file.bytes);
        manifest.files.iter().all(has).then_some(folder)
    }

    /// The manifest of a bundle that this module made.
    fn manifest(&self, digest: &str) -> Option<Manifest> {
        let text = fs::read_to_string(self.folder.join(digest).join(manifest::FILE)).ok()?;
        (sha256_hex(text.as_bytes()) == digest).then(|| Manifest::parse(&text).ok()).flatten()
    }

    /// Is the file here, as far as its size tells?
    pub(super) fn holds(&self, file: &FileSpec) -> bool {
        fs::metadata(self.blob(&file.sha256)).is_ok_and(|found| found.len() == file.bytes)
    }

    /// Writes what comes out of `pieces` to the disk; what is the file in the end is kept. Blocks.
    pub(super) fn receive(
        &self,
        file: &FileSpec,
        mut pieces: mpsc::Receiver<impl AsRef<[u8]>>,
    ) -> Result<Received, StoreError> {
        let blob = self.blob(&file.sha256);
        let part = Doomed(with_suffix(&blob));
        let mut out = File::create_new(&part.0).map_err(disk(&part.0))?;
        let mut hasher = Sha256::new();
        let mut n_bytes = 0;
        while let Some(piece) = pieces.blocking_recv() {
            let piece = piece.as_ref();
            out.write_all(piece).map_err(disk(&part.0))?;
            hasher.update(piece);
            n_bytes += piece.len() as u64;
        }
        let received = Received { n_bytes, sha256: hex(&hasher.finalize()) };
        // The sender may just have gone away: only the digest tells that this was all.
        if received.n_bytes == file.bytes && received.sha256 == file.sha256 {
            out.sync_all().map_err(disk(&part.0))?;
            fs::rename(&part.0, &blob).map_err(disk(&blob))?;
            sync_folder(&self.folder.join(FILES));
        }
        Ok(received)
    }

    /// Starts a bundle, after what others left is swept away.
    pub(super) fn begin(&self, digest: &str) -> Result<NewBundle, StoreError> {
        for folder in [&self.folder, &self.folder.join(FILES), &self.folder.join(LATEST)] {
            fs::create_dir_all(folder).map_err(disk(folder))?;
        }
        self.sweep();
        let folder = self.folder.join(format!(".new-{digest}-{}", unique()));
        fs::create_dir(&folder).map_err(disk(&folder))?;
        Ok(NewBundle { cache: self.clone(), digest: digest.to_owned(), folder: Doomed(folder) })
    }

    /// Removes what processes left that died. A left-over that cannot be removed is no reason to refuse a bundle.
    fn sweep(&self) {
        for folder in [&self.folder, &self.folder.join(FILES), &self.folder.join(LATEST)] {
            for (name, path) in entries(folder).unwrap_or_default() {
                if is_left_over(&name) && is_older_than(&path, LEFT_OVER) {
                    drop(Doomed(path));
                }
            }
        }
    }

    /// Takes a bundle out of sight at once, then removes it.
    fn discard(&self, digest: &str) -> Result<(), StoreError> {
        let folder = self.folder.join(digest);
        let old = Doomed(self.folder.join(format!(".old-{digest}-{}", unique())));
        match fs::rename(&folder, &old.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk(&folder)(error)),
            _ => Ok(()),
        }
    }

    /// Notes what serves from a URL.
    pub(super) fn remember(&self, url: &str, digest: &str) -> Result<(), StoreError> {
        let path = self.folder.join(LATEST).join(sha256_hex(url.as_bytes()));
        let part = Doomed(with_suffix(&path));
        let written = fs::create_dir_all(self.folder.join(LATEST))
            .and_then(|()| File::create_new(&part.0))
            .and_then(|mut file| file.write_all(digest.as_bytes()).and_then(|()| file.sync_all()));
        written.and_then(|()| fs::rename(&part.0, &path)).map_err(disk(&path))
    }

    /// The bundle of the URL that served last, if it is still here.
    pub(super) fn last(&self, url: &str) -> Option<(String, PathBuf)> {
        let digest = fs::read_to_string(self.folder.join(LATEST).join(sha256_hex(url.as_bytes()))).ok()?;
        let folder = is_digest(&digest).then(|| self.find(&digest)).flatten()?;
        Some((digest, folder))
    }

    /// Reads every file of the bundle in full; removes those that are damaged, and then the bundle.
    pub(super) fn heal(&self, digest: &str) -> Result<usize, StoreError> {
        let folder = self.folder.join(digest);
        let Some(manifest) = self.manifest(digest) else { return Ok(0) };
        let damaged = manifest.files.iter().filter(|file| digest::check(&folder, file).is_err());
        let blobs: Vec<PathBuf> = damaged.map(|file| self.blob(&file.sha256)).collect();
        for blob in &blobs {
            remove_file(blob)?;
        }
        if !blobs.is_empty() {
            self.discard(digest)?;
        }
        Ok(blobs.len())
    }

    /// Removes the bundles that are neither in `keep` nor among the newest, then the files that no bundle has.
    pub(super) fn prune(&self, keep: &[String]) -> Result<Pruned, StoreError> {
        let mut bundles: Vec<(SystemTime, String, Manifest)> = entries(&self.folder)?
            .into_iter()
            .filter(|(name, path)| is_digest(name) && fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()))
            .filter_map(|(name, path)| Some((modified(&path)?, self.manifest(&name)?, name)))
            .map(|(time, manifest, name)| (time, name, manifest))
            .collect();
        bundles.sort_by_key(|(time, ..)| std::cmp::Reverse(*time));
        let mut pruned = Pruned::default();
        let mut used = HashSet::new();
        for (i, (_, digest, manifest)) in bundles.into_iter().enumerate() {
            if i < N_NEWEST || keep.contains(&digest) {
                used.extend(manifest.files.into_iter().map(|file| file.sha256));
            } else {
                self.discard(&digest)?;
                pruned.n_bundles += 1;
            }
        }
        for (name, path) in entries(&self.folder.join(FILES))? {
            // A young one may belong to a bundle that is being fetched.
            if is_digest(&name) && !used.contains(&name) && is_older_than(&path, LEFT_OVER) {
                remove_file(&path)?;
                pruned.n_files += 1;
            }
        }
        Ok(pruned)
    }
}

/// A bundle that is being put together; gone when dropped before [`NewBundle::finish`].
pub(super) struct NewBundle {
    cache: Cache,
    digest: String,
    folder: Doomed,
}

impl NewBundle {
    /// Puts a file into the bundle, unless it has to be fetched first. From then on the bundle has it, even where
    /// another process prunes `files/`.
    pub(super) fn link(&self, file: &FileSpec) -> Result<bool, StoreError> {
        let (blob, place) = (self.cache.blob(&file.sha256), self.folder.0.join(&file.path));
        if !self.cache.holds(file) {
            // Of another size it is damaged, and in the way.
            remove_file(&blob)?;
            return Ok(false);
        }
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent).map_err(disk(parent))?;
        }
        match fs::hard_link(&blob, &place) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // Not every file system has hard links.
            Err(_) => copy(&blob, &place).map(|()| true).map_err(disk(&place)),
        }
    }

    /// Makes the bundle appear, as a whole.
    pub(super) fn finish(&self, text: &str, files: &[FileSpec]) -> Result<PathBuf, StoreError> {
        let path = self.folder.0.join(manifest::FILE);
        File::create_new(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(disk(&path))?;
        let folders: BTreeSet<&Path> =
            files.iter().flat_map(|file| Path::new(&file.path).ancestors().skip(1)).collect();
        folders.into_iter().for_each(|folder| sync_folder(&self.folder.0.join(folder)));
        let bundle = self.cache.folder.join(&self.digest);
        if fs::rename(&self.folder.0, &bundle).is_err() {
            // Another process was faster, or what is there is damaged.
            if let Some(folder) = self.cache.find(&self.digest) {
                return Ok(folder);
            }
            self.cache.discard(&self.digest)?;
            fs::rename(&self.folder.0, &bundle).map_err(disk(&bundle))?;
        }
        sync_folder(&self.cache.folder);
        Ok(bundle)
    }
}

/// A file or folder that is removed when this is dropped; one that was renamed in time stays.
struct Doomed(PathBuf);

impl Drop for Doomed {
    fn drop(&mut self) {
        // What cannot be removed now is swept away later.
        let is_folder = fs::symlink_metadata(&self.0).is_ok_and(|found| found.is_dir());
        let _ = if is_folder { fs::remove_dir_all(&self.0) } else { fs::remove_file(&self.0) };
    }
}

/// Lower-case hex of a SHA-256: safe as a name, too.
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

fn unique() -> String {
    format!("{:016x}", fastrand::u64(..))
}

fn with_suffix(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{PART}{}", unique()));
    name.into()
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::symlink_metadata(path).and_then(|found| found.modified()).ok()
}

fn is_older_than(path: &Path, age: Duration) -> bool {
    modified(path).and_then(|time| time.elapsed().ok()).is_some_and(|since| since > age)
}

/// Names and paths in a folder, none where there is no folder.
fn entries(folder: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(disk(folder)(error)),
    };
    let named = entries.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
    Ok(named.collect())
}

fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk(path)(error)),
        _ => Ok(()),
    }
}

/// Never onto a file that is there: it may be linked to another bundle's.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut to = File::create_new(to)?;
    io::copy(&mut File::open(from)?, &mut to)?;
    to.sync_all()
}

/// Some file systems refuse this for a folder; their renames have to be trusted.
fn sync_folder(folder: &Path) {
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
}

fn disk(path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_path_buf();
    move |source| StoreError::Disk { path, source }
}
