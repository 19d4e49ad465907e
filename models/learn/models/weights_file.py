"""The weights of a module in one safetensors file, with its sizes and other facts as JSON in the header.

Nothing is unpickled, so a file from anywhere can be read without running code from it. Files of earlier versions, of
PyTorch (.pt), are read with `weights_only=True`, which permits tensors and plain values only.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learn.atomic_file import replacing

SUFFIX, EARLIER_SUFFIX = ".safetensors", ".pt"
# The entry of the header that holds everything but the weights.
ENTRY = "midemb"
# What reading a file may raise that is damaged, or holds something other than weights and facts.
_UNREADABLE = (
    *(RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError),
    *(pickle.UnpicklingError, SafetensorError),
)


def path_in(folder: Path, stem: str) -> Path:
    """The file of this name: as this version writes it, unless there is only one that an earlier version wrote."""
    path, earlier = folder / f"{stem}{SUFFIX}", folder / f"{stem}{EARLIER_SUFFIX}"
    return earlier if earlier.is_file() and not path.is_file() else path


def write(folder: Path, stem: str, module: torch.nn.Module, sizes: Any, facts: dict[str, Any]) -> None:
    """Writes the weights of `module`, its config dataclass `sizes`, and facts that JSON can hold, all atomically."""
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in module.state_dict().items()}
    with replacing(folder / f"{stem}{SUFFIX}") as partial:
        save_file(weights, partial, {ENTRY: json.dumps({"sizes": asdict(sizes)} | facts)})
    (folder / f"{stem}{EARLIER_SUFFIX}").unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The `weights`, the `sizes` and the facts. Raises ValueError with the reason if the file cannot be read."""
    try:
        if path.suffix == EARLIER_SUFFIX:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            weights = saved.pop("weights")
            return plain(saved) | {"weights": weights}
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[ENTRY])
            return facts | {"weights": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    except _UNREADABLE as error:
        raise ValueError(str(error)) from error


def remove(folder: Path, stem: str) -> None:
    """Removes the file of this name, whichever version wrote it."""
    for suffix in (SUFFIX, EARLIER_SUFFIX):
        (folder / f"{stem}{suffix}").unlink(missing_ok=True)


def plain(facts: Any) -> Any:
    """The facts as they are read again: JSON has lists where Python has tuples."""
    return json.loads(json.dumps(facts))
