//! One ONNX graph, loaded to run on one thread.

use super::{GraphSource, Runtime};
use ort::{
    session::{Session, SessionInputValue, builder::SessionBuilder},
    value::TensorRef,
};
use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Why a graph cannot be loaded or run.
#[derive(Debug, Error)]
pub enum GraphError {
    /// ONNX Runtime refuses the file.
    #[error("{} cannot be loaded: {source}", path.display())]
    Load {
        /// The graph's file.
        path: PathBuf,
        /// The cause.
        source: ort::Error,
    },
    /// The graph is no ONNX file, or its weights are not where it says.
    #[error("{} cannot be loaded: {reason}", path.display())]
    Weights {
        /// The graph's file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The graph lacks an input or output that the manifest names.
    #[error("{} has no {kind} named {name:?} (it has: {found})", path.display())]
    Missing {
        /// The graph's file.
        path: PathBuf,
        /// "input" or "output".
        kind: &'static str,
        /// The name in the manifest.
        name: String,
        /// The names in the graph.
        found: String,
    },
    /// A run failed.
    #[error("the graph failed: {0}")]
    Run(#[from] ort::Error),
    /// An output has another shape than the manifest says.
    #[error("output {name:?} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The output's name.
        name: String,
        /// The shape that was computed.
        found: Vec<i64>,
        /// The shape according to the manifest.
        expected: Vec<usize>,
    },
    /// The manifest names another number of outputs than the server reads.
    #[error("the manifest names {found} outputs of the graph, expected {expected}")]
    OutputCount {
        /// The number of outputs in the manifest.
        found: usize,
        /// The number of outputs that the server reads.
        expected: usize,
    },
}

/// One input tensor, borrowed for the run.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Single precision.
    F32 {
        /// The dimensions; `data` is row-major.
        shape: &'a [usize],
        /// As many values as the shape says.
        data: &'a [f32],
    },
    /// Ids, masks and row numbers.
    I64 {
        /// The dimensions; `data` is row-major.
        shape: &'a [usize],
        /// As many values as the shape says.
        data: &'a [i64],
    },
}

/// A loaded graph with its inputs and outputs in the manifest's order.
#[derive(Debug)]
pub struct Graph {
    session: Session,
    inputs: Vec<String>,
    outputs: Vec<String>,
}

impl Graph {
    /// Creates a session from a graph in memory. A run uses only the calling thread (one intra-op thread, no spinning): the pool provides the
    /// parallelism.
    pub fn load(
        runtime: &Runtime,
        source: &GraphSource,
        inputs: &[String],
        outputs: &[String],
    ) -> Result<Self, GraphError> {
        let path = &source.path;
        let failed = |source| GraphError::Load { path: path.clone(), source };
        let mut builder = builder(runtime).and_then(|builder| source.add_weights(builder)).map_err(failed)?;
        let session = builder.commit_from_memory(&source.bytes).map_err(failed)?;
        let names = |outlets: &[ort::value::Outlet]| outlets.iter().map(|o| o.name().to_owned()).collect::<Vec<_>>();
        require(path, "input", inputs, &names(session.inputs()))?;
        require(path, "output", outputs, &names(session.outputs()))?;
        Ok(Graph { session, inputs: inputs.to_vec(), outputs: outputs.to_vec() })
    }

    /// Runs the graph and returns copies of its outputs, after checking each against its expected shape in `shapes`.
    pub fn run(&mut self, inputs: &[Input<'_>], shapes: &[&[usize]]) -> Result<Vec<Vec<f32>>, GraphError> {
        let mut values: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for (name, input) in self.inputs.iter().zip(inputs) {
            let value = match *input {
                Input::F32 { shape, data } => TensorRef::from_array_view((shape, data))?.into(),
                Input::I64 { shape, data } => TensorRef::from_array_view((shape, data))?.into(),
            };
            values.push((Cow::Borrowed(name.as_str()), value));
        }
        let outputs = self.session.run(values)?;
        let mut copies = Vec::with_capacity(self.outputs.len());
        for (name, expected) in self.outputs.iter().zip(shapes) {
            let (shape, data) = outputs[name.as_str()].try_extract_tensor::<f32>()?;
            if !shape.iter().copied().eq(expected.iter().map(|d| *d as i64)) {
                return Err(GraphError::Shape {
                    name: name.clone(),
                    found: shape.to_vec(),
                    expected: expected.to_vec(),
                });
            }
            copies.push(data.to_vec());
        }
        Ok(copies)
    }
}

fn builder(runtime: &Runtime) -> ort::Result<SessionBuilder> {
    let builder = Session::builder(runtime.environment())?
        .with_execution_providers(runtime.execution_providers())?
        .with_intra_threads(1)?
        .with_inter_threads(1)?
        .with_intra_op_spinning(false)?;
    Ok(builder)
}

fn require(path: &Path, kind: &'static str, required: &[String], found: &[String]) -> Result<(), GraphError> {
    match required.iter().find(|name| !found.contains(name)) {
        None => Ok(()),
        Some(name) => {
            Err(GraphError::Missing { path: path.to_path_buf(), kind, name: name.clone(), found: found.join(", ") })
        }
    }
}
