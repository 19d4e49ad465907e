//! Where a bundle is kept: a text of the config becomes a folder or a URL that a store can be opened for.
//!
//! A URL that got through here holds no secret: it can stand in errors and logs as it is. What would be lost on the way
//! to a bundle's files (a query, a fragment) is refused, too. Nothing is opened or looked up here.

use object_store::{ObjectStoreScheme, path::Path as Key};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Schemes whose user part names a container, not a user.
const AZURE: &[&str] = &["az", "azure", "adl", "abfs", "abfss"];
const OTHERS: &[&str] = &["s3", "s3a", "gs", "http", "https"];

/// Where a bundle is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// On this machine.
    Folder(PathBuf),
    /// In an object store.
    Url(BundleUrl),
}

impl Source {
    /// Reads a folder (a relative one starts from `base`) or a URL. The error is what is wrong with `text`, and does not
    /// repeat it: it may hold a password.
    pub fn parse(text: &str, base: &Path) -> Result<Self, String> {
        match text {
            "" => Err("is empty".to_owned()),
            url if url.contains("://") => BundleUrl::parse(url).map(Source::Url),
            folder => Ok(Source::Folder(base.join(folder))),
        }
    }
}

impl Source {
    /// The same, wherever the process stands.
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

/// The URL that a bundle's files lie under, without credentials and without a slash at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleUrl {
    text: String,
    pub(super) scheme: ObjectStoreScheme,
    pub(super) prefix: Key,
}

impl BundleUrl {
    /// Reads a URL; the error does not repeat it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scheme = text.split("://").next().unwrap_or_default().to_ascii_lowercase();
        let is_azure = AZURE.contains(&scheme.as_str());
        if !is_azure && !OTHERS.contains(&scheme.as_str()) {
            return Err(format!(
                "has the scheme {scheme:?}: a bundle is a folder, or a URL that starts with s3, gs, az, abfs, http or https"
            ));
        }
        let Ok(url) = text.trim_end_matches('/').parse() else { return Err("is not a URL".to_owned()) };
        let recognised = ObjectStoreScheme::parse(&url);
        if url.password().is_some() || (!url.username().is_empty() && !is_azure) {
            return Err("holds credentials: they belong into the environment, where no log shows them".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("has a query or a fragment, which would not reach the bundle's files".to_owned());
        }
        let Ok((scheme, prefix)) = recognised else {
            return Err("names no bucket or host, or has a path that no object can have".to_owned());
        };
        Ok(BundleUrl { text: url.as_str().trim_end_matches('/').to_owned(), scheme, prefix })
    }

    /// The URL.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The URL of one of its files.
    pub(super) fn file(&self, path: &str) -> String {
        format!("{}/{path}", self.text)
    }
}

impl fmt::Display for BundleUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
