"""The few pieces of DuckDB's SQL that several files build on."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow

# Rows in one Arrow batch.
BATCH = 1 << 16


def text(value: str) -> str:
    """A literal."""
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    """An identifier."""
    return '"' + value.replace('"', '""') + '"'


def id_order(column: str) -> str:
    """Sorts ids: those of digits first, as numbers of any length (how many digits, then digit by digit), then text."""
    is_number = f"regexp_full_match({column}, '[0-9]+')"
    digits = f"CASE WHEN {is_number} THEN ltrim({column}, '0') END"
    return f"NOT {is_number}, length({digits}), {digits}, {column}"


def insert(db: duckdb.DuckDBPyConnection, table: str, columns: dict[str, list | np.ndarray]) -> None:
    """Appends columns, in the order in which the table has them."""
    db.register("batch", pyarrow.table(columns))
    db.execute(f"INSERT INTO {table} SELECT * FROM batch")
    db.unregister("batch")


def first_row(db: duckdb.DuckDBPyConnection, query: str) -> tuple | None:
    """The first row of a query that gives one or none. An open result would block the next one, so all is fetched."""
    rows = db.execute(query).fetchall()
    return rows[0] if rows else None


def batches(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a query, a part at a time; none of the parts is empty."""
    return (batch for batch in db.sql(query).to_arrow_reader(BATCH) if len(batch))
