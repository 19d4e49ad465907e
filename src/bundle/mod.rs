//! Bundles: folders of graphs that are complete, immutable and checked before they serve.
//!
//! [`manifest`] reads `manifest.toml`, [`digest`] holds every file to it, [`mod@load`] makes a running [`Model`] of it,
//! [`golden`] compares what the graphs give here with what PyTorch gave in training, and [`registry`] routes requests to
//! the models that serve.

pub mod digest;
pub mod golden;
pub mod load;
pub mod manifest;
pub mod registry;

pub use load::{BundleError, LoadOptions, Model, load, verify};
pub use manifest::Manifest;
pub use registry::{Registry, ServedModel, Snapshot};
