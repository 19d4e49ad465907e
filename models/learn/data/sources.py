"""Where the two tables of the neutral format are: files, folders of partitions or globs, on disk or in an object store.

    /data/shop/interactions.csv           a file: .csv, .jsonl, .jsonl.gz or .parquet
    /data/shop/interactions               a folder of files of one kind, also in subfolders (day=2026-01-01/p0.parquet)
    /data/shop/interactions/*/p*.parquet  a glob; ** stands for any number of folders
    s3://bucket/shop/interactions         the same in an object store (s3:// or gs://)

Files are read in the order of their paths. Names that begin with a dot or an underscore are passed over, as Spark and
others write such files beside their parts. In an object store, a table is in Parquet, or items are in JSON Lines.
Credentials and endpoint come from where the AWS and Google tools take them, such as AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL and AWS_REGION.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import duckdb
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from learn.data.dataset import DataError

SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
SCHEMES = ("s3", "gs")


@dataclass(frozen=True)
class NeutralFiles:
    """The two tables of the neutral format, where they are not `interactions.*` and `items.*` in one folder."""

    interactions: str
    items: str


@dataclass(frozen=True)
class ObjectPath:
    """A file in an object store, which stands where a `Path` may stand; `key` is the URL without its scheme."""

    scheme: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The suffix of the name, with its dot."""
        return PurePosixPath(self.key).suffix

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the object for reading from its beginning."""
        return io.BufferedReader(_store(self.scheme).open_input_stream(self.key))


AnyPath: TypeAlias = Path | ObjectPath


@cache
def _store(scheme: str) -> pyarrow.fs.FileSystem:
    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem()
    # pyarrow reads all other settings of AWS, but not these two.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return pyarrow.fs.S3FileSystem(endpoint_override=endpoint)


class _DuckDbStore(ArrowFSWrapper):
    """An object store as DuckDB reads it. DuckDB's own extension would have to be downloaded first."""

    # Each store is one of its own, so that tests may change endpoints between two of them.
    cachable = False

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        super().__init__(_store(scheme))

    @property
    def protocol(self) -> str:
        """What URLs of this store begin with."""
        return self._scheme

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.partition("://")[2] or path


def register(db: duckdb.DuckDBPyConnection, files: tuple[AnyPath, ...]) -> None:
    """Lets DuckDB read these files, if they are in an object store."""
    for scheme in {file.scheme for file in files if isinstance(file, ObjectPath)}:
        db.register_filesystem(_DuckDbStore(scheme))


def parquet_source(path: AnyPath):
    """What pyarrow opens a Parquet file from; objects are read in pieces, not whole."""
    return path if isinstance(path, Path) else _store(path.scheme).open_input_file(path.key)


def is_url(where: str) -> bool:
    """Whether this is a place in an object store."""
    return where.partition("://")[0] in SCHEMES and "://" in where


def find(where: str) -> tuple[AnyPath, ...]:
    """The files of a table, all of one kind. Raises `DataError` if there are none, or files of several kinds."""
    found = _objects(where) if is_url(where) else _local(where)
    kinds = {kind_of(path) for path in found}
    if not found or None in kinds:
        wrong = next((path for path in found if kind_of(path) is None), where)
        none = "" if found else ", and found no file"
        raise DataError(wrong, None, None, f"expected files that end in {', '.join(SUFFIXES)}{none}")
    if len(kinds) > 1:
        reason = f"there are files of several kinds, {', '.join(sorted(kinds))}; name those of one kind by a glob"
        raise DataError(where, None, None, reason)
    return tuple(found)


def kind_of(path: AnyPath) -> str | None:
    """csv, jsonl or parquet, by the name of the file."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    return suffix and suffix.removeprefix(".").removesuffix(".gz")


def _local(where: str) -> list[Path]:
    path = Path(where)
    if path.is_dir():
        inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        return sorted(path / file for file in inside if not _is_hidden(file.parts))
    if path.is_file():
        return [path]
    # `Path.glob` takes no absolute pattern.
    found = (Path(name) for name in glob.glob(where, recursive=True))  # noqa: PTH207
    n_fixed = len(_until_pattern(path.parts))
    return sorted(file for file in found if file.is_file() and not _is_hidden(file.parts[n_fixed:]))


def _objects(where: str) -> list[ObjectPath]:
    scheme, _, pattern = where.partition("://")
    is_glob = any(sign in pattern for sign in "*?[")
    base = "/".join(_until_pattern(pattern.split("/"))) if is_glob else pattern.rstrip("/")
    try:
        found = _list_objects(scheme, base)
    except OSError as error:
        raise DataError(where, None, None, f"cannot be listed: {str(error).splitlines()[0]}") from error
    if is_glob:
        keys = [key for key in found if _matches(key.split("/"), pattern.split("/"))]
        keys = [key for key in keys if not _is_hidden(tuple(key.removeprefix(base).strip("/").split("/")))]
    else:
        keys = [key for key in found if not _is_hidden(tuple(key.removeprefix(base).strip("/").split("/")))]
    return [ObjectPath(scheme, key) for key in sorted(keys)]


def _until_pattern(parts: Sequence[str]) -> Sequence[str]:
    """The folders before the first one with a sign of a glob; all parts if there is none."""
    first = next((index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return parts[:first]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a key matches a glob, both divided into folders; ** stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[begin:], pattern[1:]) for begin in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _list_objects(scheme: str, base: str) -> list[str]:
    store = _store(scheme)
    if store.get_file_info(base).type == pyarrow.fs.FileType.File:
        return [base]
    listed = store.get_file_info(pyarrow.fs.FileSelector(base, recursive=True, allow_not_found=True))
    return [info.path for info in listed if info.type == pyarrow.fs.FileType.File]


def _is_hidden(parts: tuple[str, ...]) -> bool:
    # A partition such as _day=1 is not hidden.
    return any(part.startswith((".", "_")) and "=" not in part for part in parts)


def partitions(path: AnyPath) -> dict[str, str]:
    """The keys and values of Hive partitions in the folders of a path."""
    folders = str(path).split("/")[:-1]
    return dict(folder.split("=", 1) for folder in folders if "=" in folder)
