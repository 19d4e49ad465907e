"""The prepared folder: what `prepare` leaves and every later step reads, without loading the log into memory.

    items.npy       int32 [n]    catalogue index of each event; events lie user by user, oldest first
    values.npy      float32 [n]
    timestamps.npy  int64 [n]    seconds; 0, 1, .. within a user if the log has no timestamps
    offsets.npy     int64 [U+1]  the events of user u are offsets[u] : offsets[u + 1]
    users.txt       the ids of the users, end to end in UTF-8; users_ends.npy int64 [U] says where each one ends
    catalogue.jsonl one {"id", "text"} a line; the line number is the index
    meta.json       counts, settings, and a SHA-256 of each file; written last, so without it the folder does not count

Arrays are opened with `mmap_mode="r"`. A user costs memory only while somebody looks at its `Sequence`; the catalogue
does lie in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as AnySequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from learn.data.dataset import DataError, Dataset, Sequence
from learn.data.item_text import ItemText

FORMAT = "midemb-prepared-1"
META, CATALOGUE, USERS = "meta.json", "catalogue.jsonl", "users.txt"
ARRAYS = {
    "items": np.dtype("<i4"),
    "values": np.dtype("<f4"),
    "timestamps": np.dtype("<i8"),
    "offsets": np.dtype("<i8"),
    "users_ends": np.dtype("<i8"),
}
FILES = (*(f"{name}.npy" for name in ARRAYS), USERS, CATALOGUE)


@dataclass(frozen=True)
class KeywordBoundary:
    """Up to where the log was read for keywords: each user's last `held_out` events are later, or everything from
    the timestamp `cut` on is. Exactly one of them is given."""

    held_out: int | None = None
    cut: int | None = None

    def __str__(self) -> str:
        return f"each user's last {self.held_out} events" if self.cut is None else f"events from {self.cut} on"


@dataclass(frozen=True)
class Prepared:
    """What meta.json says. `digest` is the SHA-256 over the digests of all files: equal digests, equal data."""

    layout: str
    n_users: int
    n_items: int
    n_events: int
    has_timestamps: bool
    digest: str
    # What was left out and why, e.g. {"events of items without text": 12}.
    dropped: dict[str, int] = field(default_factory=dict)
    keywords: KeywordBoundary | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of meta.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def __str__(self) -> str:
        lost = "".join(f"; left out: {count} {what}" for what, count in self.dropped.items() if count)
        counts = f"{self.n_users} users, {self.n_items} items, {self.n_events} events"
        return f"{counts} ({self.layout}{lost}); digest {self.digest[:12]}"


class PreparedSequences(AnySequence[Sequence]):
    """All users of a prepared folder, each read from disk when asked for. `meta` is that folder's own."""

    def __init__(self, folder: Path, meta: Prepared) -> None:
        self.folder, self.meta = folder, meta
        self.arrays = {name: _array(folder, name) for name in ARRAYS}
        self._user_ids = np.memmap(folder / USERS, dtype=np.uint8, mode="r") if meta.n_users else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return self.meta.n_users

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[user] for user in range(*index.indices(len(self)))]
        # operator.index semantics for NumPy integers come with range, and so do its bounds.
        user = range(len(self))[index]
        begin, end = self.arrays["offsets"][user : user + 2]
        return Sequence(
            self.user_id(user),
            self.arrays["items"][begin:end].astype(np.int64),
            np.array(self.arrays["values"][begin:end]),
            np.array(self.arrays["timestamps"][begin:end]),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """[U] events of each user, without reading any of them."""
        return np.diff(self.arrays["offsets"])

    def user_id(self, user: int) -> str:
        """The id of one user."""
        begin = int(self.arrays["users_ends"][user - 1]) if user else 0
        return self._user_ids[begin : self.arrays["users_ends"][user]].tobytes().decode()


def read_meta(folder: Path) -> Prepared:
    """Raises `DataError` if the folder is not a prepared one, or only half of one."""
    path = folder / META
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        reason = "no meta.json: not a prepared folder, or its preparation was interrupted; run `learn prepare`"
        raise DataError(folder, None, None, reason) from error
    except (OSError, ValueError) as error:
        raise DataError(path, None, None, str(error)) from error
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise DataError(path, None, "format", f"expected {FORMAT!r}; run `learn prepare` again")
    boundary = raw.pop("keywords", None)
    try:
        return Prepared(keywords=boundary and KeywordBoundary(**boundary), **raw)
    except TypeError as error:
        raise DataError(path, None, None, str(error)) from error


def read_prepared(folder: Path) -> Dataset:
    """The catalogue in memory, the events memory-mapped. Shapes are checked here, digests by `verify_prepared`."""
    meta = read_meta(folder)
    sequences = PreparedSequences(folder, meta)
    shapes = {"offsets": meta.n_users + 1, "users_ends": meta.n_users}
    for name, array in sequences.arrays.items():
        if array.shape != (shapes.get(name, meta.n_events),):
            expected = (shapes.get(name, meta.n_events),)
            raise DataError(folder / f"{name}.npy", None, None, f"shape {array.shape}, but meta.json says {expected}")
    item_ids, texts = [], []
    with (folder / CATALOGUE).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            item_ids.append(record["id"])
            texts.append(ItemText.from_json(record["text"]))
    if len(item_ids) != meta.n_items:
        raise DataError(folder / CATALOGUE, None, None, f"{len(item_ids)} items, but meta.json says {meta.n_items}")
    return Dataset(item_ids, texts, sequences)


def verify_prepared(folder: Path) -> Prepared:
    """Reads every byte once more; a file that is not what was written is a `DataError`."""
    meta = read_meta(folder)
    for name, expected in meta.files.items():
        if file_digest(folder / name) != expected:
            raise DataError(folder / name, None, None, "its SHA-256 is not the one in meta.json")
    return meta


class ArrayWriter:
    """A .npy file of a known length, written part by part: nothing but the part lies in memory."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self.path, self.dtype, self.left = path, dtype, length
        self.file = path.open("wb")
        header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, part: np.ndarray) -> None:
        """Appends; the part is cast to the file's type."""
        self.left -= len(part)
        self.file.write(part.astype(self.dtype).data)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None and self.left:
            raise ValueError(f"{self.path}: {-self.left} entries more than its header says")


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(files: dict[str, str]) -> str:
    """One SHA-256 for all files, whatever the order of the dict."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _array(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(path, None, None, str(error)) from error
    if array.dtype != ARRAYS[name]:
        raise DataError(path, None, None, f"expected {ARRAYS[name]}, got {array.dtype}")
    return array
