//! What has to be known about an ONNX file before ONNX Runtime gets it: where its weights are.

use prost::Message;
use std::collections::HashSet;

/// The parts of an ONNX file that are needed here. The tags are those of onnx.proto.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "25")]
    functions: Vec<FunctionProto>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(message, repeated, tag = "5")]
    pub(super) initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "15")]
    sparse_initializer: Vec<SparseTensorProto>,
}

#[derive(Clone, PartialEq, Message)]
struct FunctionProto {
    #[prost(message, repeated, tag = "7")]
    node: Vec<NodeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeProto {
    #[prost(message, optional, tag = "5")]
    t: Option<TensorProto>,
    #[prost(message, optional, tag = "6")]
    g: Option<GraphProto>,
    #[prost(message, repeated, tag = "10")]
    tensors: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    graphs: Vec<GraphProto>,
    #[prost(message, optional, tag = "22")]
    sparse_tensor: Option<SparseTensorProto>,
    #[prost(message, repeated, tag = "23")]
    sparse_tensors: Vec<SparseTensorProto>,
}

#[derive(Clone, PartialEq, Message)]
struct SparseTensorProto {
    #[prost(message, optional, tag = "1")]
    values: Option<TensorProto>,
    #[prost(message, optional, tag = "2")]
    indices: Option<TensorProto>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TensorProto {
    #[prost(int64, repeated, tag = "1")]
    pub(super) dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub(super) data_type: i32,
    #[prost(string, tag = "8")]
    pub(super) name: String,
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<StringStringEntryProto>,
    #[prost(int32, tag = "14")]
    data_location: i32,
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
/// `TensorProto.DataLocation.EXTERNAL`
const EXTERNAL: i32 = 1;
/// The operators whose second input ONNX Runtime repacks for its kernels.
const PRODUCTS: &[&str] = &["MatMul", "Gemm"];

/// Reads the main graph of an ONNX file. Only its initializers may be in other files.
pub(super) fn parse(bytes: &[u8]) -> Result<GraphProto, String> {
    let model = ModelProto::decode(bytes).map_err(|error| format!("it is no ONNX file: {error}"))?;
    let graph = model.graph.unwrap_or_default();
    let nodes = graph.node.iter().chain(model.functions.iter().flat_map(|function| &function.node));
    let is_elsewhere = nodes.flat_map(|node| &node.attribute).any(attribute_is_external)
        || graph.sparse_initializer.iter().any(sparse_is_external);
    if is_elsewhere {
        return Err("a tensor inside one of its nodes is in another file, only initializers may be".to_owned());
    }
    Ok(graph)
}

fn attribute_is_external(attribute: &AttributeProto) -> bool {
    attribute.t.iter().chain(&attribute.tensors).any(is_external)
        || attribute.g.iter().chain(&attribute.graphs).any(graph_is_external)
        || attribute.sparse_tensor.iter().chain(&attribute.sparse_tensors).any(sparse_is_external)
}

fn graph_is_external(graph: &GraphProto) -> bool {
    graph.initializer.iter().any(is_external)
        || graph.sparse_initializer.iter().any(sparse_is_external)
        || graph.node.iter().flat_map(|node| &node.attribute).any(attribute_is_external)
}

fn sparse_is_external(tensor: &SparseTensorProto) -> bool {
    tensor.values.iter().chain(&tensor.indices).any(is_external)
}

fn is_external(tensor: &TensorProto) -> bool {
    tensor.data_location == EXTERNAL
}

/// Where the data of an initializer is, if it is in another file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ExternalData<'a> {
    pub(super) location: &'a str,
    pub(super) offset: u64,
    pub(super) n_bytes: u64,
}

impl ExternalData<'_> {
    /// The first byte after it. An offset that is too large is not in any file.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(self.n_bytes)
    }
}

/// Where the data of `tensor` is, or `None` if it is in the graph.
pub(super) fn external_data(tensor: &TensorProto) -> Result<Option<ExternalData<'_>>, String> {
    if !is_external(tensor) {
        return Ok(None);
    }
    let name = &tensor.name;
    let entry = |key: &str| tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| &entry.value);
    let number = |key: &str| match entry(key).map(|value| value.parse::<u64>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(error)) => Err(format!("the {key} of {name:?} is not a number: {error}")),
    };
    let location = entry("location").ok_or_else(|| format!("{name:?} is in another file, but no location is given"))?;
    let (offset, length) = (number("offset")?.unwrap_or(0), number("length")?);
    let n_bytes = n_bytes(tensor).ok_or_else(|| format!("the shape or data type of {name:?} is not supported"))?;
    if length.is_some_and(|length| length != n_bytes) {
        return Err(format!("{name:?} has {} bytes, its shape needs {n_bytes}", length.unwrap_or(0)));
    }
    Ok(Some(ExternalData { location, offset, n_bytes }))
}

/// The bytes of a tensor of this shape and type; `None` if the shape is invalid, or the type cannot be in another file.
fn n_bytes(tensor: &TensorProto) -> Option<u64> {
    // The numbers are those of `TensorProto.DataType`.
    let element_bytes: u64 = match tensor.data_type {
        2 | 3 => 1,
        4 | 5 | 10 | 16 => 2,
        1 | 6 | 12 => 4,
        7 | 11 | 13 => 8,
        _ => return None,
    };
    tensor.dims.iter().try_fold(element_bytes, |n, dim| n.checked_mul(u64::try_from(*dim).ok()?))
}

/// The names of the weights that products read.
pub(super) fn products(graph: &GraphProto) -> HashSet<&str> {
    let products = graph.node.iter().filter(|node| PRODUCTS.contains(&node.op_type.as_str()));
    products.filter_map(|node| node.input.get(1)).map(String::as_str).collect()
}

/// The values of a tensor that is in the graph as raw bytes of single precision; `None` if it is not, or does not have its shape.
pub(super) fn own_floats(tensor: &TensorProto) -> Option<Vec<f32>> {
    if tensor.data_type != FLOAT || is_external(tensor) || n_bytes(tensor)? != tensor.raw_data.len() as u64 {
        return None;
    }
    Some(tensor.raw_data.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external(entries: &[(&str, &str)]) -> TensorProto {
        let entry = |(key, value): &(&str, &str)| StringStringEntryProto { key: (*key).into(), value: (*value).into() };
        let external_data = entries.iter().map(entry).collect();
        let name = "weight".to_owned();
        TensorProto {
            dims: vec![2, 2],
            data_type: FLOAT,
            name,
            external_data,
            data_location: EXTERNAL,
            ..Default::default()
        }
    }

    #[test]
    fn where_the_data_of_a_tensor_is() {
        let tensor = external(&[("location", "weights"), ("offset", "8")]);
        let found = external_data(&tensor).unwrap().unwrap();
        assert_eq!((found.location, found.offset, found.end()), ("weights", 8, 24));
        assert_eq!(external_data(&TensorProto::default()), Ok(None));
        let faulty = [
            (vec![("offset", "8")], "no location"),
            (vec![("location", "w"), ("offset", "-4")], "not a number"),
            (vec![("location", "w"), ("length", "12")], "has 12 bytes, its shape needs 16"),
        ];
        for (entries, expected) in faulty {
            let error = external_data(&external(&entries)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        for dims in [vec![-1, 2], vec![i64::MAX, i64::MAX]] {
            assert!(external_data(&TensorProto { dims, ..external(&[("location", "w")]) }).is_err());
        }
        let strings = TensorProto { data_type: 8, ..external(&[("location", "w")]) };
        assert!(external_data(&strings).is_err());
    }

    #[test]
    fn values_in_the_graph_are_read_if_they_have_their_shape() {
        let raw_data: Vec<u8> = [0.0_f32, 1.0, -2.5, 1e9].iter().flat_map(|x| x.to_le_bytes()).collect();
        let tensor = TensorProto { dims: vec![2, 2], data_type: FLOAT, raw_data, ..TensorProto::default() };
        assert_eq!(own_floats(&tensor), Some(vec![0.0, 1.0, -2.5, 1e9]));
        for dims in [vec![3, 1], vec![-1, 2], vec![i64::MAX, i64::MAX], vec![]] {
            assert_eq!(own_floats(&TensorProto { dims, ..tensor.clone() }), None);
        }
    }

    #[test]
    fn only_initializers_may_be_in_other_files() {
        let elsewhere = external(&[("location", "w")]);
        let inner = GraphProto { initializer: vec![elsewhere.clone()], ..GraphProto::default() };
        let attributes = [
            AttributeProto { t: Some(elsewhere.clone()), ..AttributeProto::default() },
            AttributeProto { g: Some(inner), ..AttributeProto::default() },
            AttributeProto {
                sparse_tensor: Some(SparseTensorProto { values: Some(elsewhere.clone()), indices: None }),
                ..AttributeProto::default()
            },
        ];
        for attribute in attributes {
            let node = vec![NodeProto { attribute: vec![attribute], ..NodeProto::default() }];
            let in_graph = GraphProto { node: node.clone(), ..GraphProto::default() };
            let in_function = ModelProto { graph: None, functions: vec![FunctionProto { node }] };
            for model in [ModelProto { graph: Some(in_graph), functions: vec![] }, in_function] {
                assert!(parse(&model.encode_to_vec()).unwrap_err().contains("only initializers"));
            }
        }
        let graph = Some(GraphProto { initializer: vec![elsewhere], ..GraphProto::default() });
        assert_eq!(parse(&ModelProto { graph, functions: vec![] }.encode_to_vec()).unwrap().initializer.len(), 1);
        assert!(parse(&[0xff; 40]).unwrap_err().contains("no ONNX file"));
    }
}
