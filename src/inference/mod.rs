//! Inference: the only place that knows `ort`.
//!
//! [`library`] finds and loads ONNX Runtime, [`session`] runs one graph of it, and [`pool`] owns the threads that may do
//! so: compute never runs on tokio's own threads.

pub mod library;
pub mod pool;
pub mod session;

pub use library::{LibraryError, Provider, ProviderChoice, Runtime};
pub use pool::{JobError, Pool};
pub use session::{Graph, GraphError, Input};
