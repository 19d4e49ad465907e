//! Bundles: folders of graphs that are complete, immutable and checked before they serve.
//!
//! [`store`] fetches a bundle from an object store, [`manifest`] reads `manifest.toml`, [`files`] reads the other files
//! and compares them with it, [`digest`] derives the keys of the caches from it, [`mod@load`] turns the bundle into a running [`Model`], [`golden`] compares the graphs' results with PyTorch's
//! results from training, `batches` checks that no vector depends on its batch, `warm` runs the graphs at real sizes, and
//! [`registry`] routes requests to the models that serve.

mod batches;
pub mod digest;
pub mod files;
pub mod golden;
pub mod load;
pub mod manifest;
pub mod registry;
pub mod store;
mod warm;

pub use load::{BundleError, LoadOptions, LoadStep, Loaded, Model, load, verify};
pub use manifest::Manifest;
pub use registry::{ModelSet, Registry, ServedModel, Shadow};
