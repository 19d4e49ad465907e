//! The wire: the only place that knows tonic and our messages.
//!
//! [`decode`] checks messages and converts them to plain types, [`encode`] converts answers to messages, [`status`] maps
//! errors to gRPC statuses, [`services`] and [`admin`] are the handlers, [`operator`] authenticates operators, [`codec`]
//! answers invalid messages, [`raw`] reads the fields of those that carry items, [`layer`] counts every call, and [`admit`] admits or sheds a call before its message is read.

pub mod admin;
pub mod admit;
pub mod codec;
pub mod decode;
pub mod encode;
pub mod layer;
pub mod operator;
pub mod raw;
pub mod services;
pub mod status;

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
