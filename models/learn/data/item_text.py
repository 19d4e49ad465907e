"""The six fields of an item -> its prompt, the line of text that the encoder reads.

The wording is the LEARN paper's (arXiv 2405.03988), one sentence per field. A missing field has no sentence, so the
encoder never reads `brand is ""`. The template, `item_text.jinja`, is copied into every bundle and uses only what
Jinja2 and minijinja share; tests check that both give the bytes in `tests/fixtures/item_text_golden.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE_PATH = Path(__file__).with_name("item_text.jinja")
STRING_FIELDS = ("title", "category", "brand", "price")
LIST_FIELDS = ("keywords", "attributes")


@dataclass(frozen=True)
class ItemText:
    """What is known about an item. A field is missing if it is an empty string or a list without a non-empty string."""

    title: str = ""
    category: str = ""
    brand: str = ""
    price: str = ""
    keywords: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if all fields are missing. There is nothing to encode then, so callers must reject the item."""
        strings = any(getattr(self, name) for name in STRING_FIELDS)
        return not (strings or any(any(getattr(self, name)) for name in LIST_FIELDS))

    def to_json(self) -> dict[str, Any]:
        """All six fields, with the tuples as lists."""
        fields = asdict(self)
        return fields | {name: list(fields[name]) for name in LIST_FIELDS}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ItemText:
        """Reads any subset of the six fields. Raises ValueError with the name of an unknown or mistyped field."""
        unknown = sorted(set(raw) - set(STRING_FIELDS) - set(LIST_FIELDS))
        if unknown:
            known = ", ".join((*STRING_FIELDS, *LIST_FIELDS))
            raise ValueError(f"unknown field of item text: {', '.join(unknown)}; the known fields are {known}")
        for name in STRING_FIELDS:
            if not isinstance(raw.get(name, ""), str):
                raise ValueError(f"{name}: expected a string, got {raw[name]!r}")
        for name in LIST_FIELDS:
            value = raw.get(name, [])
            if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
                raise ValueError(f"{name}: expected a list of strings, got {value!r}")
        lists = {name: tuple(raw.get(name, ())) for name in LIST_FIELDS}
        return cls(**{name: raw.get(name, "") for name in STRING_FIELDS}, **lists)


@cache
def template_source() -> str:
    """The template as it is stored in bundles: without the newline at the end of the file."""
    return TEMPLATE_PATH.read_text(encoding="utf-8").removesuffix("\n")


@cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined).from_string(source)


def render(text: ItemText, source: str | None = None) -> str:
    """The prompt of one item, by the template `source` or, if None, our own.

    For an empty item it is the opening sentence alone; see `ItemText.is_empty`.
    """
    return _template(template_source() if source is None else source).render(text.to_json())


@dataclass(frozen=True)
class Prompts:
    """The prompts of a catalogue, rendered at each iteration so that they are never all in memory."""

    texts: Iterable[ItemText]

    def __iter__(self) -> Iterator[str]:
        return (render(text) for text in self.texts)
