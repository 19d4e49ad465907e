"""Checks of the records of a log, as SQL over the relation that `layouts` describes.

A check is (SQL condition that is true for a bad record, column of the file, SQL of the reason). The first check whose
condition holds gives the error of the record. In SQL the record is `r`, and the item joined to it is `i`.
"""

from __future__ import annotations

from learn.data.actions import ACTIONS, UNSPECIFIED
from learn.data.layouts import Columns
from learn.data.sql import name, text

Check = tuple[str, str | None, str]
# Separates column and reason in a problem; this control character does not occur in text files.
SEPARATOR = "\x1f"
QUOTE = "chr(39)"


def broken_record() -> list[Check]:
    """The line could not be parsed as a record."""
    return [("r.broken IS NOT NULL", None, "r.broken")]


def empty_fields(columns: Columns) -> list[Check]:
    """A column that the file has is empty in this record."""
    aliases = {"user": columns.user, "item": columns.item, "timestamp": columns.timestamp, "value": columns.value}
    present = {alias: column for alias, column in aliases.items() if column is not None}
    return [(f"coalesce(r.{name(alias)}, '') = ''", column, "'empty'") for alias, column in present.items()]


def unknown_item(column: str, catalogue: str) -> list[Check]:
    """The item is not in the file named `catalogue`."""
    return [("i.row IS NULL", column, f"{QUOTE} || r.item || {QUOTE} || {text(f' is not in {catalogue}')}")]


# Whole numbers of at most 18 digits, which always fit in 64 bits.
WHOLE_NUMBER = "regexp_full_match(trim(r.timestamp), '[+-]?[0-9]{1,18}')"


def invalid_timestamp(column: str | None, is_valid: str = WHOLE_NUMBER) -> list[Check]:
    """The timestamp does not meet the SQL condition `is_valid`, by default that it is a `WHOLE_NUMBER`."""
    if column is None:
        return []
    not_whole = f"NOT {is_valid}"
    return [
        *_invalid_number("timestamp", column, "DOUBLE"),
        (not_whole, column, _expected("a whole number", "timestamp")),
    ]


def invalid_value(column: str | None) -> list[Check]:
    """The value is not a number in the range of float32."""
    return [] if column is None else _invalid_number("value", column, "FLOAT")


def unknown_action(column: str | None) -> list[Check]:
    """The action has no known name; an empty one is not known, which is no problem."""
    if column is None:
        return []
    names = ", ".join(map(text, (*ACTIONS, UNSPECIFIED)))
    reason = text(f" is none of {', '.join((*ACTIONS, UNSPECIFIED))}")
    condition = f"coalesce(r.action, '') <> '' AND r.action NOT IN ({names})"
    return [(condition, column, f"{QUOTE} || r.action || {QUOTE} || {reason}")]


def action_number(column: str | None) -> str:
    """An SQL expression for the action of the record: 0 if it is not known, else 1 + its position in `ACTIONS`."""
    position = f"coalesce(list_position([{', '.join(map(text, ACTIONS))}], r.action), 0)"
    return f"CAST({'0' if column is None else position} AS UTINYINT)"


def _invalid_number(alias: str, column: str, kind: str) -> list[Check]:
    return [
        (f"TRY_CAST(r.{alias} AS DOUBLE) IS NULL", column, _expected("a number", alias)),
        (f"NOT isfinite(TRY_CAST(r.{alias} AS {kind}))", column, _expected("a finite number", alias)),
    ]


def _expected(expected: str, alias: str) -> str:
    return f"{text(f'expected {expected}, got ')} || {QUOTE} || r.{alias} || {QUOTE}"


def first_problem(checks: list[Check]) -> str:
    """An SQL expression for column, SEPARATOR and reason of the first check that holds, or null if none does."""
    cases = []
    for condition, column, reason in checks:
        cases.append(f"WHEN {condition} THEN {text((column or '') + SEPARATOR)} || {reason}")
    return f"CASE {' '.join(cases)} END"
