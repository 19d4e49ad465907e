//! The wire: the only place that knows tonic and our messages.
//!
//! [`decode`] checks messages and converts them to plain types, reading the fields of those that carry items with [`raw`];
//! [`encode`] converts answers to messages, [`status`] maps errors to gRPC statuses, [`services`] and [`admin`] are the handlers,
//! [`operator`] authenticates operators, and [`codec`] takes messages in.
//!
//! Around the handlers, [`layer`] counts every call, and [`receive`] turns calls away before their messages are read and bounds
//! what they hold: messages that arrive ([`body`]), and answers that are not read ([`answer`]), each within a [`budget`].

pub mod admin;
pub mod answer;
pub mod body;
pub mod budget;
pub mod codec;
pub mod decode;
pub mod encode;
pub mod layer;
pub mod operator;
pub mod peer;
pub mod raw;
pub mod receive;
pub mod services;
pub mod status;

/// Completes when a drain has begun. Cancel-safe.
pub async fn drain_began(draining: &mut tokio::sync::watch::Receiver<bool>) {
    // An error says that the server itself was dropped.
    let _ = draining.wait_for(|is_draining| *is_draining).await;
}

/// Messages, clients and servers generated from `proto/`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated; the documentation is in proto/"
)]
pub mod proto {
    tonic::include_proto!("midemb.v1");

    /// The descriptors that reflection serves.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/midemb_descriptor.bin"));
}
