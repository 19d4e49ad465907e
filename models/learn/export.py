"""The encoder -> an ONNX model that carries no trace of the machine it was made on; names for the ports of all graphs.

PyTorch's exporter writes it, because encoders are of many shapes. Towers and head are of one: `lean` writes them.

Weights go one of two ways: inline, or linked. Linking is for encoders whose weights the bundle has anyway as a
safetensors file: that format is raw little-endian behind a header, which is just what ONNX calls external data, so the
graph names offsets into it and the weights are stored once. A weight that the exporter transposed is linked as it lies,
and `linear` makes its products read it that way. Where that is not possible a node transposes it, which ONNX Runtime
folds when it loads.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from learn import linear
from learn.graphs import EncoderGraph

# The first opset with Gelu, after the one with LayerNormalization: both stay one node each.
OPSET = 20
# Below this a tensor costs less inline than its link does.
LINK_FROM_BYTES = 1024


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs, and of the axes that may vary."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]


ENCODER = Signature(("input_ids", "attention_mask"), ("content",), (("b", "s"), ("b", "s")))
USER_TOWER = Signature(("content", "mask"), ("user",), (("b", "l"), ("b", "l")))
ITEM_TOWER = Signature(("content",), ("item",), (("n",),))
CVR = Signature(("user", "item", "row"), ("mid_emb", "cvr"), (("b",), ("n",), ("n",)))


def encoder_model(graph: EncoderGraph) -> ModelProto:
    """The encoder. Example sizes are 2 or more, because the exporter fixes an axis whose example is 1."""
    ids = torch.ones((2, 7), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return _export(graph, (ids, mask), ENCODER)


def _export(module: nn.Module, example: tuple[torch.Tensor, ...], signature: Signature) -> ModelProto:
    dims = {name: torch.export.Dim(name) for axes in signature.axes for name in axes}
    shapes = tuple({axis: dims[name] for axis, name in enumerate(axes)} for axes in signature.axes)
    # The exporter reports its stages on stdout and warns of its own internals; neither is for our reader.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    model = share_equal_weights(strip(program.model_proto))
    onnx.checker.check_model(model)
    return model


def strip(model: ModelProto) -> ModelProto:
    """Drops what the exporter notes for its own authors: stack traces, module paths, doc strings, inferred shapes."""
    model.doc_string = ""
    model.producer_version = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string, graph.name = "", "midemb"
    del graph.metadata_props[:]
    del graph.value_info[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]
    return model


def share_equal_weights(model: ModelProto) -> ModelProto:
    """Keeps one of several equal initializers: the exporter writes a transposed weight once for every use of it."""
    first: dict[tuple[tuple[int, ...], str, bytes], str] = {}
    replaced = {}
    kept = []
    for tensor in model.graph.initializer:
        name = first.setdefault(_key(numpy_helper.to_array(tensor)), tensor.name)
        if name == tensor.name:
            kept.append(tensor)
        else:
            replaced[tensor.name] = name
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        renamed = [replaced.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(renamed)
    return model


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in a safetensors file."""

    offset: int
    length: int


def link(model: ModelProto, weights: Path) -> int:
    """Replaces inline weights by links into `weights` (same folder as the model); returns how many were linked."""
    spans = _spans_by_digest(weights)
    transposes = []
    n_linked = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < LINK_FROM_BYTES:
            continue
        if span := spans.get(_key(array)):
            _link_tensor(tensor, weights.name, span)
        elif array.ndim == 2 and (span := spans.get(_key(array.T))):
            name, stored = tensor.name, f"{tensor.name}.stored"
            transposes.append(helper.make_node("Transpose", [stored], [name], name=f"{name}.transpose", perm=[1, 0]))
            del tensor.dims[:]
            tensor.name = stored
            tensor.dims.extend(array.T.shape)
            _link_tensor(tensor, weights.name, span)
        else:
            continue
        n_linked += 1
    nodes = [*transposes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    linear.read_weights_as_stored(model)
    return n_linked


def _key(array: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    # The shape is the array's own: numpy makes a contiguous scalar one-dimensional.
    return array.shape, array.dtype.str, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _link_tensor(tensor: TensorProto, location: str, span: Span) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", span.offset), ("length", span.length)):
        tensor.external_data.add(key=key, value=str(value))


def _spans_by_digest(weights: Path) -> dict[tuple[tuple[int, ...], str, bytes], Span]:
    """Reads a safetensors file: u64 header length, JSON header, then the tensors' bytes."""
    raw = weights.read_bytes()
    (header_length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + header_length])
    data = 8 + header_length
    spans = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, end = (data + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        array = np.frombuffer(raw, dtype="<f4", count=(end - begin) // 4, offset=begin).reshape(shape)
        spans[_key(array)] = Span(begin, end - begin)
    return spans
