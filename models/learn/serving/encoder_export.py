"""Exports the encoder to ONNX without any trace of the build machine.

PyTorch's exporter writes the encoder, because encoders have many architectures. The towers and the head have one
architecture each, and `tower_export` writes them.

Each weight is stored in one of three ways:
- A link, if the checkpoint's safetensors files hold the same bytes. The format is raw little-endian data behind a
  header, which ONNX accepts as external data, so the graph refers to offsets in it and the weights are stored once. A
  weight that the exporter transposed is linked as it is stored, and `gemm_rewrite` makes its products read it that way;
  where that is not possible, a node transposes it, which ONNX Runtime folds at load time.
- Inline, if the weights that are not linked take up to 64 MiB.
- Otherwise in a file beside the graph, because a protobuf is limited to 2 GB and is read as a whole.

During the export the weights are in a file, never in the protobuf, and are read one by one. A model of many gigabytes
therefore needs little more memory than PyTorch and its exporter take.

The graph of an fp16 model computes in fp16 where the provider can (CUDA); mean and norm stay in fp32. On CPUs ONNX
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
from learn.serving.bundle_format import ENCODER, Signature

# The first opset with Gelu; LayerNormalization came earlier. Each of them stays one node.
OPSET = 20
# A smaller tensor takes less space inline than as a link.
LINK_FROM_BYTES = 1024
INLINE_UP_TO_BYTES = 64 << 20
GRAPH, WEIGHTS = "encoder.onnx", "encoder.weights"
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2"}


def write_encoder(graph: EncoderGraph, folder: Path, checkpoint: Sequence[Path] = ()) -> None:
    """Writes `encoder.onnx` and the files with its weights to `folder`; see `place_weights` for `checkpoint`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        export_encoder(graph, Path(temporary))
        place_weights(Path(temporary), folder, checkpoint)


def export_encoder(graph: EncoderGraph, folder: Path) -> None:
    """Writes `encoder.onnx`, and beside it `encoder.weights` with all but the smallest weights, in fp32 or fp16.

    Moves the graph to the CPU. While it runs, PyTorch's exporter holds transposed copies of the matrices in memory.
    """
    dtype = next(graph.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"the encoder is in {dtype}; load it in float32 or float16 to export it")
    # The example's sizes are 2 or more, because the exporter fixes an axis whose example size is 1.
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
    """Turns the output of `export_encoder` in `source` into a graph in `folder` with its weights placed for a bundle.

    The safetensors files of `checkpoint` that hold a weight of the graph, byte for byte, are copied into `folder`.
    """
    model = onnx.load(source / GRAPH, load_external_data=False)
    for weights in link(model, [file for file in checkpoint if file.suffix == ".safetensors"], source):
        shutil.copyfile(weights, folder / weights.name)
    _place_the_rest(model, source, folder)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    # The check takes the path, so that the weights need not fit into one protobuf.
    onnx.checker.check_model(folder / GRAPH)


def _program(graph: EncoderGraph, example: tuple[torch.Tensor, ...], signature: Signature) -> torch.onnx.ONNXProgram:
    dims = {name: torch.export.Dim(name) for axes in signature.axes for name in axes}
    shapes = tuple({axis: dims[name] for axis, name in enumerate(axes)} for axes in signature.axes)
    # The exporter prints its stages to stdout and warns about its internals; neither helps our user.
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
        raise ValueError("PyTorch's exporter returned no graph")
    return program


def strip(model: ModelProto) -> ModelProto:
    """Removes the exporter's debugging data: stack traces, module paths, doc strings and inferred shapes."""
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
    """Keeps one of several equal initializers, because the exporter writes a transposed weight once per use.

    `folder` holds the weights that are not inline.
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
    """The position of a tensor's bytes in a file."""

    file: Path
    offset: int
    length: int


def link(model: ModelProto, checkpoint: Sequence[Path], folder: Path) -> list[Path]:
    """Replaces weights by links into safetensors files, which must be placed in the model's folder.

    Returns the files that the links point to. `folder` currently holds the weights that are not inline.
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
    # The shape is taken from the array itself, because `ascontiguousarray` makes a scalar one-dimensional.
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
        # A view of the file's bytes may be unaligned, which numpy accepts.
        array = raw[begin:end].view(_NUMPY_TYPES[entry["dtype"]]).reshape(tuple(entry["shape"]))
        yield _key(array), Span(weights, begin, end - begin)


def _place_the_rest(model: ModelProto, source: Path, folder: Path) -> None:
    """Moves the weights that were not linked from `source` into the model or, if large, into a file in `folder`."""
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
