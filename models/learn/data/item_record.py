"""One record of a catalogue -> id and text, for JSON Lines and Parquet alike.

A record is `{"id": .., "text": {any of the six fields}}`, or has any of the six fields beside the id. If `text` is
given, other fields of the record are ignored. A null counts as a missing field, because a row of a table has every
column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learn.data.item_text import ItemText


def record_id(record: Mapping[str, Any]) -> str:
    """The id; a whole number becomes its decimal digits. Raises ValueError if it is missing, empty or mistyped."""
    identifier = record.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"expected a non-empty string, got {identifier!r}")
    return identifier


def record_text(record: Mapping[str, Any]) -> ItemText:
    """The text, which may be empty. Raises ValueError with the name of a field that is unknown or of the wrong type."""
    fields = record.get("text")
    if fields is None:
        fields = {name: value for name, value in record.items() if name != "id"}
    if not isinstance(fields, Mapping):
        raise ValueError(f"expected an object with item text, got {fields!r}")
    return ItemText.from_json({name: value for name, value in fields.items() if value is not None})
