"""Helpers for DuckDB and its SQL that several modules of this package share."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow

# Rows per Arrow batch.
BATCH = 1 << 16


def text(value: str) -> str:
    """A quoted SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def name(value: str) -> str:
    """A quoted SQL identifier."""
    return '"' + value.replace('"', '""') + '"'


def id_order(column: str) -> str:
    """An ORDER BY expression for ids: numeric ids first, as numbers of any length, then the others as text."""
    is_number = f"regexp_full_match({column}, '[0-9]+')"
    digits = f"CASE WHEN {is_number} THEN ltrim({column}, '0') END"
    return f"NOT {is_number}, length({digits}), {digits}, {column}"


def insert(db: duckdb.DuckDBPyConnection, table: str, columns: dict[str, list | np.ndarray]) -> None:
    """Appends rows, given as columns in the order of the table."""
    db.register("batch", pyarrow.table(columns))
    db.execute(f"INSERT INTO {table} SELECT * FROM batch")
    db.unregister("batch")


def first_row(db: duckdb.DuckDBPyConnection, query: str) -> tuple | None:
    """The only row of a query, or None. All rows are fetched, because an open result would block the next query."""
    rows = db.execute(query).fetchall()
    return rows[0] if rows else None


def batches(db: duckdb.DuckDBPyConnection, query: str) -> Iterator[pyarrow.RecordBatch]:
    """The rows of a query in batches of at most `BATCH`, none of them empty."""
    return (batch for batch in db.sql(query).to_arrow_reader(BATCH) if len(batch))
