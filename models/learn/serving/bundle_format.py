"""The bundle format: ports of the graphs, and entries of the manifest.

Nothing here needs PyTorch, so that a bundle can be checked and upgraded where PyTorch is not installed.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

FORMAT = 2
MANIFEST = "manifest.toml"
ORDER = "oldest_first"
Keeps = Literal["all", "liked"]
# Whether a run of the encoder's graph may have several texts.
Batching = Literal["together", "alone"]
# The keys of the manifest that name a file: table and key. The file's part has the name of the table.
USED_FILES = (
    ("encoder", "file"),
    ("encoder", "tokenizer"),
    ("item_tower", "file"),
    ("user_tower", "file"),
    ("cvr", "file"),
    ("golden", "file"),
)


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs, and of its dynamic axes."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]

    def ports(self) -> dict[str, list[str]]:
        """Returns the entries of the graph's table in the manifest."""
        return {"inputs": list(self.inputs), "outputs": list(self.outputs)}


ENCODER = Signature(("input_ids", "attention_mask"), ("content",), (("b", "s"), ("b", "s")))
ITEM_TOWER = Signature(("content",), ("item", "adapted"), (("n",),))
CVR = Signature(("user", "item", "row"), ("mid_emb", "cvr"), (("b",), ("n",), ("n",)))


def user_tower(actions: Sequence[str]) -> Signature:
    """Returns the signature of a user tower that tells these actions apart; without any, it has no input for them."""
    inputs = ("adapted", "mask", "action") if actions else ("adapted", "mask")
    return Signature(inputs, ("user",), (("b", "l"),) * len(inputs))


def history(actions: Sequence[str], keeps: Keeps) -> dict[str, Any]:
    """Returns the manifest's table of what the models were trained on, which callers should send."""
    return {"actions": list(actions), "keeps": keeps, "order": ORDER}


def action_numbers(manifest: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """Converts actions to the user tower's input: 0 for an action that the manifest does not list."""
    known = {name: number for number, name in enumerate(manifest["history"]["actions"], start=1)}
    return [known.get(name, 0) for name in names]


def numbers(values: Any) -> list[float]:
    """Converts an array or tensor [n] of fp32 values to the shortest decimals that parse to the same fp32 values."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, part: str) -> dict[str, Any]:
    """Returns a file's entry in the manifest."""
    return {"path": path.name, "part": part, "bytes": path.stat().st_size, "sha256": sha256(path)}


def parse_manifest(bundle: Path) -> dict[str, Any]:
    """Reads a bundle's manifest of any format; raises FileNotFoundError, or ValueError with the path."""
    path = bundle / MANIFEST
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error


def is_file_name(path: str) -> bool:
    """Whether the path of a manifest is a plain name, of a file directly in the bundle's folder."""
    return path not in ("", ".", "..", MANIFEST) and "/" not in path and "\0" not in path


def check_paths(manifest: Mapping[str, Any], where: Path) -> None:
    """Checks the paths in a manifest of any format, as the server does; `where` is the manifest, for messages.

    Raises ValueError, naming the path, for one that leaves the bundle's folder, is listed twice, is the manifest
    itself, or is used but not listed under its part: digests, and so cache keys, cover only what is listed.
    """
    parts: dict[str, str] = {}
    for entry in manifest.get("files", []):
        path = entry["path"]
        if not _stays_inside(path):
            raise ValueError(f"{where}: the file {path!r} leaves the bundle's folder")
        if path in parts or path == MANIFEST:
            raise ValueError(f"{where}: the file {path!r} is listed twice, or is the manifest itself")
        parts[path] = entry["part"]
    for table, key in USED_FILES:
        path = manifest.get(table, {}).get(key)
        if path not in parts:
            raise ValueError(f"{where}: the file {path!r} ({table}.{key}) is used, but not listed under [[files]]")
        if parts[path] != table:
            raise ValueError(f"{where}: the file {path!r} is listed as part {parts[path]}, but used as {table}")


def batching(manifest: Mapping[str, Any]) -> Batching:
    """Returns whether texts may share runs of the encoder's graph; raises ValueError for another word."""
    found = manifest["encoder"].get("batching", "together")
    if found not in get_args(Batching):
        raise ValueError(f"encoder.batching is {found!r}, but it must be one of {', '.join(get_args(Batching))}")
    return found


def _stays_inside(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path
