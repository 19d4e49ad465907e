"""Raw data sets -> the neutral format -> sequences and splits.

The neutral format is two files in one folder, and every later step reads only these:

    interactions.csv   header `user,item,timestamp,value`; ids are any text, timestamp an integer, value a number
    items.jsonl        one object a line: {"id": "..", "text": {any of the six fields}}

Events are ordered by (user, timestamp, item id); ids made of digits compare as numbers. Many data sets have ties in
time (15.8 % of neighbouring events in ml-latest-small), so without a stable rule the held-out event would depend on
the order of a file.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from learn.item_text import ItemText

INTERACTIONS, ITEMS = "interactions.csv", "items.jsonl"
COLUMNS = ["user", "item", "timestamp", "value"]
Number = TypeVar("Number", int, float)


class DataError(ValueError):
    """Something in an input file is not as the format says; names file, row, column and reason."""

    def __init__(self, path: Path, row: int | None, column: str | None, reason: str) -> None:
        where = ", ".join([str(path), *([f"row {row}"] if row else []), *([f"column {column}"] if column else [])])
        super().__init__(f"{where}: {reason}")


@dataclass(frozen=True)
class Interaction:
    """A user met an item. `value` is what the data set measures: for MovieLens the rating."""

    user: str
    item: str
    timestamp: int
    value: float


@dataclass(frozen=True)
class Sequence:
    """One user's events, oldest first: catalogue indices [n], values [n] and timestamps [n]."""

    user: str
    items: np.ndarray
    values: np.ndarray
    timestamps: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """A catalogue and what users did with it. `sequences` hold indices into `item_ids` and `texts`."""

    item_ids: list[str]
    texts: list[ItemText]
    sequences: list[Sequence]


# --- MovieLens -------------------------------------------------------------------------------------------------------

_ARTICLES = (
    "The|A|An|Le|La|Les|L'|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Den|Det|En|Ett|O|Os|As|Un|Une|Una|Uno|Ein|Eine|De|Het"
)
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*[()]|\s*$)")


def plain_title(title: str) -> str:
    """`Matrix, The (1999)` -> `The Matrix (1999)`, inside brackets too."""

    def swap(match: re.Match[str]) -> str:
        name, article = match.groups()
        return f"{article}{'' if article.endswith(chr(39)) else ' '}{name}"

    return _TRAILING_ARTICLE.sub(swap, title.strip())


def movie_text(title: str, genres: str) -> ItemText:
    """Title and genres; MovieLens knows no brand, price, keywords or attributes."""
    names = [] if genres in ("", "(no genres listed)") else genres.split("|")
    return ItemText(title=plain_title(title), category=", ".join(names))


def read_movielens(folder: Path) -> tuple[list[Interaction], list[tuple[str, ItemText]]]:
    """A MovieLens folder in its original files; the layout is told from the names in it."""
    if (folder / "ratings.csv").is_file():
        return _read_movielens_csv(folder)
    raise DataError(folder, None, None, "no MovieLens layout known here: expected ratings.csv and movies.csv")


def _read_movielens_csv(folder: Path) -> tuple[list[Interaction], list[tuple[str, ItemText]]]:
    items = []
    path = folder / "movies.csv"
    for _row, record in _rows(path, ["movieId", "title", "genres"]):
        items.append((record["movieId"], movie_text(record["title"], record["genres"])))
    interactions = []
    path = folder / "ratings.csv"
    for row, record in _rows(path, ["userId", "movieId", "rating", "timestamp"]):
        timestamp = _number(int, path, row, "timestamp", record["timestamp"])
        value = _number(float, path, row, "rating", record["rating"])
        interactions.append(Interaction(record["userId"], record["movieId"], timestamp, value))
    return interactions, items


# --- the neutral format ----------------------------------------------------------------------------------------------


def write_neutral(interactions: Iterable[Interaction], items: Iterable[tuple[str, ItemText]], folder: Path) -> None:
    """Writes both files; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / INTERACTIONS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((event.user, event.item, event.timestamp, event.value) for event in interactions)
    with (folder / ITEMS).open("w", encoding="utf-8") as file:
        for identifier, text in items:
            given = {name: value for name, value in text.to_json().items() if value}
            file.write(json.dumps({"id": identifier, "text": given}, ensure_ascii=False) + "\n")


def read_neutral(folder: Path) -> Dataset:
    """Both files -> a data set in stable order. Every item of an interaction has to be in the catalogue."""
    item_ids, texts = _read_items(folder / ITEMS)
    index = {identifier: position for position, identifier in enumerate(item_ids)}
    by_user: dict[str, list[Interaction]] = {}
    path = folder / INTERACTIONS
    for row, record in _rows(path, COLUMNS):
        if record["item"] not in index:
            raise DataError(path, row, "item", f"{record['item']!r} is not in {ITEMS}")
        timestamp = _number(int, path, row, "timestamp", record["timestamp"])
        value = _number(float, path, row, "value", record["value"])
        by_user.setdefault(record["user"], []).append(Interaction(record["user"], record["item"], timestamp, value))
    return Dataset(item_ids, texts, [_sequence(by_user[user], index) for user in sorted(by_user, key=_id_order)])


def _read_items(path: Path) -> tuple[list[str], list[ItemText]]:
    found: dict[str, ItemText] = {}
    for row, line in enumerate(_open(path), start=1):
        try:
            record = json.loads(line)
            identifier, text = record["id"], ItemText.from_json(record["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(path, row, None, f'expected {{"id", "text"}}: {error}') from error
        if identifier in found:
            raise DataError(path, row, "id", f"{identifier!r} stands here a second time")
        if text.is_empty:
            raise DataError(path, row, "text", f"{identifier!r} has no text at all, so nothing can be encoded")
        found[identifier] = text
    return list(found), list(found.values())


def _sequence(events: list[Interaction], index: dict[str, int]) -> Sequence:
    events = sorted(events, key=lambda event: (event.timestamp, _id_order(event.item)))
    items = np.array([index[event.item] for event in events], dtype=np.int64)
    values = np.array([event.value for event in events], dtype=np.float32)
    return Sequence(events[0].user, items, values, np.array([event.timestamp for event in events], dtype=np.int64))


def _id_order(identifier: str) -> tuple[float, str]:
    return (int(identifier), identifier) if identifier.isdecimal() else (float("inf"), identifier)


def _open(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from file
    except OSError as error:
        raise DataError(path, None, None, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise DataError(path, None, None, f"not UTF-8 at byte {error.start}") from error


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Records of a CSV file with their row number, where the header is row 1."""
    reader = csv.DictReader(_open(path))
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError(path, 1, missing[0], f"the header lacks it; it has {reader.fieldnames}")
    for row, record in enumerate(reader, start=2):
        absent = [name for name in columns if not record[name]]
        if absent:
            raise DataError(path, row, absent[0], "empty")
        yield row, record


def _number(kind: type[Number], path: Path, row: int, column: str, raw: str) -> Number:
    try:
        value = kind(raw)
    except ValueError as error:
        raise DataError(path, row, column, f"expected a number, got {raw!r}") from error
    if not np.isfinite(value):
        raise DataError(path, row, column, f"expected a finite number, got {raw!r}")
    return value


# --- splits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A prediction to make: from `sequences[user].items[:position]`, the item at `position`."""

    user: int
    position: int


@dataclass(frozen=True)
class SplitConfig:
    """How many of each user's last events are held out: the newest for the test, those before for validation."""

    n_test: int = 1
    n_validation: int = 1


@dataclass(frozen=True)
class Split:
    """Training may read the first `n_train[u]` events of user u, and nothing after them."""

    n_train: list[int]
    validation: list[Event]
    test: list[Event]


def split(sequences: list[Sequence], config: SplitConfig) -> Split:
    """Holds out the last events of each user. Users too short to keep one event for training are not held out from."""
    n_train, validation, test = [], [], []
    held_out = config.n_test + config.n_validation
    for user, sequence in enumerate(sequences):
        n_items = len(sequence.items)
        if n_items <= held_out:
            n_train.append(n_items)
            continue
        first_test = n_items - config.n_test
        n_train.append(n_items - held_out)
        validation += [Event(user, position) for position in range(n_items - held_out, first_test)]
        test += [Event(user, position) for position in range(first_test, n_items)]
    return Split(n_train, validation, test)
