"""The server's gRPC contract for Python: stubs generated from ../proto, and tensors as numpy arrays."""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from grpc_tools import protoc

from learn.data.item_text import ItemText

PROTO = Path(__file__).parents[3] / "proto"
FILE = "midemb/v1/midemb.proto"
# As the enum DType numbers them.
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f2"), 3: np.dtype(ml_dtypes.bfloat16)}
DTYPE_NUMBERS = {"f32": 1, "f16": 2, "bf16": 3}


@functools.cache
def stubs() -> tuple[ModuleType, ModuleType]:
    """The modules of messages and of services; generated once a process, into a temporary folder."""
    if not (PROTO / FILE).is_file():
        raise FileNotFoundError(f"{PROTO / FILE} is missing: the stubs are generated from it")
    folder = tempfile.mkdtemp(prefix="midemb-stubs-")
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", FILE]
    if protoc.main(arguments) != 0:
        raise ValueError(f"no stubs can be generated from {PROTO / FILE}")
    sys.path.insert(0, folder)
    return importlib.import_module("midemb.v1.midemb_pb2"), importlib.import_module("midemb.v1.midemb_pb2_grpc")


def item(identifier: str, text: ItemText) -> Any:
    """An `Item` with its text."""
    messages, _services = stubs()
    return messages.Item(id=identifier, text=messages.ItemText(**text.to_json()))


def array(tensor: Any) -> np.ndarray:
    """A `Tensor` as fp32 of its shape; raises ValueError where its bytes are not what dtype and shape say."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"a tensor of the answer has the dtype {tensor.dtype}, expected one of {sorted(DTYPES)}")
    shape = tuple(tensor.shape)
    if len(tensor.data) != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"a tensor of the answer has {len(tensor.data)} bytes for {list(shape)} of {dtype}")
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape).astype(np.float32)
