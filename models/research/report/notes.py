"""`results/notes.toml`: what a person has to say to claims and questions, filed under their keys.

    main = "ml-latest-small"                 # the study that claims without a data set of their own are tested on
    [claims]
    frozen-over-lora = "No small LLM whose licence allows it could be had here."
    [questions]
    "item tower" = "Variant (1) is served as (2) anyway: each item stands alone."

Figures do not belong here: the report computes them. A key that no claim has is an error, so remarks do not get lost.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from learn.data import DataError
from research.report.claims import KEYS

# Six claims that share a row as long as none of them is tested.
AMAZON = "amazon"


@dataclass(frozen=True)
class Notes:
    """The content of notes.toml."""

    main: str | None = None
    claims: dict[str, str] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)


def read_notes(path: Path) -> Notes:
    """Empty notes without the file; `DataError` for what is not as described above."""
    if not path.exists():
        return Notes()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(path, None, None, str(error)) from error
    for name in found.keys() - {"main", "claims", "questions"}:
        raise DataError(path, None, name, "unknown; known are main, claims and questions")
    if not isinstance(found.get("main", ""), str):
        raise DataError(path, None, "main", f"expected the name of a study, got {found['main']!r}")
    for section in ("claims", "questions"):
        _check_section(path, section, found.get(section, {}))
    return Notes(found.get("main"), found.get("claims", {}), found.get("questions", {}))


def _check_section(path: Path, section: str, remarks: object) -> None:
    if not isinstance(remarks, dict):
        raise DataError(path, None, section, f"expected a table of remarks, got {remarks!r}")
    for key, remark in remarks.items():
        if not isinstance(remark, str):
            raise DataError(path, None, f"{section}.{key}", f"expected a text, got {remark!r}")
        if section == "claims" and key not in (*KEYS, AMAZON):
            raise DataError(path, None, f"claims.{key}", f"no such claim; known are {', '.join((AMAZON, *KEYS))}")
