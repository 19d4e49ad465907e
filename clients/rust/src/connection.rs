//! From an address and TLS options to a channel.

use crate::Error;
use std::{fs, path::Path, time::Duration};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pings find a host that is gone without closing its connections. Calls alone cannot: theirs look like those of a slow one.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom to trust on a TLS connection, and who the caller is. A server's certificate must name the host of its address.
#[derive(Clone, Debug)]
pub struct Tls(ClientTlsConfig);

impl Tls {
    /// Trusts servers whose certificates this authority signed (PEM). No other authority is trusted, as these certificates
    /// are mostly the operator's own.
    pub fn trusting(authority: impl AsRef<[u8]>) -> Self {
        let authority = Certificate::from_pem(authority);
        Tls(ClientTlsConfig::new().timeout(CONNECT_TIMEOUT).ca_certificate(authority))
    }

    /// Shows the server this certificate chain; `key` is its private key (both PEM).
    #[must_use]
    pub fn identity(self, certificates: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Self {
        Tls(self.0.identity(Identity::from_pem(certificates, key)))
    }

    pub(crate) fn read(authority: &Path, identity: Option<(&Path, &Path)>) -> Result<Self, Error> {
        let tls = Tls::trusting(read_pem(authority)?);
        Ok(match identity {
            Some((certificates, key)) => tls.identity(read_pem(certificates)?, read_pem(key)?),
            None => tls,
        })
    }
}

fn read_pem(path: &Path) -> Result<Vec<u8>, Error> {
    let bytes = fs::read(path).map_err(|source| Error::File { path: path.to_path_buf(), source })?;
    // rustls ignores a file without PEM, and then trusts nobody without saying why.
    let marker = b"-----BEGIN ";
    if !bytes.windows(marker.len()).any(|window| window == marker) {
        return Err(Error::Pem { path: path.to_path_buf() });
    }
    Ok(bytes)
}

/// A server that may not have been reached yet.
#[derive(Debug, Clone)]
pub(crate) struct Address {
    /// As its user wrote it.
    pub(crate) name: String,
    endpoint: Endpoint,
}

impl Address {
    /// `name` is `host:port`, or a URL with `http://` or `https://`.
    pub(crate) fn new(name: &str, tls: Option<&Tls>) -> Result<Self, Error> {
        let is_secure = name.starts_with("https://");
        if tls.is_some() && name.starts_with("http://") {
            return Err(Error::Options("an http:// address has no TLS: use https://, or leave the TLS options out"));
        }
        if tls.is_none() && is_secure {
            return Err(Error::Options("an https:// address needs the authority that signed the server's certificate"));
        }
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = if name.contains("://") { name.to_owned() } else { format!("{scheme}://{name}") };
        let endpoint = Channel::from_shared(url).map_err(|_| invalid(name))?;
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
        let endpoint = endpoint
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true);
        let endpoint = match tls {
            Some(Tls(tls)) => {
                endpoint.tls_config(tls.clone()).map_err(|source| Error::Tls { address: name.to_owned(), source })?
            }
            None => endpoint,
        };
        Ok(Address { name: name.to_owned(), endpoint })
    }

    pub(crate) async fn connect(&self) -> Result<Channel, Error> {
        let channel = self.endpoint.connect().await;
        channel.map_err(|source| Error::Connect { address: self.name.clone(), source })
    }

    /// A channel that connects with its first call.
    pub(crate) fn connect_lazily(&self) -> Channel {
        self.endpoint.connect_lazy()
    }
}

fn invalid(name: &str) -> Error {
    Error::Address { address: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_tls_options_must_fit_each_other() {
        let tls = Tls::trusting("-----BEGIN CERTIFICATE-----");
        let refused = |name: &str, tls: Option<&Tls>| Address::new(name, tls).unwrap_err();
        assert!(matches!(refused("https://localhost:1", None), Error::Options(_)));
        assert!(matches!(refused("http://localhost:1", Some(&tls)), Error::Options(_)));
        assert!(matches!(refused("not an address", None), Error::Address { .. }));
        for name in ["localhost:1", "http://localhost:1"] {
            assert_eq!(Address::new(name, None).unwrap().name, name);
        }
    }

    #[test]
    fn a_file_without_pem_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "no certificate").unwrap();
        let error = Tls::read(file.path(), None).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()) && error.contains("PEM"), "{error}");
    }
}
