"""How DuckDB reads the log of a data set, and the public data sets that are known by their files.

`known_layouts` says which data set a folder contains, and `neutral_layout` has the neutral format.

Every layout presents its log as the same relation, `record, "user", item, timestamp, value, action, broken`. `record`
counts from 1; the other columns are the unchanged text of the file. `timestamp`, `value` and `action` are null if the
data set has none, and `broken` says why a line could not be parsed. `preparation` checks and casts these columns in the
same way for all layouts.

| layout | files |
|---|---|
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

from learn.data import catalogue, sources
from learn.data.dataset import DataError
from learn.data.sources import AnyPath
from learn.data.sql import first_row, name, text

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
    """A log in one file or several. `sql` is a SELECT that gives the relation described at the top of this module.

    `files` has all files in the order of their records; None stands for `path` alone.
    """

    path: AnyPath
    sql: str
    columns: Columns = Columns()
    first_row: int = 1
    kind: Literal["csv", "json", "other"] = "other"
    files: tuple[Log, ...] | None = None

    def problem(self, record: int, column: str | None, reason: str) -> DataError:
        """The error of one record, with its row in its file. DuckDB skips empty lines of JSON, so count them here."""
        for file in self.files or ():
            if record <= (n_records := file.read()):
                return file.problem(record, column, reason)
            record -= n_records
        if self.kind != "json":
            return DataError(self.path, record + self.first_row - 1, column, reason)
        try:
            row = next(islice(catalogue.json_objects(self.path), record - 1, None))[0]
        except DataError as error:
            return error
        return DataError(self.path, row, column, reason)

    def read(self) -> int:
        """Reads all records of a log in one file, and returns their number; only errors in it need this."""
        with duckdb.connect() as db:
            sources.register(db, (self.path,))
            # All columns, because a column that is not needed would not be checked.
            return max(first_row(db, f"SELECT count(*), count(COLUMNS(*)) FROM ({self.sql})"))


@dataclass(frozen=True)
class Layout:
    """A data set that was found in a folder.

    Without `ticks_per_second`, timestamps are whole numbers in a unit that is recognised by their size.
    """

    name: str
    log: Log
    # The file of the catalogue, or the folder or glob of several files.
    items: AnyPath
    read_items: catalogue.ReadItems
    text_fields: tuple[str, ...] = PUBLIC_FIELDS
    # The tags that users gave to items, as a log whose `value` is the tag.
    tags: Log | None = None
    ticks_per_second: int | None = 1
    # Catalogues of real shops have duplicate, missing and empty items. These are left out and counted, not errors.
    is_lenient: bool = False
    min_item_events: int = 0
    # The files of the catalogue, in order; None: `items` alone.
    items_files: tuple[AnyPath, ...] | None = None


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

    def sql(self, *paths: AnyPath) -> str:
        """A call of DuckDB's `read_csv` that gives the rows in the order of the files and in each of them."""
        names = ", ".join(text(str(path)) for path in paths)
        columns = ", ".join(f"{text(name)}: 'VARCHAR'" for name in self.names)
        # One thread: a parallel reader that starts mid-file cannot tell a quoted newline, and null_padding needs it.
        return (
            f"read_csv([{names}], auto_detect = false, header = {self.has_header}, delim = "
            f"{text(self.delimiter)}, quote = {text(self.quote)}, escape = {text(self.quote)}, null_padding = true, "
            f"parallel = false, encoding = {text(self.encoding)}, columns = {{{columns}}})"
        )


# --- MovieLens -------------------------------------------------------------------------------------------------------


def _movielens_csv(folder: Path) -> Layout | None:
    ratings, movies, tags = (folder / f"{stem}.csv" for stem in ("ratings", "movies", "tags"))
    if not (ratings.is_file() and movies.is_file()):
        return None
    log = csv_log(ratings, Columns("userId", "movieId", "timestamp", "rating"))
    tagged = csv_log(tags, Columns("userId", "movieId", "timestamp", "tag")) if tags.is_file() else None
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
    log = Log(ratings, relation(source.sql(ratings), columns), columns)
    return Layout("movielens-dat", log, movies, catalogue.movies_dat, tags=_dat_tags(tags) if tags.is_file() else None)


def _dat_tags(path: Path) -> Log:
    """Reads user::item::tag::timestamp, where the tag is free text that may itself contain `::`."""
    source = CsvFormat("\x01", "", ["line"], has_header=False, encoding=catalogue.text_encoding(path)).sql(path)
    groups = "['user', 'item', 'tag', 'timestamp']"
    fields = f"unnest(regexp_extract(coalesce(line, ''), '^(.*?)::(.*?)::(.*)::(.*)$', {groups}))"
    columns = Columns("user", "item", "timestamp", "tag")
    return Log(path, relation(f"(SELECT {fields} FROM {source})", columns), columns)


def _movielens_100k(folder: Path) -> Layout | None:
    ratings, movies = folder / "u.data", folder / "u.item"
    if not (ratings.is_file() and movies.is_file()):
        return None
    source = CsvFormat("\t", "", ["user", "item", "rating", "timestamp"], has_header=False)
    columns = Columns("user", "item", "timestamp", "rating")
    return Layout(
        "movielens-100k", Log(ratings, relation(source.sql(ratings), columns), columns), movies, catalogue.u_item
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
            log = Log(reviews[0], json_sql(columns, reviews[0]), columns, kind="json")
            found = Layout(layout, log, meta[0], read_items, ticks_per_second=ticks)
            return replace(found, is_lenient=True, min_item_events=1)
    raise DataError(reviews[0], 1, None, "expected reviewerID (2018) or user_id (2023) in the first review")


def json_source(columns: Columns, *paths: AnyPath) -> str:
    """A call of DuckDB's `read_json` that gives these columns of every line as text, in order."""
    kinds = ", ".join(f"{text(column)}: 'VARCHAR'" for column in columns.present())
    names = ", ".join(text(str(path)) for path in paths)
    return f"read_json([{names}], format = 'newline_delimited', ignore_errors = true, columns = {{{kinds}}})"


def json_sql(columns: Columns, *paths: AnyPath) -> str:
    """The relation of a log in JSON Lines."""
    # A line that is not JSON becomes a row of nulls. `Log.problem` then parses that line again for a precise reason.
    broken = " AND ".join(f"{name(column)} IS NULL" for column in columns.present())
    return relation(
        json_source(columns, *paths), columns, f"CASE WHEN {broken} THEN 'not an object with these fields' END"
    )


PUBLIC = (_movielens_csv, _movielens_dat, _movielens_100k, _amazon)

# --- common ----------------------------------------------------------------------------------------------------------


def csv_log(path: Path, columns: Columns) -> Log:
    """A log in one CSV file with a header; raises `DataError` if that lacks a column, or names one twice."""
    found = catalogue.header(path)
    catalogue.require_columns(path, found, columns.present())
    duplicates = [column for column in found if found.count(column) > 1]
    if duplicates:
        raise DataError(path, 1, duplicates[0], f"the header names this column twice; it has {found}")
    return Log(path, relation(CsvFormat(names=found).sql(path), columns), columns, first_row=2, kind="csv")


def relation(source: str, columns: Columns, broken: str = "CAST(NULL AS VARCHAR)") -> str:
    """The relation described at the top of this module, given a table with these columns."""
    column_of = {"user": columns.user, "item": columns.item, "timestamp": columns.timestamp, "value": columns.value}
    column_of["action"] = columns.action
    fields = (
        f"CAST({name(column) if column else 'NULL'} AS VARCHAR) AS {name(alias)}" for alias, column in column_of.items()
    )
    return f"SELECT row_number() OVER () AS record, {', '.join(fields)}, {broken} AS broken FROM {source}"


def check_quotes(log: Log) -> None:
    """Raises `DataError` if a quote is still open at the end of the file, which DuckDB does not report."""
    for file in log.files or (log,):
        row = catalogue.find_unclosed_quote(file.path) if file.kind == "csv" else None
        if row is not None:
            raise DataError(file.path, row, None, "a quote is not closed")


def read_error(log: Log, error: duckdb.Error) -> DataError:
    """Turns DuckDB's error about a file that it cannot read into a one-line `DataError`."""
    for file in log.files or ():
        # DuckDB names the file in some of its messages only.
        try:
            file.read()
        except duckdb.Error as error_of_file:
            return read_error(file, error_of_file)
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
