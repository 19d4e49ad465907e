"""The neutral format, for every data set that has no layout of its own: two tables, in one folder or where you say.

interactions   user,item and optionally timestamp, value and action; other columns are ignored. Without timestamps the
               order of the file counts; whole numbers are seconds, milliseconds, microseconds or nanoseconds, which is
               recognised (`timestamp_unit`). Without values all are 1; an action is one of
               `learn.data.actions.ACTIONS`, or empty if it is not known.
items          one record per item: {"id": "..", "text": {any of the six fields}}, or the fields beside the id; in
               Parquet a struct `text` or columns of those names; in CSV columns of those names, in which `|` stands
               between the entries of a list

Each is .csv, .jsonl (.jsonl.gz) or .parquet: one file, such as interactions.csv, or a folder of files (`sources`).
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from learn.data.actions import ACTIONS
from learn.data.dataset import Dataset, Interaction
from learn.data.item_text import ItemText
from learn.data.preparation import PrepareConfig, build
from learn.data.prepared_folder import read_prepared

INTERACTIONS, ITEMS = "interactions.csv", "items.jsonl"
COLUMNS = ["user", "item", "timestamp", "value"]


def write_neutral(interactions: Iterable[Interaction], items: Iterable[tuple[str, ItemText]], folder: Path) -> None:
    """Writes both files of the neutral format, as CSV and JSON Lines, and creates the folder if needed.

    The log has a column of actions only if at least one event has one.
    """
    events = list(interactions)
    columns = [*COLUMNS, "action"] if any(event.action for event in events) else COLUMNS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / INTERACTIONS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([getattr(event, column) for column in columns] for event in events)
    with (folder / ITEMS).open("w", encoding="utf-8") as file:
        for identifier, text in items:
            given = {name: value for name, value in text.to_json().items() if value}
            file.write(json.dumps({"id": identifier, "text": given}, ensure_ascii=False) + "\n")


def read_neutral(folder: Path, config: PrepareConfig | None = None) -> Dataset:
    """Reads a small data set into memory, by the same steps as a large one: `prepare`, then `read_prepared`.

    Despite the name, the folder may have any layout that `prepare` knows.
    """
    with tempfile.TemporaryDirectory() as work:
        build(folder, Path(work), config or PrepareConfig())
        dataset = read_prepared(Path(work))
        return Dataset(dataset.item_ids, dataset.texts, dataset.sequences[:])


def read_movielens(folder: Path) -> tuple[list[Interaction], list[tuple[str, ItemText]]]:
    """Reads a small data set of any layout as the arguments of `write_neutral`: events, user by user, and items."""
    dataset = read_neutral(folder)
    events = [
        Interaction(sequence.user, dataset.item_ids[item], timestamp, value, ("", *ACTIONS)[action])
        for sequence in dataset.sequences
        for item, timestamp, value, action in zip(
            *(column.tolist() for column in (sequence.items, sequence.timestamps, sequence.values, sequence.actions)),
            strict=True,
        )
    ]
    return events, list(zip(dataset.item_ids, dataset.texts, strict=True))
