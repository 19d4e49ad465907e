"""The types of a data set: a catalogue, and each user's events in order.

`preparation` turns raw files into a prepared folder, and `prepared_folder` opens that folder as a `Dataset` over
memory-mapped arrays. Tests build data sets from arrays of their own.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from learn.data.item_text import ItemText


class DataError(ValueError):
    """Something in an input file is not as the format says; names file, row, column and reason."""

    def __init__(self, path: Path, row: int | None, column: str | None, reason: str) -> None:
        where = ", ".join([str(path), *([f"row {row}"] if row else []), *([f"column {column}"] if column else [])])
        super().__init__(f"{where}: {reason}")
        self._given = (path, row, column, reason)

    def __reduce__(self) -> tuple[type[DataError], tuple[Path, int | None, str | None, str]]:
        """Whole in another process: exceptions are pickled by their text alone otherwise."""
        return DataError, self._given


@dataclass(frozen=True)
class Interaction:
    """A user met an item. `timestamp` in seconds; `value` is what the data set measures: for MovieLens the rating."""

    user: str
    item: str
    timestamp: int
    value: float = 1.0


@dataclass(frozen=True)
class Sequence:
    """One user's events, oldest first: catalogue indices int64 [n], values float32 [n], timestamps int64 [n].

    Timestamps are seconds. A log without them has only an order, and then they are 0, 1, .. n - 1.
    """

    user: str
    items: np.ndarray
    values: np.ndarray
    timestamps: np.ndarray = None  # type: ignore[assignment]  # always an array once made

    def __post_init__(self) -> None:
        if self.timestamps is None:
            object.__setattr__(self, "timestamps", np.arange(len(self.items), dtype=np.int64))


# A list in tests, `PreparedSequences` else, which reads a user's events from disk when they are asked for.
Sequences: TypeAlias = AnySequence[Sequence]


@dataclass(frozen=True)
class Dataset:
    """A catalogue and what users did with it. `sequences` hold indices into `item_ids` and `texts`."""

    item_ids: list[str]
    texts: list[ItemText]
    sequences: Sequences


@dataclass(frozen=True)
class Event:
    """A prediction to make: from `sequences[user].items[:position]`, the item at `position`."""

    user: int
    position: int
