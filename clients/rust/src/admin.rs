//! The calls of an operator.

use crate::{
    Error, Tls,
    connection::Address,
    proto::{
        CacheChunk, ExportCacheRequest, FlushCacheRequest, FlushCacheResponse, GetStatusRequest, GetStatusResponse,
        ImportCacheResponse, PushConfigRequest, PushConfigResponse, RollbackRequest, RollbackResponse,
        admin_service_client::AdminServiceClient,
    },
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tokio_stream::Stream;
use tonic::{
    Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

/// The size limit of one message. A server exports a cache in chunks that are far smaller.
const MAX_CHUNK_BYTES: usize = 64 << 20;

/// How to reach a server's admin listener.
#[derive(Debug, Clone)]
#[cfg_attr(feature = "clap", derive(clap::Args))]
pub struct AdminAccess {
    /// The server's `admin.listen`. With `https://` in front it is TLS, which needs `--ca`.
    #[cfg_attr(
        feature = "clap",
        arg(
            long = "admin",
            value_name = "ADDR",
            default_value = "127.0.0.1:50052",
            global = true,
            help_heading = "Admin listener"
        )
    )]
    pub address: String,
    /// A file whose first line is the token to call with, or a name, a space and the token: as in `admin.token_file`.
    /// Without TLS it crosses the network in the clear.
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE", global = true, help_heading = "Admin listener"))]
    pub token_file: Option<PathBuf>,
    /// The certificate of the authority that signed the server's (PEM). The connection is TLS; the server's certificate must
    /// name the host of `--admin`.
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE", global = true, help_heading = "Admin listener"))]
    pub ca: Option<PathBuf>,
    /// This client's certificate chain (PEM), where the server has an `admin.tls_client_ca`. Needs `--key` and `--ca`.
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE", global = true, help_heading = "Admin listener"))]
    pub cert: Option<PathBuf>,
    /// The private key of `--cert` (PEM).
    #[cfg_attr(feature = "clap", arg(long, value_name = "FILE", global = true, help_heading = "Admin listener"))]
    pub key: Option<PathBuf>,
}

impl AdminAccess {
    /// Plain text and no token.
    pub fn plain(address: impl Into<String>) -> Self {
        AdminAccess { address: address.into(), token_file: None, ca: None, cert: None, key: None }
    }

    /// clap's `requires` does not hold for flags that stand before and after a subcommand, so it is checked here.
    fn tls(&self) -> Result<Option<Tls>, Error> {
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((cert.as_path(), key.as_path())),
            (None, None) => None,
            _ => return Err(Error::Options("--cert and --key need each other")),
        };
        let has_tls_options = self.ca.is_some() || identity.is_some();
        if has_tls_options && self.address.starts_with("http://") {
            return Err(Error::Options("--ca, --cert and --key are for TLS, which an http:// address does not have"));
        }
        match &self.ca {
            Some(ca) => Tls::read(ca, identity).map(Some),
            None if has_tls_options || self.address.starts_with("https://") => {
                Err(Error::Options("TLS needs --ca, the certificate of the authority that signed the server's"))
            }
            None => Ok(None),
        }
    }
}

/// Asks and changes one server. Nothing is sent again: only its caller knows whether a push should be. Clones share one
/// connection.
#[derive(Debug, Clone)]
pub struct AdminClient(AdminServiceClient<InterceptedService<Channel, Bearer>>);

impl AdminClient {
    /// Reads the files and connects.
    pub async fn connect(access: &AdminAccess) -> Result<Self, Error> {
        let bearer = Bearer(access.token_file.as_deref().map(authorization).transpose()?);
        let channel = Address::new(&access.address, access.tls()?.as_ref())?.connect().await?;
        let client = AdminServiceClient::with_interceptor(channel, bearer);
        Ok(AdminClient(client.max_decoding_message_size(MAX_CHUNK_BYTES)))
    }

    /// What runs: models, caches, the config in force, the push under way and the last ones.
    pub async fn get_status(&self) -> Result<GetStatusResponse, Error> {
        inner("GetStatus", self.0.clone().get_status(GetStatusRequest {}).await)
    }

    /// Puts a config in force, or only checks it. The push goes on even if this call is dropped.
    pub async fn push_config(&self, request: PushConfigRequest) -> Result<PushConfigResponse, Error> {
        inner("PushConfig", self.0.clone().push_config(request).await)
    }

    /// Puts the config before the last push in force again.
    pub async fn rollback(&self, request: RollbackRequest) -> Result<RollbackResponse, Error> {
        inner("Rollback", self.0.clone().rollback(request).await)
    }

    /// Empties one cache, or all of them.
    pub async fn flush_cache(&self, request: FlushCacheRequest) -> Result<FlushCacheResponse, Error> {
        inner("FlushCache", self.0.clone().flush_cache(request).await)
    }

    /// One cache's vectors as a safetensors file, chunk by chunk.
    pub async fn export_cache(&self, request: ExportCacheRequest) -> Result<Export, Error> {
        inner("ExportCache", self.0.clone().export_cache(request).await).map(Export)
    }

    /// Puts such a file into the server's cache. A stream that ends is a file that is complete.
    pub async fn import_cache(
        &self,
        chunks: impl Stream<Item = CacheChunk> + Send + 'static,
    ) -> Result<ImportCacheResponse, Error> {
        inner("ImportCache", self.0.clone().import_cache(chunks).await)
    }
}

fn inner<T>(method: &'static str, answer: Result<Response<T>, Status>) -> Result<T, Error> {
    answer.map(Response::into_inner).map_err(Error::failed(method))
}

/// A file on its way.
#[derive(Debug)]
pub struct Export(Streaming<CacheChunk>);

impl Export {
    /// The next piece; none after the last one.
    pub async fn next(&mut self) -> Result<Option<CacheChunk>, Error> {
        self.0.message().await.map_err(Error::failed("ExportCache"))
    }
}

/// Adds the token to every call, if there is one.
#[derive(Debug, Clone)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.0 {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        Ok(request)
    }
}

/// No error shows a token, nor a line that may hold one.
fn authorization(path: &Path) -> Result<MetadataValue<Ascii>, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::File { path: path.to_path_buf(), source })?;
    let refused = |reason| Error::Token { path: path.to_path_buf(), reason };
    let token = first_token(&text).map_err(refused)?;
    let header = MetadataValue::try_from(format!("Bearer {token}"));
    let mut header = header.map_err(|_| refused("its first token has characters that a header cannot have"))?;
    header.set_sensitive(true);
    Ok(header)
}

/// The token of the first line that is not empty: `name token`, or the token alone. The error is a [`Error::Token`]'s reason.
fn first_token(text: &str) -> Result<&str, &'static str> {
    let line = text.lines().find(|line| !line.trim().is_empty()).ok_or("it holds no token")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [token] | [_, token] => Ok(token),
        _ => Err("its first line is neither a token nor a name and a token"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_file_is_taken_with_its_name_or_without() {
        assert_eq!(first_token("s3cret\n"), Ok("s3cret"));
        assert_eq!(first_token("\n  alice  s3cret \r\nbob other\n"), Ok("s3cret"));
    }

    #[test]
    fn no_error_shows_a_token() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", " \n\t\n", "alice s3cret by-the-way\n", "alice s3cret\u{1}\n"] {
            fs::write(file.path(), text).unwrap();
            let error = format!("{:?}", authorization(file.path()).unwrap_err());
            assert!(error.contains("Token") && !error.contains("s3cret"), "{error}");
        }
        fs::write(file.path(), "alice s3cret").unwrap();
        let bearer = Bearer(Some(authorization(file.path()).unwrap()));
        assert!(!format!("{bearer:?}").contains("s3cret"));
        assert_eq!(bearer.0.unwrap().to_str().unwrap(), "Bearer s3cret");
    }

    #[test]
    fn tls_options_that_contradict_each_other_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "-----BEGIN CERTIFICATE-----").unwrap();
        let tls = |address: &str, [ca, cert, key]: [bool; 3]| {
            let path = |is_set: bool| is_set.then(|| file.path().to_path_buf());
            AdminAccess { ca: path(ca), cert: path(cert), key: path(key), ..AdminAccess::plain(address) }.tls()
        };
        let refused = |address, files| matches!(tls(address, files), Err(Error::Options(_)));
        assert!(tls("localhost:1", [false; 3]).unwrap().is_none());
        assert!(tls("localhost:1", [true; 3]).unwrap().is_some());
        assert!(tls("https://localhost:1", [true, false, false]).unwrap().is_some());
        assert!(refused("https://localhost:1", [false; 3]));
        assert!(refused("http://localhost:1", [true, false, false]));
        assert!(refused("localhost:1", [true, true, false]));
        assert!(refused("localhost:1", [true, false, true]));
        assert!(refused("localhost:1", [false, true, true]));
    }
}
