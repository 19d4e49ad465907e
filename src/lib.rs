//! midemb turns a user's history and a page of candidate items into the mid-emb vectors of LEARN, for a ranking model to
//! use as features.
//!
//! The modules in reading order; each uses only those below it (`tests/integration/architecture.rs` holds that):
//!
//! - [`cli`]: the operator's commands, one file each.
//! - [`server`]: listeners, health, shutdown.
//! - [`wire`]: our messages, and the gRPC services that speak them.
//! - [`lifecycle`]: how a config comes into force, and how it is rolled back.
//! - [`config`]: file and environment to validated settings.
//! - [`pipeline`]: the request, one line per stage. **Start here.**
//! - [`served_features`]: a sample of the answers, in files to train ranking models on.
//! - [`bundle`]: from a folder of graphs to a checked model that serves.
//! - [`content`]: CEG, content embeddings: single flight, batches, the encoder's threads.
//! - [`towers`]: PCH and the CVR head: item records, user embeddings, mid-embs.
//! - [`cache`]: what is kept between requests, and its snapshots on disk.
//! - [`inference`]: the only place that knows ort.
//! - [`telemetry`]: the only place that knows the metrics macros.
//! - [`domain`]: the plain types: requests, item text, digests, errors.

#[cfg(all(feature = "loom", not(test)))]
compile_error!(
    "the feature loom replaces locks and threads; it is for `cargo test --lib --features loom interleavings` only"
);

pub mod bundle;
pub mod cache;
pub mod cli;
pub mod config;
pub mod content;
pub mod domain;
pub mod inference;
pub mod lifecycle;
pub mod pipeline;
pub mod served_features;
pub mod server;
pub mod telemetry;
pub mod towers;
pub mod wire;
