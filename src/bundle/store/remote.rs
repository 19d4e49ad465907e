//! Reads one bundle from its store: the manifest as text, every other file as a stream of chunks. Writes files, whole or in parts.
//!
//! The server uses `object_store` only here and in `source`. Timeouts and retries are set here, and each of its errors becomes
//! one line with the file's URL. The contents are not checked here.

use super::{BundleUrl, StoreError};
use crate::bundle::manifest;
use bytes::Bytes;
use object_store::{
    BackoffConfig, ClientOptions, GetResult, HeaderMap, HeaderValue, MultipartUpload, ObjectStore, ObjectStoreExt,
    ObjectStoreScheme, PutPayload, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, http::HttpBuilder, path::Path as Key,
};
use std::{error::Error, time::Duration};
use thiserror::Error as ThisError;
use tokio::time::timeout;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A transfer may take hours, but it fails if no data arrives for this long.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The time limit for sending one piece of an upload. While a request is sent nothing is read, so a stall cannot be told from a
/// slow network.
const SEND_TIMEOUT: Duration = Duration::from_mins(10);
/// The time limit for fetching the manifest, including retries and credentials: if the store is dead, a push is refused
/// within this time.
pub(super) const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_RETRIES: usize = 3;
/// An interrupted transfer may be resumed even hours after its start; [`MAX_RETRIES`] limits how often.
const RETRY_FOR: Duration = Duration::from_hours(24);
/// A manifest has a few kilobytes.
const MAX_MANIFEST: u64 = 1 << 20;
/// A store's answer may be a whole HTML page, so it is cut to this many characters for the log.
const MAX_REASON: usize = 400;
/// The only option that is not one of `object_store`'s own.
const AUTHORIZATION: &str = "http_authorization";

/// Why an option of a store is invalid.
#[derive(Debug, ThisError)]
enum OptionError {
    #[error("{0} does not start with a slash")]
    NoSlash(String),
    #[error("{0} is not a URL")]
    NotUrl(String),
    #[error("{0} is not a URL that starts with http:// or https://")]
    NotHttpUrl(String),
    #[error("{0} holds credentials")]
    Credentials(String),
    #[error("{0} is not a valid header value")]
    HeaderValue(String),
    #[error("{0}")]
    Client(String),
}

/// What a client is for, on which its time limits depend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Read,
    Upload,
}

/// A bundle in its store, or the folder that files are uploaded to.
pub(super) struct Remote {
    url: BundleUrl,
    store: Box<dyn ObjectStore>,
    prefix: Key,
}

impl Remote {
    /// Creates a client without sending a request. Options that this kind of store does not know are ignored.
    pub(super) fn open(url: &BundleUrl, options: &[(String, String)], purpose: Purpose) -> Result<Self, StoreError> {
        let invalid = |error: OptionError| StoreError::Options { url: url.to_string(), reason: error.to_string() };
        let client = client_options(url, options, purpose).map_err(invalid)?;
        let store = build_client(url, client, options).map_err(invalid)?;
        // The generic http store has the whole URL as its root, the others only the bucket.
        let is_http = url.scheme == ObjectStoreScheme::Http;
        let prefix = if is_http { Key::default() } else { url.prefix.clone() };
        Ok(Remote { url: url.clone(), store, prefix })
    }

    pub(super) fn url(&self) -> &BundleUrl {
        &self.url
    }

    /// Fetches the manifest's text.
    pub(super) async fn manifest(&self) -> Result<String, StoreError> {
        let file = self.url.file(manifest::FILE);
        let unreachable = |reason: String| StoreError::Unreachable { file: file.clone(), reason };
        let invalid = |reason: String| StoreError::Manifest { file: file.clone(), reason };
        let read = async {
            let found = self.get(manifest::FILE).await?;
            if found.meta.size > MAX_MANIFEST {
                return Err(invalid(format!("it has {} bytes, at most {MAX_MANIFEST} are read", found.meta.size)));
            }
            found.bytes().await.map_err(|error| self.store_error(manifest::FILE, &error))
        };
        let timed_out = |_| unreachable(format!("no answer within {} s", MANIFEST_TIMEOUT.as_secs()));
        let bytes = timeout(MANIFEST_TIMEOUT, read).await.map_err(timed_out)??;
        String::from_utf8(bytes.into()).map_err(|error| invalid(error.to_string()))
    }

    /// Starts to fetch one file; the result contains its size and its stream.
    pub(super) async fn get(&self, path: &str) -> Result<GetResult, StoreError> {
        let key = self.key(path).map_err(|error| StoreError::Manifest {
            file: self.url.file(manifest::FILE),
            reason: format!("file path {path:?} is not a valid object name: {error}"),
        })?;
        self.store.get(&key).await.map_err(|error| self.store_error(path, &error))
    }

    /// Writes one file in one piece, in place of one of that name.
    pub(super) async fn put(&self, path: &str, parts: Vec<Bytes>) -> Result<(), StoreError> {
        let payload: PutPayload = parts.into_iter().collect();
        let written = self.store.put(&self.key_to_write(path)?, payload).await;
        written.map(drop).map_err(|error| self.not_uploaded(path, &error))
    }

    /// Begins to write one file in parts; none if the store takes no parts.
    pub(super) async fn put_in_parts(&self, path: &str) -> Result<Option<PartsUpload<'_>>, StoreError> {
        if self.url.scheme == ObjectStoreScheme::Http {
            return Ok(None);
        }
        let begun = self.store.put_multipart(&self.key_to_write(path)?).await;
        let upload = begun.map_err(|error| self.not_uploaded(path, &error))?;
        Ok(Some(PartsUpload { remote: self, path: path.to_owned(), upload }))
    }

    fn key_to_write(&self, path: &str) -> Result<Key, StoreError> {
        self.key(path).map_err(|source| self.not_uploaded(path, &object_store::Error::InvalidPath { source }))
    }

    fn not_uploaded(&self, path: &str, error: &object_store::Error) -> StoreError {
        StoreError::NotUploaded { file: self.url.file(path), reason: one_line(error) }
    }

    fn key(&self, path: &str) -> Result<Key, object_store::path::Error> {
        // Not `Key::from`, which would percent-encode characters that the object's name contains as they are.
        Key::parse(if self.prefix.is_root() { path.to_owned() } else { format!("{}/{path}", self.prefix) })
    }

    /// Converts the error of fetching one file.
    pub(super) fn store_error(&self, path: &str, error: &object_store::Error) -> StoreError {
        let file = self.url.file(path);
        match error {
            object_store::Error::NotFound { .. } => StoreError::Missing { file },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                StoreError::Denied { file, reason: one_line(error) }
            }
            _ => StoreError::Unreachable { file, reason: one_line(error) },
        }
    }
}

/// A file that is written in parts. It appears when all are there.
pub(super) struct PartsUpload<'a> {
    remote: &'a Remote,
    path: String,
    upload: Box<dyn MultipartUpload>,
}

impl PartsUpload<'_> {
    pub(super) async fn put(&mut self, part: Bytes) -> Result<(), StoreError> {
        self.upload.put_part(part.into()).await.map_err(|error| self.remote.not_uploaded(&self.path, &error))
    }

    pub(super) async fn complete(&mut self) -> Result<(), StoreError> {
        self.upload.complete().await.map(drop).map_err(|error| self.remote.not_uploaded(&self.path, &error))
    }

    /// Gives the parts up, for which stores charge until they are completed or removed.
    pub(super) async fn abort(&mut self) {
        // What failed before says what is wrong.
        let _ = self.upload.abort().await;
    }
}

/// An option whose name contains one of these holds a URL.
const URL_OPTIONS: &[&str] = &["endpoint", "_url", "full_uri", "authority_host"];

/// Checks URLs, because `object_store` panics if an endpoint is not a URL and shows its password in errors. It does neither
/// for proxies.
fn check_option(key: &str, value: &str) -> Result<(), OptionError> {
    if key.ends_with("relative_uri") && !value.starts_with('/') {
        return Err(OptionError::NoSlash(key.to_owned()));
    }
    if key.contains("proxy") || !URL_OPTIONS.iter().any(|part| key.contains(part)) {
        return Ok(());
    }
    let uri: http::Uri = value.parse().map_err(|_| OptionError::NotUrl(key.to_owned()))?;
    match uri.authority() {
        Some(authority) if authority.as_str().contains('@') => Err(OptionError::Credentials(key.to_owned())),
        Some(_) if matches!(uri.scheme_str(), Some("http" | "https")) => Ok(()),
        _ => Err(OptionError::NotHttpUrl(key.to_owned())),
    }
}

fn client_options(
    url: &BundleUrl,
    options: &[(String, String)],
    purpose: Purpose,
) -> Result<ClientOptions, OptionError> {
    let plain = url.as_str().starts_with("http://");
    let client = match purpose {
        Purpose::Read => ClientOptions::new().with_timeout_disabled().with_read_timeout(STALL_TIMEOUT),
        Purpose::Upload => ClientOptions::new().with_timeout(SEND_TIMEOUT),
    };
    let client = client
        .with_connect_timeout(CONNECT_TIMEOUT)
        // Plain http must work in a container without certificates; https needs them.
        .with_no_system_certificates(plain)
        // Google's client talks http to the metadata service.
        .with_allow_http(plain || url.scheme == ObjectStoreScheme::GoogleCloudStorage);
    let authorization = options.iter().find(|(key, _)| key.eq_ignore_ascii_case(AUTHORIZATION));
    match authorization.filter(|_| url.scheme == ObjectStoreScheme::Http) {
        None => Ok(client),
        Some((key, value)) => {
            let mut value = HeaderValue::from_str(value).map_err(|_| OptionError::HeaderValue(key.clone()))?;
            value.set_sensitive(true);
            let mut headers = HeaderMap::new();
            headers.insert(http::header::AUTHORIZATION, value);
            Ok(client.with_default_headers(headers))
        }
    }
}

fn build_client(
    url: &BundleUrl,
    client: ClientOptions,
    options: &[(String, String)],
) -> Result<Box<dyn ObjectStore>, OptionError> {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: MAX_RETRIES, retry_timeout: RETRY_FOR };
    // `parse_url_opts` cannot limit the retries, and the builders have the same methods but no common trait.
    macro_rules! build {
        ($builder:ty) => {{
            let mut builder = <$builder>::new().with_url(url.as_str()).with_client_options(client).with_retry(retry);
            for (name, value) in options {
                let name = name.to_ascii_lowercase();
                if let Ok(key) = name.parse() {
                    check_option(&name, value)?;
                    builder = builder.with_config(key, value);
                }
            }
            Ok(Box::new(builder.build().map_err(|error| OptionError::Client(one_line(&error)))?))
        }};
    }
    match url.scheme {
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder),
        _ => build!(HttpBuilder),
    }
}

/// Writes an error as one line: what was attempted, and the root cause.
fn one_line(error: &object_store::Error) -> String {
    // The outermost error only names the kind of store.
    let attempt = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let chain = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    let root_cause = chain.last().map_or_else(String::new, ToString::to_string);
    let text = if attempt.contains(&root_cause) { attempt } else { format!("{attempt}: {root_cause}") };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
