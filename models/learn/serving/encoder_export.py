"""The encoder -> an ONNX model that carries no trace of the machine it was made on; names for the ports of all graphs.

PyTorch's exporter writes it, because encoders have many architectures. Towers and head have one each:
`tower_export` writes them.

Weights go one of three ways. Linked, where the checkpoint's safetensors files hold the same bytes: that format is raw
little-endian behind a header, which is just what ONNX calls external data, so the graph names offsets into it and the
weights are stored once. A weight that the exporter transposed is linked as it lies, and `gemm_rewrite` makes its
products read it that way; where that is not possible a node transposes it, which ONNX Runtime folds when it loads. Else
inline, up to 64 MiB. Else in a file beside the graph, because a protobuf cannot pass 2 GB and is read whole.

On the way the weights lie in a file, never in the protobuf, and are looked at one by one: so a model of many gigabytes
takes the memory that PyTorch and its exporter hold, and little more.

fp16: the graph of a model in fp16 computes in fp16 where the provider can (CUDA); mean and norm stay fp32. On CPUs ONNX
Runtime has no such kernels and computes in fp32 from weights rounded to fp16.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from learn.content.encoder_graph import EncoderGraph
from learn.serving import gemm_rewrite

# The first opset with Gelu, after the one with LayerNormalization: both stay one node each.
OPSET = 20
# Below this a tensor costs less inline than its link does.
LINK_FROM_BYTES = 1024
INLINE_UP_TO_BYTES = 64 << 20
GRAPH, WEIGHTS = "encoder.onnx", "encoder.weights"
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2"}


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


def write_encoder(graph: EncoderGraph, folder: Path, checkpoint: Sequence[Path] = ()) -> None:
    """Writes `encoder.onnx` and whatever holds its weights into `folder`; see `place_weights` for `checkpoint`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        export_encoder(graph, Path(temporary))
        place_weights(Path(temporary), folder, checkpoint)


def export_encoder(graph: EncoderGraph, folder: Path) -> None:
    """`encoder.onnx`, and beside it `encoder.weights` with every weight but the smallest. Needs fp32 or fp16 weights.

    Moves the graph to the CPU. While it runs, PyTorch's exporter holds transposed copies of the matrices in memory.
    """
    dtype = next(graph.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"the encoder is in {dtype}; load it in float32 or float16 to export it")
    # Sizes of 2 or more, because the exporter fixes an axis whose example is 1.
    ids = torch.ones((2, 7), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    program = _program(graph.cpu(), (ids, mask), ENCODER)
    path = folder / GRAPH
    onnx_ir.save(program.model, path, external_data=WEIGHTS, size_threshold_bytes=LINK_FROM_BYTES)
    model = share_equal_weights(strip(onnx.load(path, load_external_data=False)), folder)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(path)


def place_weights(source: Path, folder: Path, checkpoint: Sequence[Path] = ()) -> None:
    """What `export_encoder` wrote into `source` -> a graph in `folder` with its weights where a bundle wants them.

    Of `checkpoint` those safetensors files are copied into `folder` that hold a weight of the graph, byte for byte.
    """
    model = onnx.load(source / GRAPH, load_external_data=False)
    for weights in link(model, [file for file in checkpoint if file.suffix == ".safetensors"], source):
        shutil.copyfile(weights, folder / weights.name)
    _place_the_rest(model, source, folder)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    # By its path, so that the weights need not fit into one protobuf.
    onnx.checker.check_model(folder / GRAPH)


def _program(graph: EncoderGraph, example: tuple[torch.Tensor, ...], signature: Signature) -> torch.onnx.ONNXProgram:
    dims = {name: torch.export.Dim(name) for axes in signature.axes for name in axes}
    shapes = tuple({axis: dims[name] for axis, name in enumerate(axes)} for axes in signature.axes)
    # The exporter reports its stages on stdout and warns of its own internals; neither is for our reader.
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.eval(),
            example,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise ValueError("PyTorch's exporter gave no graph")
    return program


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


def share_equal_weights(model: ModelProto, folder: Path) -> ModelProto:
    """Keeps one of several equal initializers: the exporter writes a transposed weight once for every use of it.

    `folder` is where the weights that are not inline lie.
    """
    first: dict[tuple[tuple[int, ...], str, bytes], str] = {}
    replaced = {}
    kept = []
    for tensor in model.graph.initializer:
        name = first.setdefault(_key(_array(tensor, folder)), tensor.name)
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

    file: Path
    offset: int
    length: int


def link(model: ModelProto, checkpoint: Sequence[Path], folder: Path) -> list[Path]:
    """Replaces weights by links into safetensors files, each to lie in the same folder as the model.

    Returns the files that were linked into. `folder` is where the weights that are not inline lie now.
    """
    spans = {key: span for path in checkpoint for key, span in _spans(path)}
    transposes, linked = [], []
    for tensor in model.graph.initializer:
        array = _array(tensor, folder)
        if array.nbytes < LINK_FROM_BYTES:
            continue
        if span := spans.get(_key(array)):
            _link_tensor(tensor, span)
        elif array.ndim == 2 and (span := spans.get(_key(array.T))):
            name, stored = tensor.name, f"{tensor.name}.stored"
            transposes.append(helper.make_node("Transpose", [stored], [name], name=f"{name}.transpose", perm=[1, 0]))
            del tensor.dims[:]
            tensor.name = stored
            tensor.dims.extend(array.T.shape)
            _link_tensor(tensor, span)
        else:
            continue
        linked.append(span.file)
    nodes = [*transposes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    gemm_rewrite.read_weights_as_stored(model)
    return sorted(set(linked))


def _array(tensor: TensorProto, folder: Path) -> np.ndarray:
    return numpy_helper.to_array(tensor, base_dir=str(folder))


def _key(array: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    # The shape is the array's own: numpy makes a contiguous scalar one-dimensional.
    return array.shape, array.dtype.str, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _link_tensor(tensor: TensorProto, span: Span) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", span.file.name), ("offset", span.offset), ("length", span.length)):
        tensor.external_data.add(key=key, value=str(value))


def _spans(weights: Path) -> Iterator[tuple[tuple[tuple[int, ...], str, bytes], Span]]:
    """Reads a safetensors file: u64 header length, JSON header, then the tensors' bytes."""
    with weights.open("rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
    raw = np.memmap(weights, dtype=np.uint8, mode="r")
    data = 8 + header_length
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _NUMPY_TYPES:
            continue
        begin, end = (data + offset for offset in entry["data_offsets"])
        # A view of the file's bytes may begin at any address, and numpy takes that.
        array = raw[begin:end].view(_NUMPY_TYPES[entry["dtype"]]).reshape(tuple(entry["shape"]))
        yield _key(array), Span(weights, begin, end - begin)


def _place_the_rest(model: ModelProto, source: Path, folder: Path) -> None:
    """Moves weights that were not linked out of `source`: inline if they are few, else into a file in `folder`."""
    rest = [tensor for tensor in model.graph.initializer if _location(tensor) == WEIGHTS]
    if sum(_n_bytes(tensor) for tensor in rest) <= INLINE_UP_TO_BYTES:
        for tensor in rest:
            tensor.CopyFrom(numpy_helper.from_array(_array(tensor, source), tensor.name))
        return
    path, offset = folder / WEIGHTS, 0
    with path.open("wb") as file:
        for tensor in rest:
            file.write(np.ascontiguousarray(_array(tensor, source)).data)
            _link_tensor(tensor, Span(path, offset, _n_bytes(tensor)))
            offset += _n_bytes(tensor)


def _location(tensor: TensorProto) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def _n_bytes(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
