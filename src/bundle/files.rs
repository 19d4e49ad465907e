//! Reads the files of a bundle. Whatever is used was compared with the manifest as it was read: nothing is read a second time,
//! so that it does not matter who changes the files of a bundle that loads or serves.
//!
//! Only files that the manifest lists are read. A symbolic link is followed, as volumes and download tools put them in place of
//! files: what is behind it has to have the digest, too.

use super::{
    BundleError,
    manifest::{self, FileSpec, Manifest, ManifestError, Part},
};
use crate::{
    domain::digest::hex,
    inference::{Slice, WeightFiles},
};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// What is read at once where the bytes are only hashed.
const CHUNK: usize = 1 << 16;

/// A file that is hashed while it is read.
struct HashedFile<'a> {
    path: PathBuf,
    file: File,
    spec: &'a FileSpec,
    hasher: Sha256,
    n_read: u64,
}

impl<'a> HashedFile<'a> {
    /// Opens a file that has the size that the manifest says.
    fn open(folder: &Path, spec: &'a FileSpec) -> Result<Self, BundleError> {
        let path = folder.join(&spec.path);
        let (file, n_bytes) = match open_regular(&path) {
            Ok(opened) => opened,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(BundleError::FileMissing { path, pypi_package: spec.pypi.clone() });
            }
            Err(source) => return Err(BundleError::Read { path, source }),
        };
        let opened = HashedFile { path, file, spec, hasher: Sha256::new(), n_read: 0 };
        if n_bytes == spec.bytes { Ok(opened) } else { Err(opened.differs(format!("{n_bytes} bytes"))) }
    }

    fn differs(self, found: String) -> BundleError {
        let expected = format!("{} bytes, sha256 {}", self.spec.bytes, self.spec.sha256);
        BundleError::Digest { path: self.path, found, expected }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), BundleError> {
        self.file.read_exact(bytes).map_err(|source| BundleError::Read { path: self.path.clone(), source })?;
        self.hasher.update(&*bytes);
        self.n_read += bytes.len() as u64;
        Ok(())
    }

    /// Reads up to the byte `end`, for the hash only.
    fn skip_to(&mut self, end: u64) -> Result<(), BundleError> {
        let mut chunk = [0; CHUNK];
        while self.n_read < end {
            let n_bytes = (end - self.n_read).min(CHUNK as u64) as usize;
            self.fill(&mut chunk[..n_bytes])?;
        }
        Ok(())
    }

    /// Reads the rest, and compares the digest of the whole file with the manifest's.
    fn finish(mut self) -> Result<(), BundleError> {
        self.skip_to(self.spec.bytes)?;
        let found = hex(&std::mem::take(&mut self.hasher).finalize());
        if found == self.spec.sha256 {
            return Ok(());
        }
        let n_read = self.n_read;
        Err(self.differs(format!("{n_read} bytes, sha256 {found}")))
    }
}

/// Opens a file and returns its size. A device or a pipe, whose end may never come, is refused.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let file = File::open(path)?;
    let n_bytes = file.metadata()?.len();
    Ok((file, n_bytes))
}

/// Compares one file with its size and digest in the manifest. Reads the whole file.
pub fn check(folder: &Path, spec: &FileSpec) -> Result<(), BundleError> {
    HashedFile::open(folder, spec)?.finish()
}

/// Reads one file whole. The bytes have the digest in the manifest.
pub fn read(folder: &Path, spec: &FileSpec) -> Result<Vec<u8>, BundleError> {
    let mut file = HashedFile::open(folder, spec)?;
    let mut bytes = vec![0; spec.bytes as usize];
    file.fill(&mut bytes)?;
    file.finish()?;
    Ok(bytes)
}

/// Reads a file that the manifest uses under this path.
pub(super) fn read_used(folder: &Path, manifest: &Manifest, path: &str) -> Result<Vec<u8>, BundleError> {
    let unlisted = || BundleError::Manifest {
        path: folder.join(manifest::FILE),
        source: ManifestError::NotListed(path.to_owned()),
    };
    read(folder, manifest.file(path).ok_or_else(unlisted)?)
}

/// The files from which one graph may read its weights: those that the manifest lists under the graph's part. With any other
/// file, a change of the weights would not change the keys of what is cached.
pub(super) struct GraphFiles<'a> {
    pub(super) folder: &'a Path,
    pub(super) manifest: &'a Manifest,
    /// The graph's path in the manifest. The locations in a graph are relative to its own folder.
    pub(super) graph: &'a str,
    pub(super) part: Part,
}

impl GraphFiles<'_> {
    fn spec(&self, location: &str) -> Result<&FileSpec, BundleError> {
        let path = Path::new(self.graph).with_file_name(location);
        let listed = path.to_str().and_then(|path| self.manifest.file(path)).filter(|spec| spec.part == self.part);
        listed.ok_or_else(|| BundleError::ForeignWeights {
            graph: self.folder.join(self.graph),
            location: location.to_owned(),
            part: self.part,
        })
    }
}

impl WeightFiles for GraphFiles<'_> {
    type Error = BundleError;

    fn size(&self, location: &str) -> Result<u64, BundleError> {
        Ok(self.spec(location)?.bytes)
    }

    fn read(&self, location: &str, slices: &mut [Slice<'_>]) -> Result<(), BundleError> {
        let mut file = HashedFile::open(self.folder, self.spec(location)?)?;
        for slice in slices {
            file.skip_to(slice.offset)?;
            file.fill(slice.bytes)?;
        }
        file.finish()
    }
}
