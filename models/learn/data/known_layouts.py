"""Which data set a folder contains, or two tables that are named: the neutral format, or a public data set."""

from __future__ import annotations

from pathlib import Path

from learn.data import layouts, neutral_layout, sources
from learn.data.dataset import DataError
from learn.data.layouts import Layout
from learn.data.sources import NeutralFiles


def find_layout(source: Path | str | NeutralFiles) -> Layout:
    """Recognises a data set by its file names. Raises `DataError` unless the folder contains exactly one.

    A URL of an object store stands for the tables `interactions` and `items` below it.
    """
    if isinstance(source, str) and sources.is_url(source):
        root = source.rstrip("/")
        source = NeutralFiles(f"{root}/interactions", f"{root}/items")
    if isinstance(source, NeutralFiles):
        return neutral_layout.named(source)
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(folder, None, None, "no such folder")
    found = [layout for find in (neutral_layout.find, *layouts.PUBLIC) if (layout := find(folder)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(layout.name for layout in found)
        raise DataError(folder, None, None, f"more than one data set: {names}; leave only one in the folder")
    reason = (
        "no known data set: expected interactions.csv, .jsonl or .parquet, or a folder `interactions` of such files, "
        "with items in the same formats; MovieLens (ratings.csv with movies.csv, ratings.dat with movies.dat, u.data "
        "with u.item); or Amazon reviews (one file of reviews and one meta_ file)"
    )
    raise DataError(folder, None, None, reason)
