"""The files of a log or of samples, and how DuckDB reads them.

A file is .csv or .parquet. Its timestamps are whole numbers, or in Parquet of a timestamp type.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from learn.data import DataError, catalogue, sql
from learn.data.layouts import Columns, CsvFormat, Log

REQUIRED = ("user", "item", "timestamp")


@dataclass(frozen=True)
class Table:
    """One file of the log or of the samples, with the names of its columns."""

    path: Path
    columns: tuple[str, ...]
    is_csv: bool
    has_time_type: bool

    def has(self, column: str) -> bool:
        """Whether there is a column of this name."""
        return column in self.columns

    def log(self, ticks: int, extra: Iterable[str] = ()) -> Log:
        """The relation `record, user, item, timestamp, value, action, broken`, as text, and then `extra` columns."""
        table = CsvFormat(names=list(self.columns)).sql(self.path) if self.is_csv else self._read_parquet()
        when = f"epoch_us({sql.name('timestamp')})" if self.has_time_type else sql.name("timestamp")
        given = {"user": sql.name("user"), "item": sql.name("item"), "timestamp": when}
        given |= {name: sql.name(name) if self.has(name) else "NULL" for name in ("value", "action")}
        fields = ", ".join(f"CAST({value} AS VARCHAR) AS {sql.name(name)}" for name, value in given.items())
        carried = "".join(f", {sql.name(name)} AS {sql.name('carried.' + name)}" for name in extra)
        factor = 1 if self.has_time_type else ticks
        query = (
            f"SELECT row_number() OVER () AS record, {fields}, {factor} AS ticks, CAST(NULL AS VARCHAR) AS broken"
            f"{carried} FROM {table}"
        )
        columns = Columns(value="value" if self.has("value") else None)
        return Log(self.path, query, columns, first_row=2 if self.is_csv else 1, kind="csv" if self.is_csv else "other")

    def _read_parquet(self) -> str:
        return f"read_parquet({sql.text(str(self.path))})"


def files(where: str) -> list[Path]:
    """Returns the files of a table in the order of their names."""
    path = Path(where)
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in (".csv", ".parquet")]
    else:
        # `Path.glob` takes no absolute pattern.
        found = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(where, recursive=True))]  # noqa: PTH207
    wrong = [file for file in found if file.suffix not in (".csv", ".parquet") or not file.is_file()]
    if wrong or not found:
        raise DataError(wrong[0] if wrong else path, None, None, "expected .csv or .parquet files, or a folder of them")
    return found


def open_table(path: Path) -> Table:
    """Opens a file; raises DataError if it lacks a required column, or names one twice."""
    if path.suffix == ".csv":
        columns, has_time_type = catalogue.header(path), False
    else:
        try:
            schema = pq.read_schema(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(path, None, None, f"not a Parquet file: {error}") from error
        columns = schema.names
        _check_types(path, schema)
        has_time_type = "timestamp" in columns and pa.types.is_timestamp(schema.field("timestamp").type)
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise DataError(path, None, twice[0], "two columns have this name")
    for name in REQUIRED:
        if name not in columns:
            raise DataError(path, None, name, f"there is no such column; there are {', '.join(columns)}")
    return Table(path, tuple(columns), path.suffix == ".csv", has_time_type)


def _check_types(path: Path, schema: pa.Schema) -> None:
    """Raises DataError for ids that are not whole numbers or texts: 7.0 is not the id that another file calls 7."""
    kinds = pa.types
    texts = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_dictionary)
    allowed = {name: (kinds.is_integer, *texts) for name in ("user", "item")}
    allowed |= {"timestamp": (kinds.is_integer, kinds.is_timestamp), "action": texts}
    for name, is_kinds in allowed.items():
        if name in schema.names and not any(is_kind(schema.field(name).type) for is_kind in is_kinds):
            raise DataError(path, None, name, f"the type {schema.field(name).type} is not allowed for this column")
