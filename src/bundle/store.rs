//! Bundles out of object stores, as folders of a local cache.
//!
//! In comes the URL that a bundle's files lie under; out comes a folder for [`load`](super::load()), which never learns
//! where it came from. The manifest is fetched first, and its SHA-256 is the bundle's digest. Then come the files that no
//! bundle here has yet, streamed to the disk and held to their sizes and digests on the way, whatever their size.
//!
//! - A bundle's folder has the bundle's digest as its name and is complete from the moment that it is there.
//! - A file is kept once, under its own digest: an update of the towers does not fetch the encoder again, and what came
//!   completely before a transfer broke does not come again.
//! - A digest that the config pins needs no network where the bundle is here.
//! - Where a store gives no good bundle, a push is refused; a server that starts serves what served last from that URL.
//! - Errors and logs hold no credentials: a URL with some is refused, and options are never shown.
//!
//! Files that are here already are trusted by their size, because `load` reads all of them against their digests anyway.
//! If it finds one damaged, [`Store::heal`] removes what is, and the next fetch brings it back.
//!
//! Deliberately not here: the environment (options are handed in), polling a URL for changes, writing to a store, and
//! two files at once (one stream a store is simple to stop and to report on).

mod cache;
mod remote;
mod source;

pub use cache::Pruned;
pub use source::{BundleUrl, Source};

use super::manifest::{self, FileSpec, Manifest};
use crate::domain::digest::sha256_hex;
use cache::{Cache, NewBundle, is_digest};
use remote::Remote;
use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use thiserror::Error;
use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_stream::StreamExt;

/// Pieces of a file that wait for the disk, some kilobytes each.
const QUEUE: usize = 64;

/// Why a bundle cannot be had. Each is one line; `file` is a file's URL.
#[derive(Debug, Error)]
pub enum StoreError {
    /// An option of the store cannot be used.
    #[error("{url} cannot be opened: {reason}")]
    Options {
        /// The bundle's.
        url: String,
        /// Which option, and what is wrong with it.
        reason: String,
    },
    /// The store gave no answer, an error, or less than it announced.
    #[error("{file} cannot be fetched: {reason}")]
    Unreachable {
        /// What was asked for.
        file: String,
        /// What happened.
        reason: String,
    },
    /// The store wants other credentials.
    #[error("{file} is denied: {reason}")]
    Denied {
        /// What was asked for.
        file: String,
        /// The store's answer.
        reason: String,
    },
    /// The store has no such file.
    #[error("{file} does not exist")]
    Missing {
        /// What was asked for.
        file: String,
    },
    /// The manifest is not one that this server can fetch a bundle by.
    #[error("{file}: {reason}")]
    Manifest {
        /// The manifest.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file is not the one that the manifest lists.
    #[error("{file} is not what the manifest lists: it has {found}, the manifest says {expected}")]
    Damaged {
        /// The file.
        file: String,
        /// Its size, or its digest where the size is right.
        found: String,
        /// As the manifest has it.
        expected: String,
    },
    /// The URL holds another bundle than the one that is pinned.
    #[error("{url} holds the bundle {found}, but {expected} is pinned")]
    NotPinned {
        /// The bundle's.
        url: String,
        /// The digest of what is there.
        found: String,
        /// The digest that is pinned.
        expected: String,
    },
    /// What is pinned is no digest.
    #[error("{0:?} is not a digest: 64 characters of lower-case hex")]
    Digest(String),
    /// The local cache cannot be read or written.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread that worked on the cache is gone.
    #[error("bundle cache: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

impl StoreError {
    /// Is this about what the store gave, rather than about this machine and its config?
    fn is_of_the_store(&self) -> bool {
        use StoreError::{Damaged, Denied, Manifest, Missing, Unreachable};
        matches!(self, Unreachable { .. } | Denied { .. } | Missing { .. } | Manifest { .. } | Damaged { .. })
    }
}

/// What to do where the store gives no good bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Say so: whatever serves goes on serving.
    Refuse,
    /// Use the bundle of the URL that served last: a server that starts has nothing else to serve.
    LastServed,
}

/// Told how many bytes have come, and how many are to come in all; files that were here already count in neither.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Fetches bundles into one local folder. Processes may share the folder.
#[derive(Debug, Clone)]
pub struct Store {
    cache: Cache,
    options: Options,
}

/// Names and values, some of them secret.
#[derive(Clone)]
struct Options(Arc<[(String, String)]>);

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Store {
    /// A store that caches in `folder`, which is made when it is needed. `options` are those of `object_store`
    /// (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`, `AZURE_STORAGE_ACCOUNT_KEY` ...), in any case, and
    /// `HTTP_AUTHORIZATION`, which http stores are sent as the header `authorization`. Each kind of store takes those that
    /// it knows.
    pub fn new(folder: PathBuf, options: Vec<(String, String)>) -> Self {
        Store { cache: Cache::new(folder), options: Options(options.into()) }
    }

    /// The local folder of the bundle under `url`, fetched if it is not here; with `pinned`, of this bundle only.
    ///
    /// Dropping the future stops the transfer; files that have come completely are kept.
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
        match self.fetch_now(url, pinned, progress).await {
            // What is pinned is not here, so that whatever served last is not what is pinned.
            Err(error) if fallback == Fallback::LastServed && pinned.is_none() && error.is_of_the_store() => {
                let asked = url.to_string();
                let last = self.on_disk(move |cache| Ok(cache.last(&asked))).await?;
                let Some((digest, folder)) = last else { return Err(error) };
                tracing::warn!(%url, digest, cause = %error, "bundle cannot be fetched, its last version serves");
                Ok(folder)
            }
            fetched => fetched,
        }
    }

    async fn fetch_now(
        &self,
        url: &BundleUrl,
        pinned: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<PathBuf, StoreError> {
        let remote = Remote::open(url, &self.options.0)?;
        let text = remote.manifest().await?;
        let digest = sha256_hex(text.as_bytes());
        if let Some(expected) = pinned.filter(|expected| *expected != digest) {
            return Err(StoreError::NotPinned { url: url.to_string(), found: digest, expected: expected.to_owned() });
        }
        let named = digest.clone();
        match self.on_disk(move |cache| Ok(cache.find(&named))).await? {
            Some(folder) => Ok(folder),
            None => {
                let refused = |reason| StoreError::Manifest { file: url.file(manifest::FILE), reason };
                let manifest = Manifest::parse(&text).and_then(check_names).map_err(refused)?;
                let named = digest.clone();
                let bundle = self.on_disk(move |cache| cache.begin(&named)).await?;
                self.gather(&remote, Arc::new(bundle), &manifest.files, progress).await?.finish(text).await
            }
        }
    }

    /// Notes that this bundle of `url` passed every check and serves: it is what a start falls back to. Blocks.
    pub fn remember(&self, url: &BundleUrl, digest: &str) -> Result<(), StoreError> {
        self.cache.remember(url.as_str(), digest)
    }

    /// The folder of the bundle of `url` that served last, if it is still here. Blocks.
    pub fn last_served(&self, url: &BundleUrl) -> Option<PathBuf> {
        self.cache.last(url.as_str()).map(|(_digest, folder)| folder)
    }

    /// Puts every file into the bundle, and fetches those that are not here.
    async fn gather(
        &self,
        remote: &Remote,
        bundle: Arc<NewBundle>,
        files: &[FileSpec],
        progress: Progress<'_>,
    ) -> Result<Gathered, StoreError> {
        let mut seen = HashSet::new();
        let absent = files.iter().filter(|file| !self.cache.holds(file) && seen.insert(&file.sha256));
        let total = absent.fold(0_u64, |total, file| total.saturating_add(file.bytes));
        let mut n_bytes = 0;
        for file in files {
            while !link(&bundle, file).await? {
                let before = n_bytes;
                self.transfer(remote, file, &|n| progress(before + n, total)).await?;
                n_bytes += file.bytes;
            }
        }
        Ok(Gathered { bundle, files: files.to_vec() })
    }

    /// Fetches one file.
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
        let mut pieces = found.into_stream();
        let mut n_bytes = 0;
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|error| remote.refusal(&file.path, &error))?;
            n_bytes += piece.len() as u64;
            // A writer that hangs up says why at its end.
            if sender.send(piece).await.is_err() {
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

    /// Reads every file of the bundle against its digest and removes those that are damaged, and then the bundle's folder,
    /// so that the next fetch brings back just them. Gives the number of damaged files; a bundle that is not here has
    /// none. Takes as long as reading the bundle takes: call it where blocking is fine, after `load` refused a digest.
    pub fn heal(&self, digest: &str) -> Result<usize, StoreError> {
        if is_digest(digest) { self.cache.heal(digest) } else { Err(StoreError::Digest(digest.to_owned())) }
    }

    /// Removes the bundles that are neither in `keep` nor among the five newest, and then files that no bundle has, unless
    /// they came within the last hour. What the cache did not make is not touched. Blocks.
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

/// A bundle that has all of its files.
struct Gathered {
    bundle: Arc<NewBundle>,
    files: Vec<FileSpec>,
}

impl Gathered {
    async fn finish(self, text: String) -> Result<PathBuf, StoreError> {
        spawn_blocking(move || self.bundle.finish(&text, &self.files)).await?
    }
}

async fn link(bundle: &Arc<NewBundle>, file: &FileSpec) -> Result<bool, StoreError> {
    let (bundle, file) = (Arc::clone(bundle), file.clone());
    spawn_blocking(move || bundle.link(&file)).await?
}

/// Digests and paths become names in the cache.
fn check_names(manifest: Manifest) -> Result<Manifest, String> {
    let mut paths = HashSet::new();
    for FileSpec { path, sha256, .. } in &manifest.files {
        if !is_digest(sha256) {
            return Err(format!("{path:?} has the sha256 {sha256:?}, which is not 64 characters of lower-case hex"));
        }
        if path == manifest::FILE || !paths.insert(Path::new(path)) {
            return Err(format!("{path:?} is listed twice, or is the manifest itself"));
        }
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests;
