"""The unit of timestamps that are whole numbers: recognised by their size, because no log is from the year 5138.

| unit | size | covers |
|---|---|---|
| seconds | below 10^11 | all times up to the year 5138 |
| milliseconds | 10^11 to 10^14 | March 1973 to 5138 |
| microseconds | 10^14 to 10^17 | the same |
| nanoseconds | 10^17 and above | March 1973 to 2262 |

A 0 may be in any unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb

from learn.data import sql


@dataclass(frozen=True)
class Unit:
    """A unit of time."""

    name: str
    per_second: int


UNITS = (
    Unit("seconds", 1),
    Unit("milliseconds", 10**3),
    Unit("microseconds", 10**6),
    Unit("nanoseconds", 10**9),
)


class MixedUnits(Exception):
    """Two units occur; `record` is the first one in another unit than those before it."""

    def __init__(self, record: int, reason: str) -> None:
        super().__init__(reason)
        self.record = record


def recognise(db: duckdb.DuckDBPyConnection, table: str) -> Unit:
    """The unit of the column `sort_key` of a table with the column `record`. Raises `MixedUnits`."""
    size = "abs(sort_key)"
    unit = f"CASE WHEN {size} < 10**11 THEN 0 WHEN {size} < 10**14 THEN 1 WHEN {size} < 10**17 THEN 2 ELSE 3 END"
    found = db.execute(f"""
        SELECT unit, min(record) AS record, arg_min(sort_key, record)
        FROM (SELECT {unit} AS unit, record, sort_key FROM {table} WHERE sort_key <> 0)
        GROUP BY unit ORDER BY record
    """).fetchall()
    if len(found) > 1:
        (one, _, earlier), (other, record, value) = found[:2]
        raise MixedUnits(
            record,
            f"{value} is in {UNITS[other].name}, but an earlier record has {earlier}, in {UNITS[one].name}; give all "
            "timestamps in one unit",
        )
    return UNITS[found[0][0]] if found else UNITS[0]


def whole_number(column: str) -> str:
    """An SQL condition: the text is a whole number that fits in 64 bits, up to the year 2096 in nanoseconds."""
    return f"regexp_full_match(trim({column}), {sql.text('[+-]?([0-9]{1,18}|[1-3][0-9]{18})')})"
