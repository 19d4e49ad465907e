"""Converts the parts of a bulk job into safetensors files for `midemb cache import`; src/cache/snapshot has the format.

Each file holds `vectors` [n,dim] and `text_digests` [n,16], and the digest of the encoder (content) or the tower (item)
that computed them. A server whose digest differs refuses the file. Files can be imported in any order; if the cache is
too small for all of them, later files evict earlier ones.
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
from learn.serving.bulk_embedding import JOB
from learn.serving.digests import N_BYTES

# The size of the server's own files, so that neither side holds more than this in memory.
FILE_BYTES = 64 << 20
DIGESTS = {"content": b"encoder_digest", "item": b"tower_digest"}


@dataclass(frozen=True)
class _Source:
    """The properties that all parts must share."""

    digest: str
    dim: int
    dtype: np.dtype


def snapshot(parts: Path, out: Path, kind: str) -> list[Path]:
    """Writes KIND-000000.safetensors and so on to `out` and returns the paths. `kind` is content or item."""
    if kind not in DIGESTS:
        raise ValueError(f"kind is {kind!r}, but it must be content or item")
    files = sorted(parts.glob("part-*.parquet"))
    if not files:
        raise DataError(parts, None, None, "there is no part-*.parquet; run `learn embed` first")
    job = parts / JOB
    n_parts = json.loads(job.read_text())["n_parts"] if job.is_file() else len(files)
    if len(files) != n_parts:
        raise DataError(
            parts, None, None, f"only {len(files)} of {n_parts} parts exist; run `learn embed` for the rest"
        )
    sources = {path: _source(path, kind) for path in files}
    source = sources[files[0]]
    for path, other in sources.items():
        if other != source:
            reason = (
                f"the vectors are those of another model ({other.digest}) than in {files[0].name} ({source.digest})"
            )
            raise DataError(path, None, kind, reason)
    out.mkdir(parents=True, exist_ok=True)
    n_rows = max(1, FILE_BYTES // (source.dim * source.dtype.itemsize + N_BYTES))
    written = []
    for digests, vectors in _pieces(files, kind, n_rows):
        written.append(out / f"{kind}-{len(written):06}.safetensors")
        _save(written[-1], kind, source, (digests, vectors))
    print(f"{len(written)} files of {kind} embeddings, digest {source.digest}: {out}")
    return written


def _source(path: Path, kind: str) -> _Source:
    schema = pq.read_schema(path)
    try:
        digest = schema.metadata[DIGESTS[kind]].decode()
        column = schema.field(kind).type
        return _Source(digest, column.list_size, np.dtype(column.value_type.to_pandas_dtype()))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(path, None, kind, f"not a part of a bulk job: {error!r}") from error


def _pieces(files: list[Path], kind: str, n_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields digests [n,16] and vectors [n,dim] with `n_rows` rows per piece; the last piece may be shorter."""
    waiting: list[pa.RecordBatch] = []
    n_waiting = 0
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=min(n_rows, 8192), columns=["text_digest", kind]):
            while n_waiting + batch.num_rows >= n_rows:
                n_taken = n_rows - n_waiting
                yield _arrays([*waiting, batch.slice(0, n_taken)], kind)
                waiting, n_waiting, batch = [], 0, batch.slice(n_taken)
            if batch.num_rows:
                waiting.append(batch)
                n_waiting += batch.num_rows
    if waiting:
        yield _arrays(waiting, kind)


def _arrays(batches: list[pa.RecordBatch], kind: str) -> tuple[np.ndarray, np.ndarray]:
    digests = b"".join(value for batch in batches for value in batch["text_digest"].to_pylist())
    # `flatten` respects that a batch may be a slice of another.
    vectors = [batch[kind].flatten().to_numpy(zero_copy_only=False) for batch in batches]
    dim = batches[0].schema.field(kind).type.list_size
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
