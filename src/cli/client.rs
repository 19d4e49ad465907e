//! What every command that talks to a server shares.

use crate::wire::proto::{
    Tensor, admin_service_client::AdminServiceClient, mid_emb_service_client::MidEmbServiceClient,
};
use anyhow::{Context, anyhow, bail};
use comfy_table::{Table, presets::UTF8_BORDERS_ONLY};
use half::{bf16, f16};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    error::Error,
    fs,
    future::Future,
    io::{self, IsTerminal},
    iter,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel, ClientTlsConfig, Identity},
};

/// Pages of ten thousand candidates with every output fit.
const MAX_ANSWER_BYTES: usize = 256 << 20;
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// An answer of 500 mid-embs is 128 KB. HTTP/2's usual frames of 16 KB would be written one by one.
const MAX_FRAME_BYTES: u32 = 1 << 20;
/// What a server streams of a cache comes in chunks far smaller than that.
const MAX_CHUNK_BYTES: usize = 64 << 20;

/// A client of the admin listener. Its clones share one connection.
pub(super) type AdminClient = AdminServiceClient<InterceptedService<Channel, Bearer>>;

/// Flags that cannot be meant together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct UsageError(&'static str);

/// How to reach a server's admin listener.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct AdminServer {
    /// The server's `admin.listen`. With `https://` in front it is TLS, which needs `--ca`.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "127.0.0.1:50052",
        global = true,
        help_heading = "Admin listener"
    )]
    admin: String,
    /// A file whose first line is the token to call with, or a name, a space and the token: as in `admin.token_file`.
    /// Without TLS it crosses the network in the clear.
    #[arg(long, value_name = "FILE", global = true, help_heading = "Admin listener")]
    token_file: Option<PathBuf>,
    /// Who signed the server's certificate (PEM). The connection is TLS; the certificate has to name the host of `--admin`.
    #[arg(long, value_name = "FILE", global = true, help_heading = "Admin listener")]
    ca: Option<PathBuf>,
    /// This client's certificate chain (PEM), where the server has an `admin.tls_client_ca`. Needs `--key` and `--ca`.
    #[arg(long, value_name = "FILE", global = true, help_heading = "Admin listener")]
    cert: Option<PathBuf>,
    /// The private key of `--cert` (PEM).
    #[arg(long, value_name = "FILE", global = true, help_heading = "Admin listener")]
    key: Option<PathBuf>,
}

impl AdminServer {
    pub(super) async fn connect(&self) -> anyhow::Result<AdminClient> {
        let bearer = Bearer(self.token_file.as_deref().map(authorization).transpose()?);
        let channel = channel(&self.admin, self.tls()?).await?;
        Ok(AdminServiceClient::with_interceptor(channel, bearer).max_decoding_message_size(MAX_CHUNK_BYTES))
    }

    /// clap's `requires` does not hold for flags that stand before and after a subcommand, so it is checked here.
    fn tls(&self) -> anyhow::Result<Option<ClientTlsConfig>> {
        let is_wanted = self.ca.is_some() || self.cert.is_some() || self.key.is_some();
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some(Identity::from_pem(pem(cert)?, pem(key)?)),
            (None, None) => None,
            _ => bail!(UsageError("--cert and --key need each other")),
        };
        if is_wanted && self.admin.starts_with("http://") {
            bail!(UsageError("--ca, --cert and --key are for TLS, an http:// address is not"));
        }
        if !is_wanted && !self.admin.starts_with("https://") {
            return Ok(None);
        }
        // No authority is trusted unless it is named: the admin listener's certificate is mostly the operator's own.
        let Some(ca) = &self.ca else {
            bail!(UsageError("TLS needs --ca, the certificate of who signed the server's"))
        };
        // The name that the certificate has to hold is the address's host, which is tonic's choice where none is set.
        let tls = ClientTlsConfig::new().timeout(CONNECT_WITHIN).ca_certificate(Certificate::from_pem(pem(ca)?));
        Ok(Some(match identity {
            Some(identity) => tls.identity(identity),
            None => tls,
        }))
    }
}

/// The token of every call, if there is one.
#[derive(Debug, Clone)]
pub(super) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(authorization) = &self.0 {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        Ok(request)
    }
}

/// No error shows a token, nor a line that may hold one.
fn authorization(path: &Path) -> anyhow::Result<MetadataValue<Ascii>> {
    let text = fs::read_to_string(path).with_context(|| format!("token file {}", path.display()))?;
    let token = first_token(&text).with_context(|| format!("token file {}", path.display()))?;
    let mut header = MetadataValue::try_from(format!("Bearer {token}"))
        .map_err(|_| anyhow!("token file {}: its first token holds what no header may", path.display()))?;
    header.set_sensitive(true);
    Ok(header)
}

/// The token of the first line that is not empty: `name token`, or the token alone.
fn first_token(text: &str) -> anyhow::Result<&str> {
    let line = text.lines().find(|line| !line.trim().is_empty()).context("holds no token")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        [token] | [_, token] => Ok(token),
        _ => bail!("its first line is neither a token nor a name and a token"),
    }
}

fn pem(path: &Path) -> anyhow::Result<Vec<u8>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    // rustls passes over what is none, and then trusts nobody without a word of why.
    if !text.contains("-----BEGIN ") {
        bail!("{} holds no PEM", path.display());
    }
    Ok(text.into_bytes())
}

/// Runs a client command on one thread.
pub(super) fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}

async fn channel(server: &str, tls: Option<ClientTlsConfig>) -> anyhow::Result<Channel> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let url = if server.contains("://") { server.to_owned() } else { format!("{scheme}://{server}") };
    let endpoint = Channel::from_shared(url).with_context(|| format!("server address {server:?}"))?;
    let mut endpoint = endpoint.connect_timeout(CONNECT_WITHIN).tcp_nodelay(true).max_frame_size(MAX_FRAME_BYTES);
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).with_context(|| format!("TLS to {server}"))?;
    }
    endpoint.connect().await.with_context(|| format!("cannot connect to {server}"))
}

pub(super) async fn mid_emb(server: &str) -> anyhow::Result<MidEmbServiceClient<Channel>> {
    Ok(MidEmbServiceClient::new(channel(server, None).await?).max_decoding_message_size(MAX_ANSWER_BYTES))
}

/// A status as people read it. Where the connection broke, only the innermost cause says why.
pub(super) fn refused(method: &str) -> impl Fn(Status) -> anyhow::Error {
    let method = method.to_owned();
    move |status| {
        let cause = iter::successors(status.source(), |&cause| cause.source()).last();
        let cause = cause.map_or(String::new(), |cause| format!(": {cause}"));
        anyhow!("{method}: {:?}: {}{cause}", status.code(), status.message())
    }
}

/// The numbers of a tensor, whatever its type.
pub(super) fn numbers(tensor: &Tensor) -> Vec<f32> {
    match tensor.dtype {
        2 => tensor.data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        3 => tensor.data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// The length of a vector.
pub(super) fn norm(vector: &[f32]) -> f32 {
    vector.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// An empty table with these headings.
pub(super) fn table(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(headings.iter().copied());
    table
}

/// A bar on standard error, hidden where that is no terminal.
pub(super) fn progress(template: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    ProgressBar::new(0).with_style(style(template))
}

/// The look of a bar.
pub(super) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_file_is_taken_with_its_name_or_without() {
        assert_eq!(first_token("s3cret\n").unwrap(), "s3cret");
        assert_eq!(first_token("\n  alice  s3cret \r\nbob other\n").unwrap(), "s3cret");
    }

    #[test]
    fn no_error_shows_a_token() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", " \n\t\n", "alice s3cret by-the-way\n", "alice s3cret\u{1}\n"] {
            fs::write(file.path(), text).unwrap();
            let error = format!("{:?}", authorization(file.path()).unwrap_err());
            assert!(error.contains("token file") && !error.contains("s3cret"), "{error}");
        }
        fs::write(file.path(), "alice s3cret").unwrap();
        let bearer = Bearer(Some(authorization(file.path()).unwrap()));
        assert!(!format!("{bearer:?}").contains("s3cret"));
        assert_eq!(bearer.0.unwrap().to_str().unwrap(), "Bearer s3cret");
    }

    #[test]
    fn tls_flags_that_contradict_each_other_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "-----BEGIN CERTIFICATE-----").unwrap();
        let tls = |admin: &str, [ca, cert, key]: [bool; 3]| {
            let path = |is_set: bool| is_set.then(|| file.path().to_path_buf());
            let admin = admin.to_owned();
            AdminServer { admin, token_file: None, ca: path(ca), cert: path(cert), key: path(key) }.tls()
        };
        let refused = |admin, files| tls(admin, files).unwrap_err().is::<UsageError>();
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
