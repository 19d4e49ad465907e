//! Inference: the only module that uses `ort`.
//!
//! [`library`] finds and loads ONNX Runtime, [`session`] runs one graph, and [`pool`] owns the threads that run graphs: compute
//! never runs on tokio's threads. [`background`] runs work that gives way to those threads.

pub mod background;
pub mod batches;
pub mod job;
pub mod library;
mod onnx;
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
pub use weights::{GraphSource, SharedWeights, Slice, WeightFiles};
