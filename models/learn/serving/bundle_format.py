"""The bundle format: ports of the graphs, entries of the manifest, and how a finished folder is put in place.

Nothing here needs PyTorch, so that a bundle can be checked and upgraded where PyTorch is not installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

FORMAT = 2
MANIFEST = "manifest.toml"
ORDER = "oldest_first"
Keeps = Literal["all", "liked"]


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


@contextlib.contextmanager
def placing(out: Path) -> Iterator[Path]:
    """Gives the block an empty folder to write a bundle to, then moves its files to `out`, the manifest last.

    Files that only the previous bundle in `out` had are removed. If the block raises, `out` stays as it was. While the
    files are moved, a reader sees a mixture of both bundles and detects it by the digests.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = _named(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as temporary:
        folder = Path(temporary)
        yield folder
        # The manifest is moved last, because the new files belong to the bundle only once it names them.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(out / path.name)
    for name in before - _named(out):
        (out / name).unlink(missing_ok=True)


def _named(folder: Path) -> set[str]:
    """Returns the files that the manifest in `folder` names; an empty set if there is no manifest."""
    if not (folder / MANIFEST).is_file():
        return set()
    return {Path(entry["path"]).name for entry in parse_manifest(folder).get("files", [])}
