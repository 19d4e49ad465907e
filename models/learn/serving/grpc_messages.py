"""The server's gRPC contract in Python: stubs generated from proto/, and tensors as numpy arrays."""

from __future__ import annotations

import functools
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from grpc_tools import protoc

from learn.data.item_text import ItemText

PROTO = Path(__file__).parents[3] / "proto"
FILE = "midemb/v1/midemb.proto"
# The keys are the numbers of the enum DType.
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f2"), 3: np.dtype(ml_dtypes.bfloat16)}
# All names of the enum Action begin with it.
ACTION_PREFIX = "ACTION_"
DTYPE_NUMBERS = {"f32": 1, "f16": 2, "bf16": 3}


@functools.cache
def stubs() -> tuple[ModuleType, ModuleType]:
    """Returns the modules of messages and of services, generated once per process in a temporary folder."""
    if not (PROTO / FILE).is_file():
        raise FileNotFoundError(f"{PROTO / FILE} is missing; the stubs are generated from it")
    folder = tempfile.mkdtemp(prefix="midemb-stubs-")
    arguments = ["protoc", f"-I{PROTO}", f"--python_out={folder}", f"--grpc_python_out={folder}", FILE]
    if protoc.main(arguments) != 0:
        raise ValueError(f"the stubs cannot be generated from {PROTO / FILE}")
    sys.path.insert(0, folder)
    return importlib.import_module("midemb.v1.midemb_pb2"), importlib.import_module("midemb.v1.midemb_pb2_grpc")


def item(identifier: str, text: ItemText) -> Any:
    """Returns an `Item` message with the text."""
    messages, _services = stubs()
    return messages.Item(id=identifier, text=messages.ItemText(**text.to_json()))


def action_numbers(names: Sequence[str]) -> list[int]:
    """Converts actions, such as "like" and "unspecified", to numbers of the enum Action."""
    messages, _services = stubs()
    return [messages.Action.Value(f"{ACTION_PREFIX}{name.upper()}") for name in names]


def action_names(numbers: Sequence[int]) -> list[str]:
    """Converts numbers of the enum Action to names; a number that it does not have becomes its digits."""
    messages, _services = stubs()
    known = {value: name.removeprefix(ACTION_PREFIX).lower() for name, value in messages.Action.items()}
    return [known.get(number, str(number)) for number in numbers]


def array(tensor: Any) -> np.ndarray:
    """Converts a `Tensor` to an fp32 array; raises ValueError if its bytes do not match its dtype and shape."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"a tensor in the response has the dtype {tensor.dtype}, expected one of {sorted(DTYPES)}")
    shape = tuple(tensor.shape)
    if len(tensor.data) != int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(
            f"a tensor in the response has {len(tensor.data)} bytes for the shape {list(shape)} of {dtype}"
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape).astype(np.float32)
