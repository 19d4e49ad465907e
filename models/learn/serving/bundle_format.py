"""The bundle format: ports of the graphs, and entries of the manifest.

Nothing here needs PyTorch, so that a bundle can be checked and upgraded where PyTorch is not installed.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from learn.data.actions import ActionThresholds
from learn.serving.tolerances import of_content

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
GRAPHS = ("encoder", "item_tower", "user_tower", "cvr")
TYPES = {str: "a string", int: "an integer", list: "a list of strings", dict: "a table"}
# The keys that a manifest must have, with the type of each: "dim" of the table "cvr" is "cvr.dim".
KEYS: dict[str, type] = {
    "name": str,
    "version": str,
    "item_text.template": str,
    "item_text.max_tokens": int,
    **{f"{table}.{key}": str for table, key in USED_FILES},
    **{f"{graph}.dim": int for graph in GRAPHS},
    **{f"{graph}.{ports}": list for graph in GRAPHS for ports in ("inputs", "outputs")},
    "encoder.pad_id": int,
    "item_tower.adapted_dim": int,
    "user_tower.max_history": int,
    "history.actions": list,
    "history.keeps": str,
    "provenance": dict,
}
SINCE_FORMAT_2 = ("item_tower.adapted_dim", "history.actions", "history.keeps")
FILE_KEYS: dict[str, type] = dict.fromkeys(("path", "part", "sha256"), str)


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


def history(actions: Sequence[str], keeps: Keeps, values: ActionThresholds | None = None) -> dict[str, Any]:
    """Returns the manifest's table of what the models were trained on, which callers should send.

    `values` says how the values of the log became actions, if it had values in place of actions.
    """
    thresholds = {name: value for name, value in asdict(values).items() if value is not None} if values else {}
    return {"actions": list(actions), "keeps": keeps, "order": ORDER, **thresholds}


def thresholds(manifest: Mapping[str, Any]) -> ActionThresholds:
    """Returns how the values of the training log became actions. Raises ValueError for what the server refuses."""
    found = {name: manifest["history"].get(name) for name in ("liked_from", "disliked_to")}
    for name, value in found.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"history.{name} is {value!r}, but it must be a number")
    try:
        return ActionThresholds(**found)
    except ValueError as error:
        raise ValueError(f"history.{error}") from error


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
    """Reads a bundle's manifest of any format; raises FileNotFoundError, or ValueError with the path.

    Of its keys, only `files` is checked, which is an empty list if the manifest lacks it.
    """
    path = bundle / MANIFEST
    try:
        manifest = {"files": [], **tomllib.loads(path.read_text(encoding="utf-8"))}
        if not isinstance(manifest["files"], list):
            raise ValueError(f"files is {manifest['files']!r}, but it must be a list of tables")
        for number, entry in enumerate(manifest["files"], start=1):
            _check_keys(entry, FILE_KEYS, f"in entry {number} of [[files]], ")
    except ValueError as error:  # Also of text that is not UTF-8, or not TOML.
        raise ValueError(f"{path}: {error}") from error
    return manifest


def is_file_name(path: str) -> bool:
    """Whether the path of a manifest is a plain name, of a file directly in the bundle's folder."""
    return path not in ("", ".", "..", MANIFEST) and "/" not in path and "\0" not in path


def check_manifest(manifest: Mapping[str, Any], where: Path) -> None:
    """Checks a manifest of format 1 or 2 and the paths in it, as the server does; `where` is its path, for messages.

    Raises ValueError, naming the key, for one that is missing or of another type, and, naming the path, for one that
    leaves the bundle's folder, is listed twice, is the manifest itself, or is used but not listed under its part:
    digests, and so cache keys, cover only what is listed. Bounds of sizes and names of actions are the server's check.
    """
    is_old = manifest["format"] == 1
    keys = {name: kind for name, kind in KEYS.items() if not (is_old and name in SINCE_FORMAT_2)}
    try:
        _check_keys({"provenance": {}, **manifest}, keys)  # The only one that may be left out.
        batching(manifest)
        of_content(manifest)
        if not is_old:
            thresholds(manifest)
        _check_files(manifest)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(table: Any, keys: Mapping[str, type], where: str = "") -> None:
    for name, kind in keys.items():
        value = table
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, kind) or (kind is list and not all(isinstance(entry, str) for entry in value)):
            found = "missing" if value is None else repr(value)
            raise ValueError(f"{where}{name} is {found}, but it must be {TYPES[kind]}")


def _check_files(manifest: Mapping[str, Any]) -> None:
    parts: dict[str, str] = {}
    for entry in manifest["files"]:
        path = entry["path"]
        if not _stays_inside(path):
            raise ValueError(f"the file {path!r} leaves the bundle's folder")
        if path in parts or path == MANIFEST:
            raise ValueError(f"the file {path!r} is listed twice, or is the manifest itself")
        parts[path] = entry["part"]
    for table, key in USED_FILES:
        path = manifest[table][key]
        if path not in parts:
            raise ValueError(f"the file {path!r} ({table}.{key}) is used, but not listed under [[files]]")
        if parts[path] != table:
            raise ValueError(f"the file {path!r} is listed as part {parts[path]}, but used as {table}")


def batching(manifest: Mapping[str, Any]) -> Batching:
    """Returns whether texts may share runs of the encoder's graph; raises ValueError for another word."""
    found = manifest["encoder"].get("batching", "together")
    if found not in get_args(Batching):
        raise ValueError(f"encoder.batching is {found!r}, but it must be one of {', '.join(get_args(Batching))}")
    return found


def _stays_inside(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path
