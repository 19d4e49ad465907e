//! Extends the graphs of a bundle. The tags are those of onnx.proto. The concatenation of two protobuf messages is their union,
//! so a graph is extended by appending to its file.

use crate::harness::BrokenBundle;
use prost::Message;

#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, optional, tag = "7")]
    graph: Option<Graph>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Graph {
    #[prost(message, repeated, tag = "1")]
    pub(crate) node: Vec<Node>,
    #[prost(message, repeated, tag = "5")]
    pub(crate) initializer: Vec<Tensor>,
    #[prost(message, repeated, tag = "12")]
    pub(crate) output: Vec<Outlet>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Node {
    #[prost(string, repeated, tag = "1")]
    pub(crate) input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(crate) output: Vec<String>,
    #[prost(string, tag = "4")]
    pub(crate) op_type: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Tensor {
    #[prost(int64, repeated, tag = "1")]
    pub(crate) dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub(crate) data_type: i32,
    #[prost(int64, repeated, tag = "7")]
    pub(crate) int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    pub(crate) name: String,
    #[prost(message, repeated, tag = "13")]
    pub(crate) external_data: Vec<Entry>,
    #[prost(int32, tag = "14")]
    pub(crate) data_location: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Entry {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(string, tag = "2")]
    pub(crate) value: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Outlet {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
}

/// `TensorProto.DataType.FLOAT`
pub(crate) const FLOAT: i32 = 1;
/// `TensorProto.DataType.INT64`
pub(crate) const INT64: i32 = 7;

pub(crate) fn node(op_type: &str, input: &[&str], output: &str) -> Node {
    let input = input.iter().map(|name| (*name).to_owned()).collect();
    Node { op_type: op_type.to_owned(), input, output: vec![output.to_owned()] }
}

/// Adds nodes, initializers and outputs to a graph of the bundle.
pub(crate) fn append(bundle: &BrokenBundle, file: &str, graph: Graph) {
    let mut bytes = std::fs::read(bundle.path(file)).unwrap();
    bytes.extend(Model { graph: Some(graph) }.encode_to_vec());
    bundle.replace(file, &bytes);
}
