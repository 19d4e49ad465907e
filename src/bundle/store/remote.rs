//! One bundle as its store gives it out: the manifest as text, every other file as pieces.
//!
//! All of `object_store` that the server uses is here and in `source`. It is told how long to wait and how often to try
//! again; its errors become one line each, with the file's URL. What the bytes are worth is not judged here.

use super::{BundleUrl, StoreError};
use crate::bundle::manifest;
use object_store::{
    BackoffConfig, ClientOptions, GetResult, HeaderMap, HeaderValue, ObjectStore, ObjectStoreExt, ObjectStoreScheme,
    RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, http::HttpBuilder,
    path::Path as Key,
};
use std::{error::Error, time::Duration};
use tokio::time::timeout;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A transfer may take hours; what it may not do is stand still.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a store may take over the manifest, tries and credentials included: a dead store refuses a push within it.
pub(super) const MANIFEST_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_RETRIES: usize = 3;
/// A transfer that breaks is resumed however old it is; [`MAX_RETRIES`] bounds how often.
const RETRY_FOR: Duration = Duration::from_hours(24);
/// Manifests have some kilobytes.
const MAX_MANIFEST: u64 = 1 << 20;
/// A store's answer may be a page of HTML; a log line is no place for it.
const MAX_REASON: usize = 400;
/// The one option that is not `object_store`'s own.
const AUTHORIZATION: &str = "http_authorization";

/// A bundle in its store.
pub(super) struct Remote {
    url: BundleUrl,
    store: Box<dyn ObjectStore>,
    prefix: Key,
}

impl Remote {
    /// Makes a client; nothing is asked yet. Options that this kind of store does not know are ignored.
    pub(super) fn open(url: &BundleUrl, options: &[(String, String)]) -> Result<Self, StoreError> {
        let refused = |reason: String| StoreError::Options { url: url.to_string(), reason };
        let client = client_options(url, options).map_err(refused)?;
        let store = connect(url, client, options).map_err(refused)?;
        // The generic http store has the whole URL as its root, the others only the bucket.
        let is_http = url.scheme == ObjectStoreScheme::Http;
        let prefix = if is_http { Key::default() } else { url.prefix.clone() };
        Ok(Remote { url: url.clone(), store, prefix })
    }

    /// What it was opened for.
    pub(super) fn url(&self) -> &BundleUrl {
        &self.url
    }

    /// The manifest's text.
    pub(super) async fn manifest(&self) -> Result<String, StoreError> {
        let file = self.url.file(manifest::FILE);
        let unreachable = |reason: String| StoreError::Unreachable { file: file.clone(), reason };
        let invalid = |reason: String| StoreError::Manifest { file: file.clone(), reason };
        let read = async {
            let found = self.get(manifest::FILE).await?;
            if found.meta.size > MAX_MANIFEST {
                return Err(invalid(format!("it has {} bytes, at most {MAX_MANIFEST} are read", found.meta.size)));
            }
            found.bytes().await.map_err(|error| self.refusal(manifest::FILE, &error))
        };
        let late = |_| unreachable(format!("no answer within {} s", MANIFEST_TIMEOUT.as_secs()));
        let bytes = timeout(MANIFEST_TIMEOUT, read).await.map_err(late)??;
        String::from_utf8(bytes.into()).map_err(|error| invalid(error.to_string()))
    }

    /// Starts to read one file; gives its size, too.
    pub(super) async fn get(&self, path: &str) -> Result<GetResult, StoreError> {
        let key = if self.prefix.is_root() { path.to_owned() } else { format!("{}/{path}", self.prefix) };
        // As it stands in the manifest: `Key::from` would percent-encode what the bucket has as it is.
        let key = Key::parse(key).map_err(|error| StoreError::Manifest {
            file: self.url.file(manifest::FILE),
            reason: format!("file path {path:?} is no object's name: {error}"),
        })?;
        self.store.get(&key).await.map_err(|error| self.refusal(path, &error))
    }

    /// Why one file cannot be had.
    pub(super) fn refusal(&self, path: &str, error: &object_store::Error) -> StoreError {
        let file = self.url.file(path);
        match error {
            object_store::Error::NotFound { .. } => StoreError::Missing { file },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                StoreError::Denied { file, reason: reason(error) }
            }
            _ => StoreError::Unreachable { file, reason: reason(error) },
        }
    }
}

/// Parts of the names of options that hold a URL.
const URL_OPTIONS: &[&str] = &["endpoint", "_url", "full_uri", "authority_host"];

/// `object_store` panics over an endpoint that is no URL, and shows one that holds a password. A proxy's it does not.
fn check_option(key: &str, value: &str) -> Result<(), String> {
    if key.ends_with("relative_uri") && !value.starts_with('/') {
        return Err(format!("{key} does not start with a slash"));
    }
    if key.contains("proxy") || !URL_OPTIONS.iter().any(|part| key.contains(part)) {
        return Ok(());
    }
    let uri: http::Uri = value.parse().map_err(|_| format!("{key} is not a URL"))?;
    match uri.authority() {
        Some(authority) if authority.as_str().contains('@') => Err(format!("{key} holds credentials")),
        Some(_) if matches!(uri.scheme_str(), Some("http" | "https")) => Ok(()),
        _ => Err(format!("{key} is not a URL that starts with http:// or https://")),
    }
}

fn client_options(url: &BundleUrl, options: &[(String, String)]) -> Result<ClientOptions, String> {
    let plain = url.as_str().starts_with("http://");
    let client = ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT_TIMEOUT)
        .with_read_timeout(STALL_TIMEOUT)
        // A container without certificates can still speak plain http; otherwise there has to be one.
        .with_no_system_certificates(plain)
        // Google's own client speaks http to the metadata service.
        .with_allow_http(plain || url.scheme == ObjectStoreScheme::GoogleCloudStorage);
    let authorization = options.iter().find(|(key, _)| key.eq_ignore_ascii_case(AUTHORIZATION));
    match authorization.filter(|_| url.scheme == ObjectStoreScheme::Http) {
        None => Ok(client),
        Some((key, value)) => {
            let mut value = HeaderValue::from_str(value).map_err(|_| format!("{key} is no value of a header"))?;
            value.set_sensitive(true);
            let mut headers = HeaderMap::new();
            headers.insert(http::header::AUTHORIZATION, value);
            Ok(client.with_default_headers(headers))
        }
    }
}

fn connect(
    url: &BundleUrl,
    client: ClientOptions,
    options: &[(String, String)],
) -> Result<Box<dyn ObjectStore>, String> {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(5), base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: MAX_RETRIES, retry_timeout: RETRY_FOR };
    // `parse_url_opts` knows no way to bound the retries. The builders have the same methods, and no trait for them.
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
            Ok(Box::new(builder.build().map_err(|error| reason(&error))?))
        }};
    }
    match url.scheme {
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder),
        _ => build!(HttpBuilder),
    }
}

/// What happened, in one line: what was tried, and the cause at the bottom of it.
fn reason(error: &object_store::Error) -> String {
    // The outermost error only names the kind of store.
    let tried = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let chain = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    let cause = chain.last().map_or_else(String::new, ToString::to_string);
    let text = if tried.contains(&cause) { tried } else { format!("{tried}: {cause}") };
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_REASON) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
