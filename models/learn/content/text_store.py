"""Vectors on disk, addressed by the text that they were computed from, so that a text is encoded only once.

    STORE/NAME.npy          vectors [n,C] of n texts, in the dtype of the store
    STORE/NAME.texts.npy    uint8 [n,16]: the digest of each of these texts

A store belongs to one encoder. NAME is a digest of both files, so a file never changes once it has its name, processes
that write at the same time cannot mix their files up, and a damaged file is found when it is read. The vectors are
written first: a file of them without its texts is not part of the store. Many texts may occur in several shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from learn.atomic_file import replacing

DIGEST_BYTES = 16
# A digest as one value that NumPy can sort. Its bytes at the end may be zero, which an S type ignores in both operands;
# as all digests have the same length, only equal ones compare as equal.
DIGEST = np.dtype(f"S{DIGEST_BYTES}")
TEXTS = ".texts.npy"


class DamagedShard(Exception):
    """A shard whose vectors cannot be read, or are not those that were written."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


def text_digest(text: str) -> bytes:
    """The address of a text."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def as_digests(raw: bytes | bytearray) -> np.ndarray:
    """Digests that were appended to each other -> `DIGEST` [n]."""
    return np.frombuffer(bytes(raw), dtype=DIGEST)


@dataclass(frozen=True)
class Places:
    """Where the vectors of u texts are: `shard` int32 [u] is an index into `names`, or -1; `row` int32 [u]."""

    names: list[str]
    shard: np.ndarray
    row: np.ndarray

    @property
    def is_missing(self) -> np.ndarray:
        """[u]: True for texts that the store lacks."""
        return self.shard < 0

    def by_shard(self, text: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Given the text of each of n items, yields for each shard its name, its items in order, and their rows."""
        shard = self.shard[text]
        order = np.argsort(shard, kind="stable")
        bounds = np.searchsorted(shard[order], np.arange(len(self.names) + 1))
        for number, name in enumerate(self.names):
            items = order[bounds[number] : bounds[number + 1]]
            if len(items):
                yield name, items, self.row[text[items]]


class TextStore:
    """The folder of one encoder's vectors."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype

    def names(self) -> list[str]:
        """The names of all shards."""
        return sorted(path.name.removesuffix(TEXTS) for path in self.folder.glob(f"[!.]*{TEXTS}"))

    def find(self, texts: np.ndarray) -> Places:
        """The places of texts, given as sorted and distinct digests [u]; of the store, one shard is read at a time.

        A shard whose texts cannot be read, or that has no vectors, is passed over.
        """
        names, shard, row = self.names(), np.full(len(texts), -1, np.int32), np.zeros(len(texts), np.int32)
        for number, name in enumerate(names):
            stored = self._texts(name)
            if stored is None or not self.vectors_path(name).is_file():
                continue
            at = np.minimum(np.searchsorted(texts, stored), len(texts) - 1)
            is_wanted = texts[at] == stored
            shard[at[is_wanted]], row[at[is_wanted]] = number, np.flatnonzero(is_wanted)
        return Places(names, shard, row)

    def write(self, texts: np.ndarray, vectors: np.ndarray) -> None:
        """Adds a shard: digests [n] and vectors [n,C]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name, vectors = _name(texts, vectors), np.ascontiguousarray(vectors, self.dtype)
        raw = np.frombuffer(texts.tobytes(), np.uint8).reshape(len(texts), DIGEST_BYTES)
        for path, array in ((self.vectors_path(name), vectors), (self.folder / f"{name}{TEXTS}", raw)):
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, array)

    def read(self, name: str) -> np.ndarray:
        """The vectors of a shard [n,C]. Raises `DamagedShard` if they are not those that were written."""
        try:
            vectors = np.load(self.vectors_path(name))
        except (OSError, ValueError, EOFError) as error:
            raise DamagedShard(name, str(error)) from error
        texts = self._texts(name)
        if texts is None or vectors.dtype != self.dtype or _name(texts, vectors) != name:
            raise DamagedShard(name, "its content is not what was written")
        return vectors

    def remove(self, name: str) -> None:
        """Removes a shard, its texts first."""
        (self.folder / f"{name}{TEXTS}").unlink(missing_ok=True)
        self.vectors_path(name).unlink(missing_ok=True)

    def vectors_path(self, name: str) -> Path:
        """The file of a shard's vectors."""
        return self.folder / f"{name}.npy"

    def _texts(self, name: str) -> np.ndarray | None:
        try:
            raw = np.load(self.folder / f"{name}{TEXTS}")
        except (OSError, ValueError, EOFError):
            return None
        is_index = raw.dtype == np.uint8 and raw.ndim == 2 and raw.shape[1] == DIGEST_BYTES
        return as_digests(raw.tobytes()) if is_index else None


def _name(texts: np.ndarray, vectors: np.ndarray) -> str:
    digest = hashlib.sha256(texts.tobytes())
    digest.update(str(vectors.shape).encode() + np.ascontiguousarray(vectors).data)
    return digest.hexdigest()[:32]
