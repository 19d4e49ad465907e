//! The weights of a bundle, once for all threads.
//!
//! Every thread has a session of its own, and every session reads its file's weights and repacks them for its kernels. ONNX
//! Runtime lets sessions share both, but only for weights that are handed to it: so those of matrix products, which
//! are nearly all there is, are read out of the file here. What a graph computes from its weights while it is loaded, a
//! transposed copy for example, is each session's own.

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

/// Weights by their names.
type Weights = Vec<(String, Arc<DynValue>)>;

/// What the sessions of one bundle share.
#[derive(Debug)]
pub struct SharedWeights {
    prepacked: PrepackedWeights,
    /// None where a session has nobody to share with.
    by_file: Option<HashMap<PathBuf, Weights>>,
}

impl SharedWeights {
    /// Nothing read yet. One session of each graph has nobody to share with, and on a GPU weights do not lie in memory.
    pub fn new(runtime: &Runtime, n_sessions: usize) -> Self {
        let has_company = n_sessions > 1 && runtime.provider() == Provider::Cpu;
        SharedWeights { prepacked: PrepackedWeights::new(), by_file: has_company.then(HashMap::new) }
    }

    /// A builder whose session takes the weights of the graph at `path` from here.
    pub(super) fn lend(&mut self, builder: SessionBuilder, path: &Path) -> Result<SessionBuilder, GraphError> {
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

/// Of an ONNX file as much as is needed here; the numbers are those of onnx.proto.
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
/// The operators whose second input ONNX Runtime repacks.
const PRODUCTS: &[&str] = &["MatMul", "Gemm"];

fn read(path: &Path) -> Result<Weights, GraphError> {
    let unreadable = |source: io::Error| GraphError::Weights { path: path.to_path_buf(), source };
    let bytes = fs::read(path).map_err(unreadable)?;
    let invalid = |reason: String| unreadable(io::Error::new(io::ErrorKind::InvalidData, reason));
    let graph = ModelProto::decode(&*bytes).map_err(|error| invalid(error.to_string()))?.graph.unwrap_or_default();
    let products = graph.node.iter().filter(|node| PRODUCTS.contains(&node.op_type.as_str()));
    let wanted: HashSet<&String> = products.filter_map(|node| node.input.get(1)).collect();
    let mut weights = Vec::new();
    for tensor in graph.initializer.iter().filter(|tensor| tensor.data_type == FLOAT && wanted.contains(&tensor.name)) {
        let Some(values) = values(tensor, path).map_err(unreadable)? else { continue };
        let value = Tensor::from_array((tensor.dims.clone(), values))
            .map_err(|source| GraphError::Load { path: path.to_path_buf(), source })?;
        weights.push((tensor.name.clone(), Arc::new(value.into_dyn())));
    }
    Ok(weights)
}

/// The values of a weight, which lie in the graph itself or in another file; none where they lie in neither as bytes.
fn values(tensor: &TensorProto, graph: &Path) -> io::Result<Option<Vec<f32>>> {
    let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| &entry.value);
    let bytes = match entry("location") {
        None => tensor.raw_data.clone(),
        Some(location) => {
            let number = |key: &str| entry(key).map_or(Ok(0), |text| text.parse::<u64>());
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let (offset, length) = (number("offset").map_err(invalid)?, number("length").map_err(invalid)?);
            let file = File::open(graph.with_file_name(location))?;
            if offset.checked_add(length).is_none_or(|end| end > file.metadata().map_or(0, |file| file.len())) {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{location} is too short")));
            }
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, offset)?;
            bytes
        }
    };
    let n_values = tensor.dims.iter().try_fold(1_usize, |n, dim| n.checked_mul(usize::try_from(*dim).ok()?));
    let is_whole = n_values.and_then(|n| n.checked_mul(size_of::<f32>())) == Some(bytes.len());
    Ok(is_whole.then(|| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external(location: &str, offset: &str, length: &str) -> Vec<StringStringEntryProto> {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.to_owned(), value: value.to_owned() };
        vec![entry("location", location), entry("offset", offset), entry("length", length)]
    }

    #[test]
    fn values_are_read_from_the_graph_or_from_the_file_beside_it() {
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
        // A shape that is not the data's is left to ONNX Runtime, which says what it thinks of it.
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
    fn a_file_that_is_no_graph_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), [0xff; 40]).unwrap();
        let error = read(file.path()).unwrap_err().to_string();
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }
}
