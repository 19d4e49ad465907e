//! Inference: the only place that knows `ort`.
//!
//! [`library`] finds and loads ONNX Runtime, [`session`] runs one graph of it, and [`pool`] owns the threads that may do
//! so: compute never runs on tokio's own threads. [`background`] runs work that gives way to those threads.

pub mod background;
pub mod batches;
pub mod job;
pub mod library;
mod pace;
pub mod pool;
mod queue;
pub mod session;
pub mod weights;

pub use batches::Batches;
pub use job::JobError;
pub use library::{LibraryError, Provider, ProviderChoice, Runtime};
pub use pace::Pace;
pub use pool::Pool;
pub use session::{Graph, GraphError, Input};
pub use weights::SharedWeights;
