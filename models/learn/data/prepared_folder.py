"""The prepared folder, which `prepare` writes and every later step reads without loading the log into memory.

    items.npy       int32 [n]    catalogue index of each event; events are grouped by user, oldest first
    values.npy      float32 [n]
    timestamps.npy  int64 [n]    seconds; 0, 1, .. within a user if the log has no timestamps
    actions.npy     uint8 [n]    0 if not known, else 1 + the position in `learn.data.actions.ACTIONS`; there is no such
                                 file if the log has no column of actions
    offsets.npy     int64 [U+1]  the events of user u are offsets[u] : offsets[u + 1]
    users.txt       the ids of the users in UTF-8, without separators; users_ends.npy int64 [U] has the byte at which
                    each one ends
    catalogue.jsonl one {"id", "text"} per line, in the order of the indices
    meta.json       counts, settings, and the SHA-256 of each file; written last, so a folder without it is incomplete

Arrays are opened with `mmap_mode="r"`, so a user costs memory only while its `Sequence` is in use. The catalogue is
loaded into memory.
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

from learn.data.actions import ActionThresholds
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
ACTIONS = "actions"
# Events read at once where all are read.
CHUNK = 1 << 20
ARRAYS_OF_SOME_LOGS = {ACTIONS: np.dtype("u1")}
FILES = (*(f"{name}.npy" for name in ARRAYS), USERS, CATALOGUE)


def files(has_actions: bool) -> tuple[str, ...]:
    """The files that meta.json lists."""
    return (*FILES, f"{ACTIONS}.npy") if has_actions else FILES


@dataclass(frozen=True)
class KeywordBoundary:
    """The part of the log that keywords were not counted in. Exactly one field is given.

    `held_out`: the last so many events of each user. `cut`: all events from this timestamp on.
    """

    held_out: int | None = None
    cut: int | None = None

    def __str__(self) -> str:
        return f"each user's last {self.held_out} events" if self.cut is None else f"events from {self.cut} on"


@dataclass(frozen=True)
class Prepared:
    """The content of meta.json. `digest` is a SHA-256 over the digests of all files: if equal, so is the data."""

    layout: str
    n_users: int
    n_items: int
    n_events: int
    has_timestamps: bool
    digest: str
    has_actions: bool = False
    # False: the log has no column of values, and all values are 1.
    has_values: bool = True
    # The unit in which the file has timestamps; those of the prepared folder are in seconds.
    timestamp_unit: str = "seconds"
    # What was left out and how much of it, e.g. {"events of items without text": 12}.
    dropped: dict[str, int] = field(default_factory=dict)
    keywords: KeywordBoundary | None = None
    config: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of meta.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def __str__(self) -> str:
        left_out = "".join(f"; left out: {count} {what}" for what, count in self.dropped.items() if count)
        counts = f"{self.n_users} users, {self.n_items} items, {self.n_events} events"
        unit = "" if self.timestamp_unit == "seconds" else f"; timestamps were read as {self.timestamp_unit}"
        return f"{counts} ({self.layout}{left_out}{unit}); digest {self.digest[:12]}"


class PreparedSequences(AnySequence[Sequence]):
    """The users of a prepared folder, each read from disk on access. `meta` must be that folder's own.

    Where the log has no actions, they are those that `thresholds` read from its values.
    """

    def __init__(self, folder: Path, meta: Prepared, thresholds: ActionThresholds | None = None) -> None:
        self.folder, self.meta = folder, meta
        self.thresholds = (thresholds or ActionThresholds()) if meta.has_values else ActionThresholds()
        names = (*ARRAYS, ACTIONS) if meta.has_actions else ARRAYS
        self.arrays = {name: _open_array(folder, name) for name in names}
        self._user_ids = np.memmap(folder / USERS, dtype=np.uint8, mode="r") if meta.n_users else np.empty(0, np.uint8)

    def __len__(self) -> int:
        return self.meta.n_users

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[user] for user in range(*index.indices(len(self)))]
        # range accepts NumPy integers and negative indices, and raises IndexError out of bounds.
        user = range(len(self))[index]
        begin, end = self.arrays["offsets"][user : user + 2]
        values = np.array(self.arrays["values"][begin:end])
        return Sequence(
            self.user_id(user),
            self.arrays["items"][begin:end].astype(np.int64),
            values,
            np.array(self.arrays["timestamps"][begin:end]),
            np.array(self.arrays[ACTIONS][begin:end]) if self.meta.has_actions else self.thresholds.numbers(values),
        )

    def actions_that_occur(self) -> set[int]:
        """The numbers of the actions of all events; 0 stands for an action that is not known."""
        whole = self.arrays[ACTIONS] if self.meta.has_actions else self.arrays["values"]
        found: set[int] = set()
        for begin in range(0, len(whole), CHUNK):
            part = whole[begin : begin + CHUNK]
            found.update(np.unique(part if self.meta.has_actions else self.thresholds.numbers(part)).tolist())
        return found

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of events of each user, [U]; reads no events."""
        return np.diff(self.arrays["offsets"])

    def user_id(self, user: int) -> str:
        """The id of the user at index `user`."""
        begin = int(self.arrays["users_ends"][user - 1]) if user else 0
        return self._user_ids[begin : self.arrays["users_ends"][user]].tobytes().decode()


def read_meta(folder: Path) -> Prepared:
    """Reads meta.json. Raises `DataError` if the folder is not a prepared one, or is incomplete."""
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


def read_prepared(folder: Path, thresholds: ActionThresholds | None = None) -> Dataset:
    """Loads the catalogue and memory-maps the events. `thresholds` are for a log without actions of its own.

    Raises `DataError` if a shape does not match meta.json; digests are checked by `verify_prepared` only.
    """
    meta = read_meta(folder)
    sequences = PreparedSequences(folder, meta, thresholds)
    shapes = {"offsets": meta.n_users + 1, "users_ends": meta.n_users}
    for name, array in sequences.arrays.items():
        if array.shape != (shapes.get(name, meta.n_events),):
            expected = (shapes.get(name, meta.n_events),)
            reason = f"shape {array.shape}, but meta.json says {expected}; run `learn prepare` again"
            raise DataError(folder / f"{name}.npy", None, None, reason)
    item_ids, texts = [], []
    with (folder / CATALOGUE).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            item_ids.append(record["id"])
            texts.append(ItemText.from_json(record["text"]))
    if len(item_ids) != meta.n_items:
        reason = f"{len(item_ids)} items, but meta.json says {meta.n_items}; run `learn prepare` again"
        raise DataError(folder / CATALOGUE, None, None, reason)
    return Dataset(item_ids, texts, sequences)


def verify_prepared(folder: Path) -> Prepared:
    """Reads every file completely. Raises `DataError` if one differs from what was written."""
    meta = read_meta(folder)
    for name, expected in meta.files.items():
        if file_digest(folder / name) != expected:
            reason = "its SHA-256 is not the one in meta.json; run `learn prepare` again"
            raise DataError(folder / name, None, None, reason)
    return meta


def has_own_actions(dataset: Dataset) -> bool:
    """Whether the log has actions. Those that are read from its values depend only on these and on the thresholds."""
    if isinstance(dataset.sequences, PreparedSequences):
        return dataset.sequences.meta.has_actions
    return any(sequence.actions.any() for sequence in dataset.sequences)


class ArrayWriter:
    """Writes a .npy file of a known length part by part, with only one part in memory."""

    def __init__(self, path: Path, dtype: np.dtype, length: int) -> None:
        self.path, self.dtype, self.left = path, dtype, length
        self.file = path.open("wb")
        header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, part: np.ndarray) -> None:
        """Appends a part, cast to the type of the file."""
        self.left -= len(part)
        self.file.write(part.astype(self.dtype).data)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None and self.left:
            raise ValueError(f"{self.path}: {-self.left:+} entries compared with its header")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(files: dict[str, str]) -> str:
    """One SHA-256 over the digests of all files, independent of the order of the dict."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _open_array(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(path, None, None, str(error)) from error
    expected = (ARRAYS | ARRAYS_OF_SOME_LOGS)[name]
    if array.dtype != expected:
        raise DataError(path, None, None, f"expected {expected}, got {array.dtype}")
    return array
