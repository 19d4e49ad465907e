//! One ONNX graph, ready to run on one thread.

use super::{Runtime, SharedWeights};
use ort::{
    session::{Session, SessionInputValue, builder::SessionBuilder},
    value::TensorRef,
};
use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// A graph cannot be loaded or run.
#[derive(Debug, Error)]
pub enum GraphError {
    /// ONNX Runtime refuses the file.
    #[error("{} cannot be loaded: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ort::Error,
    },
    /// Its weights cannot be read.
    #[error("{} cannot be loaded: its weights cannot be read: {source}", path.display())]
    Weights {
        /// The graph's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The graph lacks an input or output that the manifest names.
    #[error("{} has no {kind} named {name:?} (it has: {found})", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// "input" or "output".
        kind: &'static str,
        /// As the manifest has it.
        name: String,
        /// What there is.
        found: String,
    },
    /// A run failed.
    #[error("graph run: {0}")]
    Run(#[from] ort::Error),
    /// An output has another shape than the manifest promises.
    #[error("output {name:?} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The output.
        name: String,
        /// As computed.
        found: Vec<i64>,
        /// As promised.
        expected: Vec<usize>,
    },
    /// The manifest names another number of outputs than the server reads.
    #[error("graph gives {found} outputs, expected {expected}")]
    OutputCount {
        /// As the manifest names.
        found: usize,
        /// As the server reads.
        expected: usize,
    },
}

/// One input tensor, borrowed for the run.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Single precision.
    F32 {
        /// Row-major dimensions.
        shape: &'a [usize],
        /// As many values as the shape says.
        data: &'a [f32],
    },
    /// Ids, masks and row numbers.
    I64 {
        /// Row-major dimensions.
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
    /// Loads the graph at `path`. It runs on the calling thread alone (intra-op 1, no spinning): parallelism is the
    /// pool's.
    pub fn load(
        runtime: &Runtime,
        weights: &mut SharedWeights,
        path: &Path,
        inputs: &[String],
        outputs: &[String],
    ) -> Result<Self, GraphError> {
        let failed = |source| GraphError::Load { path: path.to_path_buf(), source };
        let mut builder = weights.lend(builder(runtime).map_err(failed)?, path)?;
        let session = builder.commit_from_file(path).map_err(failed)?;
        let names = |outlets: &[ort::value::Outlet]| outlets.iter().map(|o| o.name().to_owned()).collect::<Vec<_>>();
        require(path, "input", inputs, &names(session.inputs()))?;
        require(path, "output", outputs, &names(session.outputs()))?;
        Ok(Graph { session, inputs: inputs.to_vec(), outputs: outputs.to_vec() })
    }

    /// Runs the graph and copies its outputs out, each checked against its expected shape.
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

fn require(path: &Path, kind: &'static str, wanted: &[String], found: &[String]) -> Result<(), GraphError> {
    match wanted.iter().find(|name| !found.contains(name)) {
        None => Ok(()),
        Some(name) => {
            Err(GraphError::Missing { path: path.to_path_buf(), kind, name: name.clone(), found: found.join(", ") })
        }
    }
}
