//! The location of a bundle, parsed from the config: a local folder or the URL of an object store.
//!
//! A parsed URL contains no secrets and is safe to show in errors and logs. A query or a fragment is refused, because it would
//! be lost when a file name is appended. Nothing is opened or resolved here.

use crate::domain::bounded_text::cut;
use object_store::{ObjectStoreScheme, path::Path as Key};
use std::{
    fmt,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Schemes whose user part names a container, not a user.
const AZURE: &[&str] = &["az", "azure", "adl", "abfs", "abfss"];
const OTHERS: &[&str] = &["s3", "s3a", "gs", "http", "https"];

/// A scheme is whatever was written before `://`.
const MAX_SCHEME_BYTES: usize = 32;

/// The location of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// On this machine.
    Folder(PathBuf),
    /// In an object store.
    Url(BundleUrl),
}

/// What is wrong with a bundle's location; the predicate of a sentence about it. The message does not repeat the location,
/// which may contain a password.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[expect(missing_docs, reason = "the messages say it all")]
pub enum SourceError {
    #[error("is empty")]
    Empty,
    #[error("has the scheme {0:?}: a bundle is a folder, or a URL that starts with s3, gs, az, abfs, http or https")]
    Scheme(String),
    #[error("is not a URL")]
    NotUrl,
    #[error("holds credentials: they belong in the environment, where no log shows them")]
    Credentials,
    #[error("has a query or a fragment, which would not reach the bundle's files")]
    QueryOrFragment,
    #[error("names no bucket or host, or has a path that no object can have")]
    NoBucket,
}

impl Source {
    /// Parses a folder or a URL. A relative folder is resolved against `base`.
    pub fn parse(text: &str, base: &Path) -> Result<Self, SourceError> {
        match text {
            "" => Err(SourceError::Empty),
            url if url.contains("://") => BundleUrl::parse(url).map(Source::Url),
            folder => Ok(Source::Folder(base.join(folder))),
        }
    }

    /// The same location, with a folder made absolute.
    pub fn absolute(&self) -> Source {
        match self {
            Source::Folder(folder) => Source::Folder(std::path::absolute(folder).unwrap_or_else(|_| folder.clone())),
            Source::Url(_) => self.clone(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Folder(folder) => folder.display().fmt(f),
            Source::Url(url) => url.fmt(f),
        }
    }
}

/// The URL of a bundle's folder in a store, without credentials and without a trailing slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleUrl {
    text: String,
    pub(super) scheme: ObjectStoreScheme,
    pub(super) prefix: Key,
}

impl BundleUrl {
    #[expect(missing_docs, reason = "name and types say it all")]
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let scheme = text.split("://").next().unwrap_or_default().to_ascii_lowercase();
        let is_azure = AZURE.contains(&scheme.as_str());
        if !is_azure && !OTHERS.contains(&scheme.as_str()) {
            return Err(SourceError::Scheme(cut(&scheme, MAX_SCHEME_BYTES).into_owned()));
        }
        let Ok(url) = text.trim_end_matches('/').parse() else { return Err(SourceError::NotUrl) };
        let recognised = ObjectStoreScheme::parse(&url);
        if url.password().is_some() || (!url.username().is_empty() && !is_azure) {
            return Err(SourceError::Credentials);
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(SourceError::QueryOrFragment);
        }
        let Ok((scheme, prefix)) = recognised else { return Err(SourceError::NoBucket) };
        Ok(BundleUrl { text: url.as_str().trim_end_matches('/').to_owned(), scheme, prefix })
    }

    #[expect(missing_docs, reason = "name and type say it all")]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The URL of one of the bundle's files.
    pub(super) fn file(&self, path: &str) -> String {
        format!("{}/{path}", self.text)
    }
}

impl fmt::Display for BundleUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
