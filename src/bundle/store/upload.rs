//! Uploads local files to a folder of an object store.
//!
//! A file is read in parts of a few megabytes, and stores with multi-part uploads get it so; a plain http store gets it in one piece,
//! which is then in memory. The local file stays.

use super::{
    BundleUrl, StoreError,
    remote::{PartsUpload, Purpose, Remote},
};
use bytes::Bytes;
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::task::spawn_blocking;

/// Above the least that stores accept for a part that is not the last, which is 5 MiB.
const PART_BYTES: u64 = 8 << 20;

/// The folder that files are uploaded to.
pub struct UploadFolder {
    remote: Remote,
    part_bytes: u64,
}

impl std::fmt::Debug for UploadFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("UploadFolder").field(self.remote.url()).finish()
    }
}

impl UploadFolder {
    /// Creates a client without sending a request. `options` are those of [`super::Store::new`].
    pub fn open(url: &BundleUrl, options: &[(String, String)]) -> Result<Self, StoreError> {
        Ok(UploadFolder { remote: Remote::open(url, options, Purpose::Upload)?, part_bytes: PART_BYTES })
    }

    #[expect(missing_docs, reason = "name and type say it all")]
    pub fn url(&self) -> &BundleUrl {
        self.remote.url()
    }

    /// Uploads the file at `path` under `name`, in place of an object of that name. The object appears at once or not at all.
    ///
    /// Dropping the future stops the transfer; a store may then keep parts that its lifecycle rules have to remove.
    pub async fn upload(&self, name: &str, path: &Path) -> Result<(), StoreError> {
        let mut parts = Parts::open(path, self.part_bytes).await?;
        if parts.n_bytes > self.part_bytes
            && let Some(mut upload) = self.remote.put_in_parts(name).await?
        {
            let uploaded = upload_parts(&mut parts, &mut upload).await;
            if uploaded.is_err() {
                upload.abort().await;
            }
            return uploaded;
        }
        let mut whole = Vec::new();
        while let Some(part) = parts.next().await? {
            whole.push(part);
        }
        self.remote.put(name, whole).await
    }
}

async fn upload_parts(parts: &mut Parts, upload: &mut PartsUpload<'_>) -> Result<(), StoreError> {
    while let Some(part) = parts.next().await? {
        upload.put(part).await?;
    }
    upload.complete().await
}

/// A local file in parts.
struct Parts {
    path: PathBuf,
    file: Arc<File>,
    n_bytes: u64,
    part_bytes: u64,
}

impl Parts {
    async fn open(path: &Path, part_bytes: u64) -> Result<Self, StoreError> {
        let path = path.to_path_buf();
        let opened = spawn_blocking(move || {
            let file = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
            file.map(|(n_bytes, file)| Parts { path: path.clone(), file: Arc::new(file), n_bytes, part_bytes })
                .map_err(|source| StoreError::Disk { path, source })
        });
        opened.await?
    }

    /// The next part; none at the end of the file.
    async fn next(&mut self) -> Result<Option<Bytes>, StoreError> {
        let (file, max_bytes) = (Arc::clone(&self.file), self.part_bytes);
        let read = spawn_blocking(move || {
            let mut part = Vec::new();
            file.take(max_bytes).read_to_end(&mut part).map(|_n_bytes| part)
        });
        let part = read.await?.map_err(|source| StoreError::Disk { path: self.path.clone(), source })?;
        Ok((!part.is_empty()).then(|| part.into()))
    }
}
