"""Which data set a folder contains, and how DuckDB reads its log.

Every layout presents its log as the same relation, `record, "user", item, timestamp, value, action, broken`. `record`
counts from 1; the other columns are the unchanged text of the file. `timestamp`, `value` and `action` are null if the
data set has none, and `broken` says why a line could not be parsed. `preparation` checks and casts these columns in the
same way for all layouts.

| layout | files |
|---|---|
| neutral | interactions.csv or .parquet; items.jsonl or .parquet |
| movielens-csv (latest-small, 20M, 25M, 32M) | ratings.csv, movies.csv, tags.csv |
| movielens-dat (1M, 10M) | ratings.dat with or without timestamps, movies.dat, tags.dat |
| movielens-100k | u.data, u.item |
| amazon-2018, amazon-2023 | one file of reviews and one whose name begins with meta_, JSON lines, .gz or not |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import duckdb
import pyarrow
import pyarrow.parquet

from learn.data import catalogue
from learn.data.dataset import DataError
from learn.data.sql import name, text

TEXT_FIELDS = catalogue.FIELDS
# The fields that LEARN (arXiv 2405.03988) uses from public data sets.
PUBLIC_FIELDS = ("title", "category", "brand")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Columns:
    """The names of the columns in the file; None if the log has no such column."""

    user: str = "user"
    item: str = "item"
    timestamp: str | None = "timestamp"
    value: str | None = "value"
    action: str | None = None

    def present(self) -> list[str]:
        """The names of the columns that the file has."""
        names = (self.user, self.item, self.timestamp, self.value, self.action)
        return [name for name in names if name is not None]


@dataclass(frozen=True)
class Log:
    """A log in one file. `sql` is a SELECT that gives the relation described at the top of this module."""

    path: Path
    sql: str
    columns: Columns = Columns()
    first_row: int = 1
    kind: Literal["csv", "json", "other"] = "other"

    def problem(self, record: int, column: str | None, reason: str) -> DataError:
        """The error of one record, with its row in the file. DuckDB skips empty lines of JSON, so count them here."""
        if self.kind != "json":
            return DataError(self.path, record + self.first_row - 1, column, reason)
        try:
            row = next(islice(catalogue.json_objects(self.path), record - 1, None))[0]
        except DataError as error:
            return error
        return DataError(self.path, row, column, reason)


@dataclass(frozen=True)
class Layout:
    """A data set that was found in a folder."""

    name: str
    log: Log
    items: Path
    read_items: catalogue.ReadItems
    text_fields: tuple[str, ...] = PUBLIC_FIELDS
    # The tags that users gave to items, as a log whose `value` is the tag.
    tags: Log | None = None
    ticks_per_second: int = 1
    # Catalogues of real shops have duplicate, missing and empty items. These are left out and counted, not errors.
    is_lenient: bool = False
    min_item_events: int = 0


@dataclass(frozen=True)
class CsvFormat:
    """How to read a file of separated values, with nothing left to detection.

    Every column is text, and missing fields at the end of a row are null.
    """

    delimiter: str = ","
    quote: str = '"'
    names: list[str] = field(default_factory=list)
    has_header: bool = True
    encoding: str = "utf-8"

    def sql(self, path: Path) -> str:
        """A call of DuckDB's `read_csv` that gives the rows in the order of the file."""
        columns = ", ".join(f"{text(name)}: 'VARCHAR'" for name in self.names)
        # One thread: a parallel reader that starts mid-file cannot tell a quoted newline, and null_padding needs it.
        return (
            f"read_csv({text(str(path))}, auto_detect = false, header = {self.has_header}, delim = "
            f"{text(self.delimiter)}, quote = {text(self.quote)}, escape = {text(self.quote)}, null_padding = true, "
            f"parallel = false, encoding = {text(self.encoding)}, columns = {{{columns}}})"
        )


def find_layout(folder: Path) -> Layout:
    """Recognises a data set by its file names. Raises `DataError` unless the folder contains exactly one."""
    if not folder.is_dir():
        raise DataError(folder, None, None, "no such folder")
    finders = (_neutral, _movielens_csv, _movielens_dat, _movielens_100k, _amazon)
    found = [layout for finder in finders if (layout := finder(folder)) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(layout.name for layout in found)
        raise DataError(folder, None, None, f"more than one data set: {names}; leave only one in the folder")
    reason = (
        "no known data set: expected interactions.csv or .parquet with items.jsonl or .parquet, MovieLens "
        "(ratings.csv with movies.csv, ratings.dat with movies.dat, u.data with u.item), or Amazon reviews (one file "
        "of reviews and one meta_ file)"
    )
    raise DataError(folder, None, None, reason)


# --- the neutral format ----------------------------------------------------------------------------------------------


def _neutral(folder: Path) -> Layout | None:
    log = _one_of(folder, "interactions.csv", "interactions.parquet")
    if log is None:
        return None
    items = _one_of(folder, "items.jsonl", "items.parquet")
    if items is None:
        raise DataError(folder, None, None, f"{log.name} has no items.jsonl or items.parquet beside it")
    is_csv = log.suffix == ".csv"
    read_items = catalogue.neutral_jsonl if items.suffix == ".jsonl" else catalogue.neutral_parquet
    parsed_log = _csv_log(log, _neutral_columns(log)) if is_csv else _parquet_log(log)
    neutral = Layout("neutral", parsed_log, items, read_items)
    return replace(neutral, text_fields=TEXT_FIELDS, ticks_per_second=1 if is_csv else _parquet_ticks(log))


def _one_of(folder: Path, *names: str) -> Path | None:
    found = [folder / candidate for candidate in names if (folder / candidate).is_file()]
    if len(found) > 1:
        raise DataError(folder, None, None, f"both {' and '.join(names)} exist; remove one of them")
    return found[0] if found else None


def _neutral_columns(path: Path) -> Columns:
    found = catalogue.header(path)
    return Columns(**{column: column if column in found else None for column in ("timestamp", "value", "action")})


def _parquet_schema(path: Path) -> pyarrow.Schema:
    try:
        return pyarrow.parquet.read_schema(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(path, None, None, str(error)) from error


def _parquet_log(path: Path) -> Log:
    schema = _parquet_schema(path)
    columns = Columns(
        *(column if column in schema.names else None for column in ("user", "item", "timestamp", "value", "action"))
    )
    for required in ("user", "item"):
        if required not in schema.names:
            raise DataError(path, None, required, f"the schema does not name this column; it has {schema.names}")
    kinds = pyarrow.types
    allowed = {
        "user": (kinds.is_integer, kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_dictionary),
        "timestamp": (kinds.is_integer, kinds.is_timestamp),
        "value": (kinds.is_integer, kinds.is_floating, kinds.is_boolean, kinds.is_decimal),
        "action": (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_dictionary),
    }
    for column in columns.present():
        kind = schema.field(column).type
        if not any(is_kind(kind) for is_kind in allowed.get(column, allowed["user"])):
            raise DataError(path, None, column, f"the type {kind} is not allowed for this column")
    when = name("timestamp")
    if columns.timestamp and kinds.is_timestamp(schema.field("timestamp").type):
        when = f"epoch_us({when})"
    value = f"CAST({name('value')} AS DOUBLE)" if columns.value else "NULL"
    action = "action" if columns.action else "NULL"
    fields = f'"user", item, {when if columns.timestamp else "NULL"} AS timestamp, {value} AS value, {action} AS action'
    source = f"(SELECT {fields} FROM read_parquet({text(str(path))}))"
    return Log(path, _relation(source, Columns(action="action")), columns)


def _parquet_ticks(path: Path) -> int:
    schema = _parquet_schema(path)
    is_time = "timestamp" in schema.names and pyarrow.types.is_timestamp(schema.field("timestamp").type)
    return 1_000_000 if is_time else 1


# --- MovieLens -------------------------------------------------------------------------------------------------------


def _movielens_csv(folder: Path) -> Layout | None:
    ratings, movies, tags = (folder / f"{stem}.csv" for stem in ("ratings", "movies", "tags"))
    if not (ratings.is_file() and movies.is_file()):
        return None
    log = _csv_log(ratings, Columns("userId", "movieId", "timestamp", "rating"))
    tagged = _csv_log(tags, Columns("userId", "movieId", "timestamp", "tag")) if tags.is_file() else None
    return Layout("movielens-csv", log, movies, catalogue.movies_csv, tags=tagged)


def _movielens_dat(folder: Path) -> Layout | None:
    ratings, movies, tags = (folder / f"{stem}.dat" for stem in ("ratings", "movies", "tags"))
    if not (ratings.is_file() and movies.is_file()):
        return None
    names = ["user", "item", "rating", "timestamp"]
    first = next(catalogue.lines(ratings, "latin-1"), (1, ""))[1]
    n_fields = first.count("::") + 1
    if n_fields not in (3, 4):
        reason = f"expected user::item::rating or user::item::rating::timestamp, got {first[:80]!r}"
        raise DataError(ratings, 1, None, reason)
    source = CsvFormat("::", "", names[:n_fields], has_header=False, encoding="latin-1")
    columns = Columns("user", "item", "timestamp" if n_fields == 4 else None, "rating")
    log = Log(ratings, _relation(source.sql(ratings), columns), columns)
    return Layout("movielens-dat", log, movies, catalogue.movies_dat, tags=_dat_tags(tags) if tags.is_file() else None)


def _dat_tags(path: Path) -> Log:
    """Reads user::item::tag::timestamp, where the tag is free text that may itself contain `::`."""
    source = CsvFormat("\x01", "", ["line"], has_header=False, encoding=catalogue.text_encoding(path)).sql(path)
    groups = "['user', 'item', 'tag', 'timestamp']"
    fields = f"unnest(regexp_extract(coalesce(line, ''), '^(.*?)::(.*?)::(.*)::(.*)$', {groups}))"
    columns = Columns("user", "item", "timestamp", "tag")
    return Log(path, _relation(f"(SELECT {fields} FROM {source})", columns), columns)


def _movielens_100k(folder: Path) -> Layout | None:
    ratings, movies = folder / "u.data", folder / "u.item"
    if not (ratings.is_file() and movies.is_file()):
        return None
    source = CsvFormat("\t", "", ["user", "item", "rating", "timestamp"], has_header=False)
    columns = Columns("user", "item", "timestamp", "rating")
    return Layout(
        "movielens-100k", Log(ratings, _relation(source.sql(ratings), columns), columns), movies, catalogue.u_item
    )


# --- Amazon reviews --------------------------------------------------------------------------------------------------

_AMAZON = {
    "amazon-2018": (Columns("reviewerID", "asin", "unixReviewTime", "overall"), catalogue.amazon_2018, 1),
    "amazon-2023": (Columns("user_id", "parent_asin", "timestamp", "rating"), catalogue.amazon_2023, 1000),
}


def _amazon(folder: Path) -> Layout | None:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.name != "items.jsonl")
    meta = [path for path in files if path.name.startswith("meta_")]
    reviews = [path for path in files if path not in meta]
    if not meta:
        return None
    if len(meta) != 1 or len(reviews) != 1:
        names = [path.name for path in files]
        reason = f"expected exactly one file of reviews and one whose name begins with meta_, found {names}"
        raise DataError(folder, None, None, reason)
    first = next(catalogue.json_objects(reviews[0]), (1, {}))[1]
    for layout, (columns, read_items, ticks) in _AMAZON.items():
        if columns.user in first:
            log = Log(reviews[0], _json_sql(reviews[0], columns), columns, kind="json")
            found = Layout(layout, log, meta[0], read_items, ticks_per_second=ticks)
            return replace(found, is_lenient=True, min_item_events=1)
    raise DataError(reviews[0], 1, None, "expected reviewerID (2018) or user_id (2023) in the first review")


def _json_sql(path: Path, columns: Columns) -> str:
    kinds = ", ".join(f"{text(column)}: 'VARCHAR'" for column in columns.present())
    source = f"read_json({text(str(path))}, format = 'newline_delimited', ignore_errors = true, columns = {{{kinds}}})"
    # A line that is not JSON becomes a row of nulls. `Log.problem` then parses that line again for a precise reason.
    broken = " AND ".join(f"{name(column)} IS NULL" for column in columns.present())
    return _relation(source, columns, f"CASE WHEN {broken} THEN 'not an object with these fields' END")


# --- common ----------------------------------------------------------------------------------------------------------


def _csv_log(path: Path, columns: Columns) -> Log:
    found = catalogue.header(path)
    catalogue.require_columns(path, found, columns.present())
    duplicates = [column for column in found if found.count(column) > 1]
    if duplicates:
        raise DataError(path, 1, duplicates[0], f"the header names this column twice; it has {found}")
    return Log(path, _relation(CsvFormat(names=found).sql(path), columns), columns, first_row=2, kind="csv")


def _relation(source: str, columns: Columns, broken: str = "CAST(NULL AS VARCHAR)") -> str:
    column_of = {"user": columns.user, "item": columns.item, "timestamp": columns.timestamp, "value": columns.value}
    column_of["action"] = columns.action
    fields = (
        f"CAST({name(column) if column else 'NULL'} AS VARCHAR) AS {name(alias)}" for alias, column in column_of.items()
    )
    return f"SELECT row_number() OVER () AS record, {', '.join(fields)}, {broken} AS broken FROM {source}"


def check_quotes(log: Log) -> None:
    """Raises `DataError` if a quote is still open at the end of the file, which DuckDB does not report."""
    row = catalogue.find_unclosed_quote(log.path) if log.kind == "csv" else None
    if row is not None:
        raise DataError(log.path, row, None, "a quote is not closed")


def read_error(log: Log, error: duckdb.Error) -> DataError:
    """Turns DuckDB's error about a file that it cannot read into a one-line `DataError`."""
    if "invalid state" in str(error) and (row := catalogue.find_mixed_line_ending(log.path)) is not None:
        reason = "the line ending differs from that of the lines before it; use one kind of line ending in the file"
        return DataError(log.path, row, None, reason)
    return _csv_problem(log.path, str(error)) or DataError(log.path, None, None, str(error).splitlines()[0])


def _csv_problem(path: Path, message: str) -> DataError | None:
    line = re.search(r"CSV Error on Line: (\d+)", message)
    if line is None:
        return None
    row = int(line[1])
    fields = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", message)
    if fields:
        return DataError(path, row, None, f"expected {fields[1]} fields, found {fields[2]}")
    for sign, reason in (("unicode", "not UTF-8"), ("unterminated quote", "a quote is not closed, or text follows it")):
        if sign in message:
            return DataError(path, row, None, reason)
    return DataError(path, row, None, "malformed: " + message.splitlines()[2 if message.count("\n") > 1 else 0])
