"""Divides a catalogue in files into shards of rows. Each shard can be read alone and always holds the same rows.

A catalogue is one file or a folder of files: JSONL (per line `{"id", "text": {six fields}}`, or the fields beside the
id) or Parquet (columns `id` and any of the six fields, or a column `text` with them). A row that cannot be used is not
an error: it becomes a `Reject` with its position, its id if known, and the reason.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from learn.data import DataError
from learn.data.item_record import record_id, record_text
from learn.data.item_text import LIST_FIELDS, STRING_FIELDS, ItemText
from learn.serving.digests import text_bytes

FIELDS = (*STRING_FIELDS, *LIST_FIELDS)


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one file. `begin` is a byte offset for JSONL and a row number (from 0) for Parquet."""

    number: int
    file: str
    begin: int
    # Rows are numbered from 1, like lines in an editor.
    first_row: int
    n_rows: int


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used, with the reason."""

    file: str
    row: int
    id: str | None
    reason: str

    def to_json(self) -> str:
        """Returns one line of a rejects file."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Item:
    """A usable row and its number in the file."""

    row: int
    id: str
    text: ItemText


def plan(items: Path, shard_rows: int) -> tuple[list[Shard], dict[str, str]]:
    """Returns all shards in order and the SHA-256 of each file. Reads every file in pieces."""
    shards: list[Shard] = []
    digests = {}
    for path in _files(items):
        with path.open("rb") as file:
            digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        starts = _parquet_starts(path, shard_rows) if path.suffix == ".parquet" else _line_starts(path, shard_rows)
        for begin, first_row, n_rows in starts:
            shards.append(Shard(len(shards), str(path), begin, first_row, n_rows))
    if not shards:
        raise DataError(items, None, None, "there are no rows to embed")
    return shards, digests


def _files(items: Path) -> list[Path]:
    found = sorted(path for path in items.iterdir()) if items.is_dir() else [items]
    files = [path for path in found if path.suffix in (".jsonl", ".parquet") and path.is_file()]
    if not files:
        raise DataError(items, None, None, "expected a .jsonl or .parquet file, or a folder of such files")
    return files


def _line_starts(path: Path, shard_rows: int) -> Iterator[tuple[int, int, int]]:
    begin, first_row, n_rows, position = 0, 1, 0, 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            n_rows += 1
            if n_rows == shard_rows:
                yield begin, first_row, n_rows
                begin, first_row, n_rows = position, first_row + n_rows, 0
    if n_rows:
        yield begin, first_row, n_rows


def _parquet_starts(path: Path, shard_rows: int) -> Iterator[tuple[int, int, int]]:
    n_rows = _open_parquet(path).metadata.num_rows
    for begin in range(0, n_rows, shard_rows):
        yield begin, begin + 1, min(shard_rows, n_rows - begin)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(path, None, None, f"not a Parquet file: {error}") from error


def read(shard: Shard, max_text_bytes: int) -> tuple[list[Item], list[Reject]]:
    """Reads the shard and returns its usable rows and its rejects; raises DataError if the file has changed."""
    path = Path(shard.file)
    records = _parquet_records(path, shard) if path.suffix == ".parquet" else _line_records(path, shard)
    items, rejects = [], []
    for row, record in enumerate(records, start=shard.first_row):
        identifier = None
        try:
            if isinstance(record, ValueError):
                raise record
            identifier = _identifier(record)
            items.append(Item(row, identifier, _text(record, max_text_bytes)))
        except ValueError as error:
            rejects.append(Reject(shard.file, row, identifier, str(error)))
    if len(items) + len(rejects) != shard.n_rows:
        raise DataError(
            path, None, None, f"expected {shard.n_rows} rows from row {shard.first_row} on; the file has changed"
        )
    return items, rejects


def _line_records(path: Path, shard: Shard) -> Iterator[Any]:
    """Yields the parsed value of each line, or the error for a line that is not JSON."""
    with path.open("rb") as file:
        file.seek(shard.begin)
        for line in itertools.islice(file, shard.n_rows):
            try:
                yield json.loads(line)
            except ValueError as error:
                yield ValueError(f"not JSON: {error}")


def _parquet_records(path: Path, shard: Shard) -> Iterator[Any]:
    file = _open_parquet(path)
    wanted = [name for name in ("id", "text", *FIELDS) if name in file.schema_arrow.names]
    if "id" not in wanted or len(wanted) == 1:
        raise DataError(path, None, "id", f"expected id and text fields, but the columns are {file.schema_arrow.names}")
    position = 0
    for group in range(file.num_row_groups):
        n_rows = file.metadata.row_group(group).num_rows
        first, last = max(shard.begin - position, 0), min(shard.begin + shard.n_rows - position, n_rows)
        if first < last:
            yield from file.read_row_group(group, columns=wanted).slice(first, last - first).to_pylist()
        position += n_rows


def _identifier(record: Any) -> str:
    if not isinstance(record, Mapping):
        raise ValueError(f"expected an object, got {type(record).__name__}")
    try:
        identifier = record_id(record)
    except ValueError as error:
        raise ValueError(f"id: {error}") from error
    _check_encodable("id", identifier)
    return identifier


def _text(record: Mapping[str, Any], max_text_bytes: int) -> ItemText:
    text = record_text(record)
    if text.is_empty:
        raise ValueError("all text fields are empty")
    for name in STRING_FIELDS:
        _check_encodable(name, getattr(text, name))
    for name in LIST_FIELDS:
        for entry in getattr(text, name):
            _check_encodable(name, entry)
    if (n_bytes := text_bytes(text)) > max_text_bytes:
        raise ValueError(f"the text has {n_bytes} bytes, more than the limit of {max_text_bytes}")
    return text


def _check_encodable(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {value!r} holds a lone surrogate, which UTF-8 cannot encode") from None
