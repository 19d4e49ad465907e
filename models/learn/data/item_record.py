"""One record of a catalogue -> id and text. Lines of JSON and rows of Parquet give the same records.

A record is `{"id": .., "text": {any of the six fields}}`, or has the six fields beside the id. Where `text` is given,
other fields of the record are ignored. Null is a field that the record lacks, as a table has each column in every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learn.data.item_text import ItemText


def record_id(record: Mapping[str, Any]) -> str:
    """The id, a whole number as its digits. Raises ValueError if there is none."""
    identifier = record.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if not isinstance(identifier, str) or not identifier:
        raise ValueError(f"expected a text that is not empty, got {identifier!r}")
    return identifier


def record_text(record: Mapping[str, Any]) -> ItemText:
    """The text, which may be empty. ValueError names the field that is unknown or of the wrong type."""
    fields = record.get("text")
    if fields is None:
        fields = {name: value for name, value in record.items() if name != "id"}
    if not isinstance(fields, Mapping):
        raise ValueError(f"expected an object with item text, got {fields!r}")
    return ItemText.from_json({name: value for name, value in fields.items() if value is not None})
