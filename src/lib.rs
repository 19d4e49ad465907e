//! midemb turns a user's history and a page of candidate items into the mid-emb vectors of LEARN, for a ranking model to
//! use as features.
//!
//! The modules in reading order; each uses only those below it (`tests/integration/architecture.rs` holds that):
//!
//! - [`cli`]: the commands, one file each.
//! - [`server`]: listeners, health, shutdown.
//! - [`wire`]: the only place that knows tonic, and our messages.
//! - [`lifecycle`]: configs into force, rollback, snapshots of the caches.
//! - [`config`]: file and environment to validated settings.
//! - [`pipeline`]: the request, one line a stage. **Start here.**
//! - [`admission`]: permits and deadlines.
//! - [`bundle`]: from a folder of graphs to a checked model that serves.
//! - [`item_trace`]: which items requests ask for, written to a file.
//! - [`cache_snapshot`]: the caches in files, for a restart without a cold start.
//! - [`known_items`]: text by item id.
//! - [`fusion`]: the CVR MLP, mid-emb.
//! - [`towers`]: PCH, user and item embeddings.
//! - [`content`]: CEG, content embeddings: cache, single flight, batches.
//! - [`inference`]: the only place that knows ort.
//! - [`item_text`]: six fields to digest and prompt.
//! - [`vector_cache`]: embeddings by digest.
//! - [`bounded_cache`]: a cache bounded in bytes.
//! - [`telemetry`]: the only place that knows the metrics macros.
//! - [`error`] and [`domain`]: the closed set of errors, the plain types.

pub mod admission;
pub mod bounded_cache;
pub mod bundle;
pub mod cache_snapshot;
pub mod cli;
pub mod config;
pub mod content;
pub mod domain;
pub mod error;
pub mod fusion;
pub mod inference;
pub mod item_text;
pub mod item_trace;
pub mod known_items;
pub mod lifecycle;
pub mod pipeline;
pub mod server;
pub mod telemetry;
pub mod towers;
pub mod vector_cache;
pub mod wire;
