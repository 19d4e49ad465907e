"""Converts the parts of a bulk job into safetensors files for `midemb cache import`; src/cache/snapshot has the format.

Each file holds `vectors` [n,dim] and `text_digests` [n,16], and the digest of the encoder (content) or the tower (item)
that computed them. The vectors of the kind `item` are item records: the item embedding, then what the user tower reads
of the item. A server whose digest differs refuses the file. Files can be imported in any order; if the cache is too
small for all of them, later files evict earlier ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from learn.atomic_file import replacing
from learn.data import DataError
from learn.serving.bulk_embedding import JOB, RECORD
from learn.serving.digests import N_BYTES

# The size of the server's own files, so that neither side holds more than this in memory.
FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class _Kind:
    """One kind of vectors: how messages call them, and where a part has them and the digest of what computed them."""

    title: str
    column: str
    digest: bytes


KINDS = {
    "content": _Kind("content embeddings", "content", b"encoder_digest"),
    "item": _Kind("item records", RECORD, b"tower_digest"),
}


@dataclass(frozen=True)
class _Source:
    """The properties that all parts must share."""

    digest: str
    dim: int
    dtype: np.dtype


def snapshot(parts: Path, out: Path, kind: str) -> list[Path]:
    """Writes KIND-000000.safetensors and so on to `out` and returns the paths. `kind` is content or item."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but it must be {' or '.join(KINDS)}")
    files = sorted(parts.glob("part-*.parquet"))
    if not files:
        raise DataError(parts, None, None, "there is no part-*.parquet; run `learn embed` first")
    job = parts / JOB
    n_parts = json.loads(job.read_text())["n_parts"] if job.is_file() else len(files)
    if len(files) != n_parts:
        raise DataError(
            parts, None, None, f"only {len(files)} of {n_parts} parts exist; run `learn embed` for the rest"
        )
    vectors_of = KINDS[kind]
    sources = {path: _source(path, vectors_of) for path in files}
    source = sources[files[0]]
    for path, other in sources.items():
        if other != source:
            reason = (
                f"the vectors are those of another model ({other.digest}) than in {files[0].name} ({source.digest})"
            )
            raise DataError(path, None, vectors_of.column, reason)
    out.mkdir(parents=True, exist_ok=True)
    n_rows = max(1, FILE_BYTES // (source.dim * source.dtype.itemsize + N_BYTES))
    written = []
    for digests, vectors in _pieces(files, vectors_of.column, n_rows):
        written.append(out / f"{kind}-{len(written):06}.safetensors")
        _save(written[-1], kind, source, (digests, vectors))
    print(f"{len(written)} files of {vectors_of.title}, digest {source.digest}: {out}")
    return written


def _source(path: Path, kind: _Kind) -> _Source:
    schema = pq.read_schema(path)
    if kind.column == RECORD and RECORD not in schema.names and "item" in schema.names:
        reason = (
            "an earlier version of `learn embed` wrote this part, without what the user tower reads of an item; embed "
            "the catalogue again, in an empty folder"
        )
        raise DataError(path, None, "item", reason)
    try:
        digest = schema.metadata[kind.digest].decode()
        column = schema.field(kind.column).type
        return _Source(digest, column.list_size, np.dtype(column.value_type.to_pandas_dtype()))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(path, None, kind.column, f"not a part of a bulk job: {error!r}") from error


def _pieces(files: list[Path], column: str, n_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields digests [n,16] and vectors [n,dim] with `n_rows` rows per piece; the last piece may be shorter."""
    waiting: list[pa.RecordBatch] = []
    n_waiting = 0
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=min(n_rows, 8192), columns=["text_digest", column]):
            while n_waiting + batch.num_rows >= n_rows:
                n_taken = n_rows - n_waiting
                yield _arrays([*waiting, batch.slice(0, n_taken)], column)
                waiting, n_waiting, batch = [], 0, batch.slice(n_taken)
            if batch.num_rows:
                waiting.append(batch)
                n_waiting += batch.num_rows
    if waiting:
        yield _arrays(waiting, column)


def _arrays(batches: list[pa.RecordBatch], column: str) -> tuple[np.ndarray, np.ndarray]:
    digests = b"".join(value for batch in batches for value in batch["text_digest"].to_pylist())
    # `flatten` respects that a batch may be a slice of another.
    vectors = [batch[column].flatten().to_numpy(zero_copy_only=False) for batch in batches]
    dim = batches[0].schema.field(column).type.list_size
    return np.frombuffer(digests, np.uint8).reshape(-1, N_BYTES), np.concatenate(vectors).reshape(-1, dim)


def _save(path: Path, kind: str, source: _Source, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    digests, vectors = arrays
    if not np.isfinite(vectors).all():
        raise DataError(path, None, kind, "a vector is not finite, so the server would refuse the file")
    metadata = {
        "format": "midemb-vectors",
        "format_version": "1",
        "kind": kind,
        "digest": source.digest,
        "dim": str(source.dim),
        "n": str(len(vectors)),
    }
    with replacing(path) as partial:
        save_file({"vectors": vectors, "text_digests": digests}, partial, metadata=metadata)
