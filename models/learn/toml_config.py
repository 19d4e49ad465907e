"""TOML tables -> dataclasses, with every mistake named: unknown keys, wrong types, values that are not allowed.

`as_read` is for configs that are stored in JSON files and compared with what was read from one.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

T = TypeVar("T")


def strict(kind: type[T], raw: Mapping[str, Any], where: str) -> T:
    """A dataclass from a table. ValueError names each wrong key, its value and what was expected."""
    try:
        return pydantic.TypeAdapter(_forbidding(kind)).validate_python(dict(raw))
    except pydantic.ValidationError as error:
        lines = [_line(where, entry) for entry in error.errors()]
        raise ValueError("; ".join(lines)) from error


def as_read(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table as it would be read back from a JSON file: tuples become lists."""
    return json.loads(json.dumps(table))


def _forbidding(kind: type[T]) -> type[T]:
    """The same class, set up so that unknown keys are errors in it and in the dataclasses nested in it."""
    for part in (kind, *_nested(kind)):
        part.__pydantic_config__ = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return kind


def _nested(kind: type) -> list[type]:

    hints = typing.get_type_hints(kind)
    parts = [
        part for hint in hints.values() for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)
    ]
    return [*parts, *(deeper for part in parts for deeper in _nested(part))]


def _line(where: str, entry: Mapping[str, Any]) -> str:
    key = ".".join([where, *map(str, entry["loc"])] if where else map(str, entry["loc"]))
    return f"{key}: {entry['msg']}" + (f", got {entry['input']!r}" if entry["loc"] else "")
