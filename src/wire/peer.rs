//! The other end of a connection, as the handlers and the layers see it.

use super::budget::Share;
use crate::domain::digest::sha256_hex;
use std::{net::IpAddr, sync::Arc};

/// Who sent a request. The server puts it into the extensions of every request.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    /// None in tests that use no socket.
    pub address: Option<IpAddr>,
    /// [`fingerprint`] of its client certificate, which the listener's TLS has checked.
    pub certificate: Option<Arc<str>>,
    /// How much of each budget its connection holds.
    pub shares: Arc<Shares>,
}

/// What one connection holds of the budgets that all connections share.
#[derive(Debug, Default)]
pub struct Shares {
    /// Messages that are arriving.
    pub receiving: Arc<Share>,
    /// Requests that are being answered.
    pub decoded: Arc<Share>,
    /// Answers that the peer has not taken yet.
    pub unsent: Arc<Share>,
}

impl Peer {
    /// The peer in the extensions of a request, or an unknown one.
    pub fn of(extensions: &http::Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }
}

/// The first 16 hex digits of a certificate's SHA-256, short enough for people to compare.
pub fn fingerprint(certificate: &[u8]) -> String {
    sha256_hex(certificate)[..16].to_owned()
}
