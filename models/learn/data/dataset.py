"""The types of a data set: a catalogue, and the events of each user in order.

`preparation` turns raw files into a prepared folder, and `prepared_folder` opens that folder as a `Dataset` over
memory-mapped arrays. Tests build a `Dataset` from arrays in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import TypeAlias

import numpy as np

from learn.data.item_text import ItemText


class DataError(ValueError):
    """An input file violates its format. The message names the file, the row and column if known, and the reason."""

    def __init__(self, path: Path, row: int | None, column: str | None, reason: str) -> None:
        where = ", ".join([str(path), *([f"row {row}"] if row else []), *([f"column {column}"] if column else [])])
        super().__init__(f"{where}: {reason}")
        self._arguments = (path, row, column, reason)

    def __reduce__(self) -> tuple[type[DataError], tuple[Path, int | None, str | None, str]]:
        """Makes the error picklable: by default, `__init__` would be called with the message alone."""
        return DataError, self._arguments


@dataclass(frozen=True)
class Interaction:
    """One event of a log. `timestamp` is in seconds; `value` is what the data set measures, such as a rating.

    `action` is what the user did, one of `learn.data.actions.ACTIONS`, or empty if that is not known.
    """

    user: str
    item: str
    timestamp: int
    value: float = 1.0
    action: str = ""


@dataclass(frozen=True)
class Sequence:
    """One user's events, oldest first: catalogue indices int64 [n], values float32 [n], timestamps int64 [n].

    Timestamps are in seconds. If the log has only an order, they are 0, 1, .. n - 1, which is also the default. Actions
    uint8 [n] are 0 if what the user did is not known, which is the default, else 1 + the position in `ACTIONS`.
    """

    user: str
    items: np.ndarray
    values: np.ndarray
    timestamps: np.ndarray = None  # type: ignore[assignment]  # __post_init__ makes it an array
    actions: np.ndarray = None  # type: ignore[assignment]  # likewise

    def __post_init__(self) -> None:
        if self.timestamps is None:
            object.__setattr__(self, "timestamps", np.arange(len(self.items), dtype=np.int64))
        if self.actions is None:
            object.__setattr__(self, "actions", np.zeros(len(self.items), dtype=np.uint8))


# A list in tests, otherwise `PreparedSequences`, which reads the events of a user from disk on access.
Sequences: TypeAlias = AnySequence[Sequence]


@dataclass(frozen=True)
class Dataset:
    """A catalogue and the events of its users. `sequences` hold indices into `item_ids` and `texts`."""

    item_ids: list[str]
    texts: list[ItemText]
    sequences: Sequences


@dataclass(frozen=True)
class Event:
    """A prediction to make: from `sequences[user].items[:position]`, the item at `position`."""

    user: int
    position: int


@dataclass(frozen=True, eq=False)
class Events(AnySequence[Event]):
    """A list of events that takes 16 bytes per event: `users` and `positions`, int64 [n]. A slice is `Events` again."""

    users: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Events(self.users[index], self.positions[index])
        return Event(int(self.users[index]), int(self.positions[index]))

    def __iter__(self) -> Iterator[Event]:
        return map(Event, self.users.tolist(), self.positions.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnySequence) and len(self) == len(other) and all(map(eq, self, other))
