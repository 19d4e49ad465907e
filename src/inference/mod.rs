//! Inference: the only place that knows `ort`.
//!
//! [`library`] finds and loads ONNX Runtime, [`session`] runs one graph of it, and [`pool`] owns the threads that may do
//! so: compute never runs on tokio's own threads. [`priority`] lets threads give way to those that score.

pub mod batches;
pub mod library;
mod pace;
pub mod pool;
pub mod priority;
mod queue;
pub mod session;
pub mod weights;

pub use batches::Batches;
pub use library::{LibraryError, Provider, ProviderChoice, Runtime};
pub use pace::Pace;
pub use pool::{JobError, Pool};
pub use session::{Graph, GraphError, Input};
pub use weights::SharedWeights;
