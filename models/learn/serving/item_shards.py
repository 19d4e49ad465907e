"""A catalogue in files -> shards of its rows that can be read alone, each always the same rows.

A catalogue is one file or a folder of files, JSONL (`{"id", "text": {six fields}}` a line, or the fields beside the id)
or Parquet (columns `id` and any of the six fields, or a column `text` of them). A row that cannot be used is data, not
an error: it comes out as a `Reject` with its place, its id as far as it is known, and the reason.
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
    """Some rows of one file. `begin` is a byte for JSONL and a row (from 0) for Parquet."""

    number: int
    file: str
    begin: int
    # Rows count from 1, as an editor counts lines.
    first_row: int
    n_rows: int


@dataclass(frozen=True)
class Reject:
    """A row that was left out."""

    file: str
    row: int
    id: str | None
    reason: str

    def to_json(self) -> str:
        """One line of a rejects file."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Item:
    """A row that can be used, and where it stood."""

    row: int
    id: str
    text: ItemText


def plan(items: Path, shard_rows: int) -> tuple[list[Shard], dict[str, str]]:
    """All shards in order, and the SHA-256 of each file. Reads everything once, a piece at a time."""
    shards: list[Shard] = []
    digests = {}
    for path in _files(items):
        with path.open("rb") as file:
            digests[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        starts = _parquet_starts(path, shard_rows) if path.suffix == ".parquet" else _line_starts(path, shard_rows)
        for begin, first_row, n_rows in starts:
            shards.append(Shard(len(shards), str(path), begin, first_row, n_rows))
    if not shards:
        raise DataError(items, None, None, "there is no row to embed")
    return shards, digests


def _files(items: Path) -> list[Path]:
    found = sorted(path for path in items.iterdir()) if items.is_dir() else [items]
    files = [path for path in found if path.suffix in (".jsonl", ".parquet") and path.is_file()]
    if not files:
        raise DataError(items, None, None, "expected a .jsonl or .parquet file, or a folder of such")
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
        raise DataError(path, None, None, f"no Parquet file: {error}") from error


def read(shard: Shard, max_text_bytes: int) -> tuple[list[Item], list[Reject]]:
    """The shard's rows, those that can be used and those that cannot."""
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
            path, None, None, f"{shard.n_rows} rows were expected from row {shard.first_row} on; it changed"
        )
    return items, rejects


def _line_records(path: Path, shard: Shard) -> Iterator[Any]:
    """An object a line, or the error that stands for it."""
    with path.open("rb") as file:
        file.seek(shard.begin)
        for line in itertools.islice(file, shard.n_rows):
            try:
                yield json.loads(line)
            except ValueError as error:
                yield ValueError(f"no JSON: {error}")


def _parquet_records(path: Path, shard: Shard) -> Iterator[Any]:
    file = _open_parquet(path)
    wanted = [name for name in ("id", "text", *FIELDS) if name in file.schema_arrow.names]
    if "id" not in wanted or len(wanted) == 1:
        raise DataError(path, None, "id", f"expected id and text fields, the columns are {file.schema_arrow.names}")
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
        raise ValueError(f"{n_bytes} bytes of text, at most {max_text_bytes} are taken")
    return text


def _check_encodable(name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {value!r} holds half of a surrogate pair, which is no text") from None
