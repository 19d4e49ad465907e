//! Bundles: folders of graphs that are complete, immutable and checked before they serve.
//!
//! [`store`] fetches a bundle from where operators keep it, [`manifest`] reads `manifest.toml`, [`digest`] holds every file to
//! it, [`mod@load`] makes a running [`Model`] of it, [`golden`] compares what the graphs give here with what PyTorch gave in
//! training, `warm` runs them at real sizes, and [`registry`] routes requests to the models that serve.

pub mod digest;
pub mod golden;
pub mod load;
pub mod manifest;
pub mod registry;
pub mod store;
mod warm;

pub use load::{BundleError, LoadOptions, LoadStep, Loaded, Model, load, verify};
pub use manifest::Manifest;
pub use registry::{Registry, ServedModel, Shadow, Snapshot};
