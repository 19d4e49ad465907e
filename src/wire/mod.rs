//! The wire: the only place that knows tonic, and our messages.
//!
//! [`decode`] checks a message and makes plain types of it, [`encode`] makes a message of an answer, [`status`] maps errors
//! to gRPC statuses, [`services`] and [`admin`] are the handlers, [`operator`] lets operators in, [`codec`] answers bytes that are no message, [`layer`]
//! counts every call, and [`admit`] lets it in or turns it away before its message is read.

pub mod admin;
pub mod admit;
pub mod codec;
pub mod decode;
pub mod encode;
pub mod layer;
pub mod operator;
pub mod services;
pub mod status;

/// Messages, clients and servers, generated from `proto/`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::too_many_lines,
    reason = "generated; the documentation is in proto/"
)]
pub mod proto {
    tonic::include_proto!("midemb.v1");

    /// The descriptors that reflection answers from.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/midemb_descriptor.bin"));
}
