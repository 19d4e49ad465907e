//! Fetches bundles from object stores into a local cache.
//!
//! The input is the URL of a bundle; the output is a local folder for [`load`](super::load()), which does not know where the
//! bundle came from. The manifest is fetched first, and its SHA-256 is the bundle's digest. Then the files that are not in
//! the cache are streamed to disk, and their sizes and digests are checked on the way.
//!
//! - A bundle's folder is named after the bundle's digest and is complete as soon as it exists.
//! - A file is stored once, under its own digest: an update of the towers does not fetch the encoder again, and files that
//!   were complete before a transfer failed are not fetched again.
//! - A bundle whose digest the config pins needs no network if it is in the cache.
//! - If the store provides no valid bundle, a push is refused; a starting server falls back to the bundle of that URL that
//!   served last.
//! - Errors and logs contain no credentials: a URL with credentials is refused, and option values are never shown.
//!
//! Cached files are checked by size only, because `load` checks all of them against their digests. If it finds a damaged
//! file, [`Store::remove_damaged`] removes it, and the next fetch downloads it again.
//!
//! [`UploadFolder`] writes files that are no bundles to the same stores.
//!
//! Deliberately not here: reading the environment (options are passed in), polling a URL for changes, writing bundles, and
//! fetching several files at once (one stream per store is simple to stop and to report on).

mod cache;
mod remote;
mod source;
mod upload;

pub use cache::Pruned;
pub use source::{BundleUrl, Source, SourceError};
pub use upload::UploadFolder;

use super::manifest::{self, FileSpec, Manifest, ManifestError};
use crate::domain::digest::sha256_hex;
use cache::{Cache, NewBundle, is_digest};
use remote::{Purpose, Remote};
use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use thiserror::Error;
use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_stream::StreamExt;

/// Chunks of a file, a few kilobytes each, that may wait to be written to disk.
const QUEUE: usize = 64;

/// Why a bundle cannot be fetched. Each message is one line; `url` is the bundle's URL, `file` is a file's URL.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum StoreError {
    /// An option of the store is invalid.
    #[error("{url} cannot be opened: {reason}")]
    Options { url: String, reason: String },
    /// The store did not answer, answered with an error, or sent less than it announced.
    #[error("{file} cannot be fetched: {reason}")]
    Unreachable { file: String, reason: String },
    /// The store rejected the credentials.
    #[error("{file} is denied: {reason}")]
    Denied { file: String, reason: String },
    /// The store has no such file.
    #[error("{file} does not exist")]
    Missing { file: String },
    /// The manifest is invalid.
    #[error("{file}: {reason}")]
    Manifest { file: String, reason: String },
    /// A file differs from the manifest in size or digest.
    #[error("{file} is not what the manifest lists: it has {found}, the manifest says {expected}")]
    Damaged { file: String, found: String, expected: String },
    /// The bundle's digest is not the pinned one.
    #[error("{url} holds the bundle {found}, but {expected} is pinned")]
    NotPinned { url: String, found: String, expected: String },
    /// The pinned digest is malformed.
    #[error("{0:?} is not a digest: 64 characters of lower-case hex")]
    Digest(String),
    /// The store did not take a file.
    #[error("{file} cannot be uploaded: {reason}")]
    NotUploaded { file: String, reason: String },
    /// The local cache, or a file to upload, cannot be read or written.
    #[error("{}: {source}", path.display())]
    Disk { path: PathBuf, source: io::Error },
    /// A thread that worked on the cache panicked or was cancelled.
    #[error("bundle cache: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

impl StoreError {
    /// Whether the store or its contents are at fault, rather than this machine or its config.
    fn is_store_fault(&self) -> bool {
        use StoreError::{Damaged, Denied, Manifest, Missing, Unreachable};
        matches!(self, Unreachable { .. } | Denied { .. } | Missing { .. } | Manifest { .. } | Damaged { .. })
    }
}

/// What to do if the store provides no valid bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Fail: the models that serve keep serving.
    Refuse,
    /// Use the bundle of the URL that served last, because a starting server has nothing else to serve.
    LastServed,
}

/// Called with the number of bytes fetched and the total number of bytes to fetch; cached files are counted in neither.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Fetches bundles into one local folder, which several processes may share.
#[derive(Debug, Clone)]
pub struct Store {
    cache: Cache,
    options: Options,
}

/// Names and values of options. Values may be secret, so `Debug` shows only the names.
#[derive(Clone)]
struct Options(Arc<[(String, String)]>);

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Store {
    /// Creates a store that caches bundles in `folder`, which is created on the first fetch. `options` are those of
    /// `object_store` (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY` ...), in
    /// any letter case, and `HTTP_AUTHORIZATION`, which is sent to http stores as the header `authorization`. Each kind of
    /// store ignores the options that it does not know.
    pub fn new(folder: PathBuf, options: Vec<(String, String)>) -> Self {
        Store { cache: Cache::new(folder), options: Options(options.into()) }
    }

    /// Returns the local folder of the bundle at `url` and fetches it if it is not cached. With `pinned`, only a bundle with
    /// this digest is accepted.
    ///
    /// Cancel-safe: dropping the future stops the transfer; files that are complete stay in the cache.
    pub async fn fetch(
        &self,
        url: &BundleUrl,
        pinned: Option<&str>,
        fallback: Fallback,
        progress: Progress<'_>,
    ) -> Result<PathBuf, StoreError> {
        if let Some(digest) = pinned {
            if !is_digest(digest) {
                return Err(StoreError::Digest(digest.to_owned()));
            }
            let digest = digest.to_owned();
            if let Some(folder) = self.on_disk(move |cache| Ok(cache.find(&digest))).await? {
                return Ok(folder);
            }
        }
        let error = match self.fetch_from_store(url, pinned, progress).await {
            Ok(folder) => return Ok(folder),
            Err(error) => error,
        };
        // A pinned bundle would have been found in the cache, so the bundle that served last is not the pinned one.
        if fallback == Fallback::Refuse || pinned.is_some() || !error.is_store_fault() {
            return Err(error);
        }
        let url_text = url.to_string();
        let Some(last) = self.on_disk(move |cache| Ok(cache.last_served(&url_text))).await? else { return Err(error) };
        tracing::warn!(%url, digest = last.digest, cause = %error, "bundle cannot be fetched, its last version serves");
        Ok(last.folder)
    }

    async fn fetch_from_store(
        &self,
        url: &BundleUrl,
        pinned: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<PathBuf, StoreError> {
        let remote = Remote::open(url, &self.options.0, Purpose::Read)?;
        let text = remote.manifest().await?;
        let digest = sha256_hex(text.as_bytes());
        if let Some(expected) = pinned.filter(|expected| *expected != digest) {
            return Err(StoreError::NotPinned { url: url.to_string(), found: digest, expected: expected.to_owned() });
        }
        let named = digest.clone();
        if let Some(folder) = self.on_disk(move |cache| Ok(cache.find(&named))).await? {
            return Ok(folder);
        }
        let invalid =
            |error: ManifestError| StoreError::Manifest { file: url.file(manifest::FILE), reason: error.to_string() };
        let manifest = Manifest::parse(&text).map_err(invalid)?;
        check_names(&manifest).map_err(invalid)?;
        let bundle = Arc::new(self.on_disk(move |cache| cache.start_bundle(&digest)).await?);
        self.add_files(&remote, &bundle, &manifest.files, progress).await?;
        spawn_blocking(move || bundle.finish(&text, &manifest.files)).await?
    }

    /// Records that this bundle of `url` has passed every check and serves, for [`Fallback::LastServed`]. Blocks.
    pub fn remember(&self, url: &BundleUrl, digest: &str) -> Result<(), StoreError> {
        self.cache.remember(url.as_str(), digest)
    }

    /// The folder of the bundle of `url` that served last, if it is still cached. Blocks.
    pub fn last_served(&self, url: &BundleUrl) -> Option<PathBuf> {
        self.cache.last_served(url.as_str()).map(|last| last.folder)
    }

    /// Adds every file to the bundle, and fetches the files that are not cached.
    async fn add_files(
        &self,
        remote: &Remote,
        bundle: &Arc<NewBundle>,
        files: &[FileSpec],
        progress: Progress<'_>,
    ) -> Result<(), StoreError> {
        let mut seen = HashSet::new();
        let missing = files.iter().filter(|file| !self.cache.has_file(file) && seen.insert(&file.sha256));
        let total = missing.fold(0_u64, |total, file| total.saturating_add(file.bytes));
        let mut n_bytes = 0;
        for file in files {
            // Repeated, because another process may prune a file between its transfer and its link.
            while !add_cached(bundle, file).await? {
                let before = n_bytes;
                self.transfer(remote, file, &|n| progress(before + n, total)).await?;
                n_bytes += file.bytes;
            }
        }
        Ok(())
    }

    /// Fetches one file into the cache.
    async fn transfer(
        &self,
        remote: &Remote,
        file: &FileSpec,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), StoreError> {
        let damaged = |found, expected| StoreError::Damaged { file: remote.url().file(&file.path), found, expected };
        let wrong_size = |n: u64| damaged(format!("{n} bytes"), format!("{} bytes", file.bytes));
        let found = remote.get(&file.path).await?;
        if found.meta.size != file.bytes {
            return Err(wrong_size(found.meta.size));
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (cache, spec) = (self.cache.clone(), file.clone());
        let writer = spawn_blocking(move || cache.receive(&spec, receiver));
        let mut chunks = found.into_stream();
        let mut n_bytes = 0;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| remote.store_error(&file.path, &error))?;
            n_bytes += chunk.len() as u64;
            // If the writer has stopped, its result below says why.
            if sender.send(chunk).await.is_err() {
                break;
            }
            progress(n_bytes);
        }
        drop(sender);
        let received = writer.await??;
        if received.n_bytes != file.bytes {
            return Err(wrong_size(received.n_bytes));
        }
        if received.sha256 != file.sha256 {
            return Err(damaged(format!("sha256 {}", received.sha256), format!("sha256 {}", file.sha256)));
        }
        Ok(())
    }

    /// Checks every file of a cached bundle against its digest. If some are damaged, removes them and the bundle's folder, so
    /// that the next fetch downloads only the damaged files. Returns the number of damaged files, 0 for a bundle that is not
    /// cached. Meant for use after `load` has refused a digest. Blocks while it reads the whole bundle.
    pub fn remove_damaged(&self, digest: &str) -> Result<usize, StoreError> {
        if is_digest(digest) { self.cache.remove_damaged(digest) } else { Err(StoreError::Digest(digest.to_owned())) }
    }

    /// Removes the bundles that are neither in `keep` nor among the five newest, and then the files that no bundle uses,
    /// unless they are less than an hour old. Files that the cache did not create are not touched. Blocks.
    pub fn prune(&self, keep: &[String]) -> Result<Pruned, StoreError> {
        self.cache.prune(keep)
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cache) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let cache = self.cache.clone();
        spawn_blocking(move || work(&cache)).await?
    }
}

/// Adds a file to the bundle if it is cached; returns whether it was.
async fn add_cached(bundle: &Arc<NewBundle>, file: &FileSpec) -> Result<bool, StoreError> {
    let (bundle, file) = (Arc::clone(bundle), file.clone());
    spawn_blocking(move || bundle.link(&file)).await?
}

/// Checks the digests and paths of the files, which become file names in the cache.
fn check_names(manifest: &Manifest) -> Result<(), ManifestError> {
    let mut paths = HashSet::new();
    for FileSpec { path, sha256, .. } in &manifest.files {
        if !is_digest(sha256) {
            return Err(ManifestError::FileDigest { path: path.clone(), sha256: sha256.clone() });
        }
        if path == manifest::FILE || !paths.insert(Path::new(path)) {
            return Err(ManifestError::ListedTwice(path.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
