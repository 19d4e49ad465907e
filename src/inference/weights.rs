//! A graph in memory, and its weights, which all threads share.
//!
//! Nothing that serves reads a file: ONNX Runtime would map weights that are in files of their own into memory, and whoever
//! writes to such a file would change the vectors of the running model, or end the process. So the graph is given to ONNX Runtime
//! as bytes, and each weight that is in another file as a tensor that was read once.
//!
//! Every thread has its own session, and by default every session keeps its own weights and repacks them for its kernels.
//! ONNX Runtime lets sessions share both, but only for weights that it is given. So the weights of matrix products, which are
//! nearly all of them, are given to it, too, if they are in the graph itself. Tensors that a graph computes from its weights while
//! it loads, such as transposed copies, are not shared.

use super::{
    GraphError, Provider, Runtime,
    onnx::{self, ExternalData, GraphProto, TensorProto},
};
use bytemuck::{Pod, cast_slice_mut, zeroed_vec};
use half::{bf16, f16};
use ort::{
    session::builder::{PrepackedWeights, SessionBuilder},
    value::{DynValue, PrimitiveTensorElementType, Tensor},
};
use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// A part of a weights file, and where its bytes go.
#[derive(Debug)]
pub struct Slice<'a> {
    /// Where it begins in the file.
    pub offset: u64,
    /// To be filled with the bytes of the file.
    pub bytes: &'a mut [u8],
}

/// The files from which the weights of one graph may come.
pub trait WeightFiles {
    /// Why a file cannot be read, or the graph is faulty.
    type Error: From<GraphError>;

    /// The size in bytes of the file at `location`, as the graph names it; an error if the graph may not read it.
    fn size(&self, location: &str) -> Result<u64, Self::Error>;

    /// Fills `slices`, which are in the order of their offsets, lie within the file and do not overlap.
    fn read(&self, location: &str, slices: &mut [Slice<'_>]) -> Result<(), Self::Error>;
}

/// The packed weights that the sessions of one bundle share.
#[derive(Debug)]
pub struct SharedWeights {
    prepacked: PrepackedWeights,
    is_shared: bool,
}

impl SharedWeights {
    /// Creates an empty collection. Nothing is shared if there is one session per graph, or on a GPU, whose weights are not in
    /// main memory.
    pub fn new(runtime: &Runtime, n_sessions: usize) -> Self {
        let is_shared = n_sessions > 1 && runtime.provider() == Provider::Cpu;
        SharedWeights { prepacked: PrepackedWeights::new(), is_shared }
    }
}

/// A weight and its name.
type Weight = (String, Arc<DynValue>);

/// A graph with all its weights in memory, from which any number of sessions can be created.
pub struct GraphSource {
    pub(super) path: PathBuf,
    pub(super) bytes: Vec<u8>,
    prepacked: PrepackedWeights,
    /// The weights that were in other files.
    external: Vec<Weight>,
    /// The weights of matrix products that are in the graph itself. They are given to the sessions, which share their packed form.
    products: Vec<Weight>,
}

impl fmt::Debug for GraphSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GraphSource").field("path", &self.path).field("n_bytes", &self.bytes.len()).finish()
    }
}

impl GraphSource {
    /// Reads the graph in `bytes`, and the weights that are in other files. `path` is for messages.
    pub fn new<F: WeightFiles>(
        shared: &SharedWeights,
        path: &Path,
        bytes: Vec<u8>,
        files: &F,
    ) -> Result<Self, F::Error> {
        let graph = onnx::parse(&bytes).map_err(|reason| faulty(path, reason))?;
        let products = if shared.is_shared { onnx::products(&graph) } else { HashSet::new() };
        let external = read_external(&graph, path, files)?;
        let mut weights = Vec::new();
        for tensor in graph.initializer.iter().filter(|tensor| products.contains(tensor.name.as_str())) {
            // If shape and data do not match, ONNX Runtime reports it.
            let Some(values) = onnx::own_floats(tensor) else { continue };
            weights.push((tensor.name.clone(), Arc::new(value(tensor, values, path)?)));
        }
        let prepacked = shared.prepacked.clone();
        Ok(GraphSource { path: path.to_path_buf(), bytes, prepacked, external, products: weights })
    }

    /// Adds the weights to the builder of a session.
    pub(super) fn add_weights(&self, builder: SessionBuilder) -> ort::Result<SessionBuilder> {
        let mut builder = builder.with_prepacked_weights(&self.prepacked)?;
        for (name, weight) in &self.external {
            builder = builder.with_external_initializer(name, Arc::clone(weight))?;
        }
        // Without this, too, every session would copy the weights that were in other files.
        for (name, weight) in self.external.iter().chain(&self.products) {
            builder = builder.with_initializer(name, Arc::clone(weight))?;
        }
        Ok(builder)
    }
}

/// Reads the initializers that are in other files; each file is read once.
fn read_external<F: WeightFiles>(graph: &GraphProto, path: &Path, files: &F) -> Result<Vec<Weight>, F::Error> {
    let mut by_file: BTreeMap<&str, Vec<(ExternalData<'_>, &TensorProto)>> = BTreeMap::new();
    for tensor in &graph.initializer {
        if let Some(data) = onnx::external_data(tensor).map_err(|reason| faulty(path, reason))? {
            by_file.entry(data.location).or_default().push((data, tensor));
        }
    }
    let mut weights = Vec::new();
    for (location, mut tensors) in by_file {
        tensors.sort_by_key(|(data, _)| data.offset);
        check_places(&tensors, files.size(location)?).map_err(|reason| faulty(path, reason))?;
        let mut buffers: Vec<Buffer> = tensors.iter().map(|(data, tensor)| Buffer::new(data, tensor)).collect();
        let slice = |(buffer, (data, _)): (_, &(ExternalData<'_>, _))| Slice {
            offset: data.offset,
            bytes: Buffer::bytes(buffer),
        };
        let mut slices: Vec<Slice<'_>> = buffers.iter_mut().zip(&tensors).map(slice).collect();
        files.read(location, &mut slices)?;
        for (buffer, (_, tensor)) in buffers.into_iter().zip(tensors) {
            weights.push((tensor.name.clone(), Arc::new(buffer.into_value(tensor, path)?)));
        }
    }
    Ok(weights)
}

/// Checks that the tensors, in the order of their offsets, lie within a file of `n_file_bytes` and do not overlap. So they need
/// no more memory than the file has bytes.
fn check_places(tensors: &[(ExternalData<'_>, &TensorProto)], n_file_bytes: u64) -> Result<(), String> {
    let mut end = 0;
    for (data, tensor) in tensors {
        if data.offset < end {
            return Err(format!("{:?} overlaps another tensor in {:?}", tensor.name, data.location));
        }
        end = data.end();
        if end > n_file_bytes {
            let (name, location) = (&tensor.name, data.location);
            return Err(format!("{name:?} ends at byte {end} of {location:?}, which has {n_file_bytes}"));
        }
    }
    Ok(())
}

fn faulty(path: &Path, reason: String) -> GraphError {
    GraphError::Weights { path: path.to_path_buf(), reason }
}

fn value<T>(tensor: &TensorProto, values: Vec<T>, path: &Path) -> Result<DynValue, GraphError>
where
    T: PrimitiveTensorElementType + fmt::Debug + Clone + 'static,
{
    let value = Tensor::from_array((tensor.dims.clone(), values));
    Ok(value.map_err(|source| GraphError::Load { path: path.to_path_buf(), source })?.into_dyn())
}

macro_rules! buffers {
    ($($data_type:literal $variant:ident $type:ty;)*) => {
        /// The values of one tensor, aligned for its type, so that ONNX Runtime can use them where they are. The numbers are
        /// those of `TensorProto.DataType`.
        enum Buffer {
            $($variant(Vec<$type>),)*
        }

        impl Buffer {
            fn new(data: &ExternalData<'_>, tensor: &TensorProto) -> Self {
                fn zeros<T: Pod>(data: &ExternalData<'_>) -> Vec<T> {
                    zeroed_vec(data.n_bytes as usize / size_of::<T>())
                }
                match tensor.data_type {
                    $($data_type => Buffer::$variant(zeros(data)),)*
                    // `external_data` refuses every other type.
                    _ => Buffer::U8(zeros(data)),
                }
            }

            fn bytes(&mut self) -> &mut [u8] {
                match self {
                    $(Buffer::$variant(values) => cast_slice_mut(values),)*
                }
            }

            fn into_value(self, tensor: &TensorProto, path: &Path) -> Result<DynValue, GraphError> {
                match self {
                    $(Buffer::$variant(values) => value(tensor, values, path),)*
                }
            }
        }
    };
}

buffers! {
    1 F32 f32;
    2 U8 u8;
    3 I8 i8;
    4 U16 u16;
    5 I16 i16;
    6 I32 i32;
    7 I64 i64;
    10 F16 f16;
    11 F64 f64;
    12 U32 u32;
    13 U64 u64;
    16 Bf16 bf16;
}
