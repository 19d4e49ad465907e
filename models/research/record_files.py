"""How results are stored: one `.npz` file per record, which holds a JSON header and columns of whole numbers.

An `.npz` file is a zip archive. `record.json` in it has the fields that are not arrays (`unzip -p FILE record.json`
prints them), and each array field is a member `<field>.npy` of the smallest unsigned type that holds its values. Equal
records give equal bytes. Files are written whole or not at all.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from learn.atomic_file import replacing
from learn.data import DataError
from research import provenance

# Raised whenever a reader of the older form would misread the newer one. Format 3 has the commit in every run and the
# digest of the data in every retrieval run; files of format 2 are read without them.
FORMAT = 3
READABLE = (2, FORMAT)
HEADER = "record.json"
# The file that a folder of results has for its study, by the kind of study.
RETRIEVAL_STUDY_FILE, RANKING_STUDY_FILE, CVR_STUDY_FILE = "study.npz", "ranking.npz", "cvr.npz"
# The oldest date that a zip archive can carry; the date of writing would make equal records differ.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def compact(values: np.ndarray) -> np.ndarray:
    """The values [n] in the smallest unsigned type that holds them. ValueError unless they are integers from 0."""
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise ValueError(f"expected a list of integers, got shape {values.shape} of {values.dtype}")
    if len(values) and values.min() < 0:
        raise ValueError(f"holds {values.min()}; expected 0 or more")
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


Column = Annotated[np.ndarray, AfterValidator(compact)]


def run_path(folder: Path, name: str, seed: int) -> Path:
    """Where a study keeps the run of a model or an arm, whether it exists or not."""
    return folder / f"{name.replace('/', '--')}-seed{seed}.npz"


def score_ranks(scores: np.ndarray) -> np.ndarray:
    """[n] the place of each score among the distinct ones, the lowest at 0."""
    return np.unique(scores, return_inverse=True)[1]


class Strict(BaseModel):
    """Unknown fields are errors, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Record(Strict):
    """What one file holds. Fields of type `Column` become arrays of the file, all others its header."""

    format: Literal[2, 3] = FORMAT

    @classmethod
    def columns(cls) -> list[str]:
        """The names of the array fields."""
        return [name for name, field in cls.model_fields.items() if field.annotation is np.ndarray]

    def header(self) -> str:
        """The other fields as JSON."""
        return self._header(set())

    def _header(self, without: set[str]) -> str:
        return self.model_dump_json(exclude_none=True, exclude={*self.columns(), *without})

    def equals(self, other: Self) -> bool:
        """Whether all fields but the format agree, arrays included."""
        arrays_agree = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in self.columns())
        return self._header({"format"}) == other._header({"format"}) and arrays_agree


class RunRecord(Record):
    """What one training left. `commit` is the code that it ran (`provenance.commit`), None in a file of format 2."""

    commit: str | None = Field(default_factory=provenance.commit, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _commit_is_that_of_the_file(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """The default is for a run that has just ended: a file without the field must not get the commit of today."""
        if "format" not in fields or "commit" in fields:
            return fields
        if fields["format"] >= FORMAT:
            raise ValueError(f"a run of format {FORMAT} needs the field commit")
        return fields | {"commit": None}


AnyRecord = TypeVar("AnyRecord", bound=Record)


def write(path: Path, record: Record) -> Path:
    """Writes the record over whatever was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        _add(archive, HEADER, record.header().encode())
        for name in record.columns():
            buffer = io.BytesIO()
            np.save(buffer, getattr(record, name), allow_pickle=False)
            _add(archive, f"{name}.npy", buffer.getvalue())
    return path


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), content, zipfile.ZIP_DEFLATED, compresslevel=9)


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Reads a record. `DataError` names file and field if the file is damaged, of another format or of another kind."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            fields: dict[str, Any] = json.loads(archive[HEADER])
            fields |= {name: archive[name] for name in archive.files if name != HEADER}
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise DataError(path, None, None, f"not a file of results: {error}") from error
    if fields.get("format") not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise DataError(path, None, "format", f"is {fields.get('format')}; this program reads the formats {readable}")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        given = f", got {first['input']!r}" if isinstance(first["input"], str | int | float) and where else ""
        raise DataError(path, None, where, first["msg"] + given) from error
