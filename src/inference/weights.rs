//! The weights of a bundle, shared by all threads.
//!
//! Every thread has its own session, and by default every session reads its file's weights and repacks them for its kernels.
//! ONNX Runtime lets sessions share both, but only for weights that it is given. So the weights of matrix products, which are
//! nearly all of them, are read from the file here. Tensors that a graph computes from its weights while it loads, such as
//! transposed copies, are not shared.

use super::{GraphError, Provider, Runtime};
use ort::{
    session::builder::{PrepackedWeights, SessionBuilder},
    value::{DynValue, Tensor},
};
use prost::Message;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Weights and their names.
type Weights = Vec<(String, Arc<DynValue>)>;

/// The weights that the sessions of one bundle share.
#[derive(Debug)]
pub struct SharedWeights {
    prepacked: PrepackedWeights,
    /// The weights by graph file; `None` if nothing is shared.
    by_file: Option<HashMap<PathBuf, Weights>>,
}

impl SharedWeights {
    /// Creates an empty collection. Nothing is shared if there is one session per graph, or on a GPU, whose weights are not in
    /// main memory.
    pub fn new(runtime: &Runtime, n_sessions: usize) -> Self {
        let is_shared = n_sessions > 1 && runtime.provider() == Provider::Cpu;
        SharedWeights { prepacked: PrepackedWeights::new(), by_file: is_shared.then(HashMap::new) }
    }

    /// Adds the weights of the graph at `path` to the builder of a session.
    pub(super) fn add_to(&mut self, builder: SessionBuilder, path: &Path) -> Result<SessionBuilder, GraphError> {
        let failed = |source| GraphError::Load { path: path.to_path_buf(), source };
        let mut builder = builder.with_prepacked_weights(&self.prepacked).map_err(|error| failed(error.into()))?;
        let Some(by_file) = &mut self.by_file else { return Ok(builder) };
        if !by_file.contains_key(path) {
            by_file.insert(path.to_path_buf(), read(path)?);
        }
        for (name, weight) in by_file.get(path).into_iter().flatten() {
            builder = builder.with_initializer(name, Arc::clone(weight)).map_err(|error| failed(error.into()))?;
        }
        Ok(builder)
    }
}

/// The parts of an ONNX file that are needed here. The tags are those of onnx.proto.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, tag = "4")]
    op_type: String,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<StringStringEntryProto>,
}

#[derive(Clone, PartialEq, Message)]
struct StringStringEntryProto {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// `TensorProto.DataType.FLOAT`
const FLOAT: i32 = 1;
/// The operators whose second input ONNX Runtime repacks for its kernels.
const PRODUCTS: &[&str] = &["MatMul", "Gemm"];

fn read(path: &Path) -> Result<Weights, GraphError> {
    let unreadable = |source: io::Error| GraphError::Weights { path: path.to_path_buf(), source };
    let bytes = fs::read(path).map_err(unreadable)?;
    let invalid = |reason: String| unreadable(io::Error::new(io::ErrorKind::InvalidData, reason));
    let graph = ModelProto::decode(&*bytes).map_err(|error| invalid(error.to_string()))?.graph.unwrap_or_default();
    let products = graph.node.iter().filter(|node| PRODUCTS.contains(&node.op_type.as_str()));
    let shared: HashSet<&String> = products.filter_map(|node| node.input.get(1)).collect();
    let mut weights = Vec::new();
    for tensor in graph.initializer.iter().filter(|tensor| tensor.data_type == FLOAT && shared.contains(&tensor.name)) {
        let Some(values) = values(tensor, path).map_err(unreadable)? else { continue };
        let value = Tensor::from_array((tensor.dims.clone(), values))
            .map_err(|source| GraphError::Load { path: path.to_path_buf(), source })?;
        weights.push((tensor.name.clone(), Arc::new(value.into_dyn())));
    }
    Ok(weights)
}

/// The values of a weight, from the graph itself or from another file; `None` if neither holds them as raw bytes.
fn values(tensor: &TensorProto, graph: &Path) -> io::Result<Option<Vec<f32>>> {
    let bytes = match external_entry(tensor, "location") {
        Some(location) => external_bytes(tensor, &graph.with_file_name(location))?,
        None => tensor.raw_data.clone(),
    };
    let n_values = tensor.dims.iter().try_fold(1_usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?));
    let n_bytes = n_values.and_then(|n| n.checked_mul(size_of::<f32>()));
    if n_bytes != Some(bytes.len()) {
        return Ok(None);
    }
    Ok(Some(bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect()))
}

fn external_entry<'a>(tensor: &'a TensorProto, key: &str) -> Option<&'a str> {
    tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
}

fn external_bytes(tensor: &TensorProto, path: &Path) -> io::Result<Vec<u8>> {
    let number = |key: &str| match external_entry(tensor, key) {
        Some(text) => text.parse::<u64>().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error)),
        None => Ok(0),
    };
    let (offset, length) = (number("offset")?, number("length")?);
    let file = File::open(path)?;
    let n_file_bytes = file.metadata().map_or(0, |file| file.len());
    if offset.checked_add(length).is_none_or(|end| end > n_file_bytes) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{} is too short", path.display())));
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external(location: &str, offset: &str, length: &str) -> Vec<StringStringEntryProto> {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.to_owned(), value: value.to_owned() };
        vec![entry("location", location), entry("offset", offset), entry("length", length)]
    }

    #[test]
    fn values_are_read_from_the_graph_or_from_a_file_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let graph = folder.path().join("graph.onnx");
        let bytes: Vec<u8> = [0.0_f32, 1.0, -2.5, 1e9].iter().flat_map(|x| x.to_le_bytes()).collect();
        fs::write(folder.path().join("weights"), &bytes).unwrap();
        let inside = TensorProto { dims: vec![2, 2], data_type: FLOAT, raw_data: bytes, ..TensorProto::default() };
        assert_eq!(values(&inside, &graph).unwrap(), Some(vec![0.0, 1.0, -2.5, 1e9]));
        let beside = |dims: &[i64], offset, length| {
            let external_data = external("weights", offset, length);
            values(&TensorProto { dims: dims.to_vec(), external_data, ..TensorProto::default() }, &graph)
        };
        assert_eq!(beside(&[2, 1], "4", "8").unwrap(), Some(vec![1.0, -2.5]));
        // If the shape does not match the data, ONNX Runtime reports it.
        for dims in [&[3, 1][..], &[-1, 2], &[i64::MAX, i64::MAX], &[]] {
            assert_eq!(beside(dims, "4", "8").unwrap(), None, "{dims:?}");
        }
        for (offset, length) in [("12", "8"), ("0", "18446744073709551615"), ("18446744073709551615", "8"), ("-4", "8")]
        {
            assert!(beside(&[2, 1], offset, length).is_err(), "{length} bytes at {offset}");
        }
        let nowhere = TensorProto { external_data: external("gone", "0", "4"), ..TensorProto::default() };
        assert!(values(&nowhere, &graph).is_err());
    }

    #[test]
    fn the_error_for_a_file_that_is_not_a_graph_names_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [0xff; 40]).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }
}
