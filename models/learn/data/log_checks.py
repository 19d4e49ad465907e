"""What may be wrong with a record of a log, as SQL over the relation of `layouts`.

Each check is (condition, column of the file, SQL of the reason); the first one that holds is the record's problem.
Records are `r`, the catalogue joined to them is `i`.
"""

from __future__ import annotations

from learn.data.layouts import Columns
from learn.data.sql import name, text

Check = tuple[str, str | None, str]
# Between column and reason of a problem; no file of text has it.
SEPARATOR = "\x1f"
QUOTE = "chr(39)"


def is_broken() -> list[Check]:
    """The line is no record at all."""
    return [("r.broken IS NOT NULL", None, "r.broken")]


def is_empty(columns: Columns) -> list[Check]:
    """A column that the file has says nothing here."""
    aliases = {"user": columns.user, "item": columns.item, "timestamp": columns.timestamp, "value": columns.value}
    given = {alias: column for alias, column in aliases.items() if column is not None}
    return [(f"coalesce(r.{name(alias)}, '') = ''", column, "'empty'") for alias, column in given.items()]


def is_unknown(column: str, catalogue: str) -> list[Check]:
    """The item is not in the file of that name."""
    return [("i.row IS NULL", column, f"{QUOTE} || r.item || {QUOTE} || {text(f' is not in {catalogue}')}")]


def is_no_time(column: str | None) -> list[Check]:
    """Not a whole number that 64 bits hold."""
    if column is None:
        return []
    return [
        *_is_no_number("timestamp", column, "DOUBLE"),
        ("NOT regexp_full_match(trim(r.timestamp), '[+-]?[0-9]{1,18}')", column, _got("a whole number", "timestamp")),
    ]


def is_no_value(column: str | None) -> list[Check]:
    """Not a number that float32 holds."""
    return [] if column is None else _is_no_number("value", column, "FLOAT")


def _is_no_number(alias: str, column: str, kind: str) -> list[Check]:
    return [
        (f"TRY_CAST(r.{alias} AS DOUBLE) IS NULL", column, _got("a number", alias)),
        (f"NOT isfinite(TRY_CAST(r.{alias} AS {kind}))", column, _got("a finite number", alias)),
    ]


def _got(expected: str, alias: str) -> str:
    return f"{text(f'expected {expected}, got ')} || {QUOTE} || r.{alias} || {QUOTE}"


def first_problem(checks: list[Check]) -> str:
    """One SQL expression: column and reason of the first check that holds, or null."""
    cases = (f"WHEN {holds} THEN {text((column or '') + SEPARATOR)} || {reason}" for holds, column, reason in checks)
    return f"CASE {' '.join(cases)} END"
