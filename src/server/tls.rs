//! TLS of a listener, with certificates that are read again when their files change.
//!
//! The files are compared every few seconds by their contents, so it does not matter how they are replaced: in place, by rename, or
//! by a symlink's swap as Kubernetes does it. New connections get the newest files that go together; if those on disk do not, the
//! last good ones stay and the log says why. Connections that are open keep what they were opened with.

use super::ServerError;
use crate::config::settings::AdminGuard;
use arc_swap::ArcSwap;
use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio_rustls::rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

/// How often the files are compared with what is served.
const POLL: Duration = Duration::from_secs(2);

/// The files that TLS needs.
#[derive(Debug, Clone)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// The contents of [`Files`].
#[derive(Debug, PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// The TLS settings of new connections.
#[derive(Debug, Clone)]
pub(super) struct Tls(Arc<ArcSwap<ServerConfig>>);

impl Tls {
    /// Reads the files that `guard` names and watches them until the runtime ends; none if it names no certificate.
    pub(super) fn watch(guard: &AdminGuard) -> Result<Option<Self>, ServerError> {
        let Some((certificate, key)) = guard.certificate.clone() else { return Ok(None) };
        let files = Files { certificate, key, client_ca: guard.client_ca.clone() };
        let contents = files.read()?;
        let tls = Tls(Arc::new(ArcSwap::new(contents.config()?)));
        tokio::spawn(tls.clone().reload(files, contents));
        Ok(Some(tls))
    }

    /// The settings for a connection that begins now.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.0.load_full()
    }

    async fn reload(self, files: Files, mut served: Contents) {
        let mut last_fault = String::new();
        loop {
            tokio::time::sleep(POLL).await;
            let read = files.read();
            if read.as_ref().is_ok_and(|contents| *contents == served) {
                last_fault.clear();
                continue;
            }
            let certificate = files.certificate.display();
            match read.and_then(|contents| Ok((contents.config()?, contents))) {
                Ok((config, contents)) => {
                    self.0.store(config);
                    served = contents;
                    last_fault.clear();
                    tracing::info!(%certificate, "certificates reloaded");
                }
                Err(error) => {
                    let fault = error.to_string();
                    // Files may be replaced one after the other, so the same fault is reported once.
                    if fault != last_fault {
                        tracing::error!(
                            cause = fault,
                            "new certificates cannot be used, the last good ones are served"
                        );
                    }
                    last_fault = fault;
                }
            }
        }
    }
}

impl Files {
    fn read(&self) -> Result<Contents, ServerError> {
        Ok(Contents {
            certificate: read("admin.tls_cert", &self.certificate)?,
            key: read("admin.tls_key", &self.key)?,
            client_ca: self.client_ca.as_deref().map(|path| read("admin.tls_client_ca", path)).transpose()?,
        })
    }
}

impl Contents {
    fn config(&self) -> Result<Arc<ServerConfig>, ServerError> {
        let chain = certificates("admin.tls_cert", &self.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(fault("admin.tls_key"))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(fault("admin.tls_cert"))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(authorities) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates("admin.tls_client_ca", authorities)? {
                    roots.add(authority).map_err(fault("admin.tls_client_ca"))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(fault("admin.tls_client_ca"))?)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(fault("admin.tls_cert"))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(key: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, ServerError> {
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(fault(key))?;
    if certificates.is_empty() {
        return Err(fault(key)("the file has no certificate in PEM"));
    }
    Ok(certificates)
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, ServerError> {
    fs::read(path).map_err(|error| fault(key)(format!("{} cannot be read: {error}", path.display())))
}

fn fault<E: Into<Box<dyn Error + Send + Sync>>>(key: &'static str) -> impl Fn(E) -> ServerError {
    move |source| ServerError::Tls { key, source: source.into() }
}
