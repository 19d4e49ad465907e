"""Computes content embeddings and item records of a whole catalogue offline, with a bundle's own files, as Parquet.

    OUT/job.json                  the job's inputs and settings; a different job in the same folder is refused
    OUT/part-000000.parquet       one shard, with columns id, text_digest, content, record
    OUT/rejects-000000.jsonl      the rows of that shard that were left out, each with its id and the reason

An item record is what the item tower computes: the item embedding, then what the user tower reads of the item. The
metadata of a part says how long each of the two is (`item_dim`, `adapted_dim`) and which bundle computed them.

A part is written under a temporary name, synced and renamed, after its rejects. A job that was killed therefore
continues with the missing parts, and parts and rejects together have as many rows as the catalogue. Each shard is read,
embedded and written by one worker: this process, or Ray Data actors on one or more machines, which must see the same
folders. `cache_snapshot.snapshot` converts the parts into files that a server imports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from learn.atomic_file import replacing
from learn.data import DataError
from learn.progress import Rate
from learn.serving import item_shards
from learn.serving.bundle_inference import BundleGraphs, GraphsConfig
from learn.serving.digests import N_BYTES, bundle_digest, read_manifest, text_digest
from learn.serving.item_shards import Item, Reject, Shard

JOB = "job.json"
RECORD = "record"
CONTENT_DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class BulkConfig:
    """Settings of one bulk embedding job."""

    bundle: Path
    # A .jsonl or .parquet file, or a folder of such files.
    items: Path
    out: Path
    # The rows that one worker holds in memory, and that a killed job may have to repeat per worker.
    shard_rows: int = 10_000
    # float16 halves the largest column, with a relative error of up to 2**-11 per value.
    content_dtype: str = "float32"
    # The server's limit (`limits.max_text_bytes`): longer texts are rejected here as they are there.
    max_text_bytes: int = 8192
    graphs: GraphsConfig = field(default_factory=GraphsConfig)
    # None runs the job in this process.
    ray: RayConfig | None = None
    title: str | None = "embed items"

    def __post_init__(self) -> None:
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows is {self.shard_rows}, but it must be at least 1")
        if self.content_dtype not in CONTENT_DTYPES:
            raise ValueError(f"content_dtype is {self.content_dtype!r}, but must be one of {', '.join(CONTENT_DTYPES)}")


@dataclass(frozen=True)
class RayConfig:
    """Ray Data workers. Every machine must see the bundle, the catalogue and the output under the same paths."""

    # A cluster's address, such as "auto" or "ray://head:10001"; None starts Ray on this machine.
    address: str | None = None
    workers: int = 2
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0


@dataclass(frozen=True)
class Summary:
    """How many rows of a catalogue were embedded and rejected, and in how many parts."""

    n_items: int
    n_rejects: int
    n_parts: int
    # How many of the parts an earlier run had written.
    n_parts_kept: int


def embed_catalogue(config: BulkConfig) -> Summary:
    """Runs the job, or the missing part of it, and prints and returns a summary."""
    shards, digests = item_shards.plan(config.items, config.shard_rows)
    config.out.mkdir(parents=True, exist_ok=True)
    _claim(config, digests, len(shards))
    missing = [shard for shard in shards if not _part(config.out, shard.number).is_file()]
    with Rate(config.title, sum(shard.n_rows for shard in shards)) as rate:
        rate.skip(sum(shard.n_rows for shard in shards) - sum(shard.n_rows for shard in missing))
        for n_rows, n_tokens in _run(config, missing):
            rate.add(n_rows, n_tokens)
    summary = _count(config.out, shards, len(shards) - len(missing))
    print(
        f"{summary.n_items} items embedded, {summary.n_rejects} rejected, in {summary.n_parts} parts "
        f"({summary.n_parts_kept} from an earlier run): {config.out}"
    )
    return summary


def _run(config: BulkConfig, shards: list[Shard]) -> Iterator[tuple[int, int]]:
    """Yields the number of rows and tokens of each shard as it is finished."""
    if not shards:
        return
    if config.ray is not None:
        rows = map_on_ray(ShardEmbedder, config, config.ray, [asdict(shard) for shard in shards])
        yield from ((int(row["n_rows"]), int(row["n_tokens"])) for row in rows)
        return
    worker = ShardEmbedder(config)
    for shard in shards:
        yield worker.embed(shard)


def map_on_ray(worker: type, config: Any, ray_config: RayConfig, parts: list[dict[str, Any]]) -> Iterator[dict]:
    """Yields the rows that `worker(config)` returns for the parts, each computed by one of several Ray Data actors."""
    import ray

    if not ray.is_initialized():
        # Workers import this package from its path here, independent of the folder that the job was started in.
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": path}}, "log_to_driver": False}
        if ray_config.address is None:
            options |= {"num_cpus": ray_config.workers * ray_config.cpus_per_worker, "include_dashboard": False}
        ray.init(address=ray_config.address, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        worker,
        fn_constructor_args=(config,),
        batch_size=1,
        concurrency=ray_config.workers,
        num_cpus=ray_config.cpus_per_worker,
        num_gpus=ray_config.gpus_per_worker,
    )
    yield from done.iter_rows()


class ShardEmbedder:
    """Embeds shards one after the other. On Ray each actor is one instance, so it loads the graphs once."""

    def __init__(self, config: BulkConfig) -> None:
        self.config = config
        self.graphs = BundleGraphs(config.bundle, config.graphs)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ray's interface to `embed`: takes shards as columns and returns the counts as columns."""
        names = list(batch)
        shards = [Shard(**dict(zip(names, row, strict=True))) for row in zip(*batch.values(), strict=True)]
        plain = [Shard(int(s.number), str(s.file), int(s.begin), int(s.first_row), int(s.n_rows)) for s in shards]
        counts = np.array([self.embed(shard) for shard in plain], dtype=np.int64)
        return {"n_rows": counts[:, 0], "n_tokens": counts[:, 1]}

    def embed(self, shard: Shard) -> tuple[int, int]:
        """Writes the shard's part and rejects; returns its number of rows and of encoded tokens."""
        items, rejects = item_shards.read(shard, self.config.max_text_bytes)
        table, faults, n_tokens = self._table(items)
        rejects += [Reject(shard.file, item.row, item.id, reason) for item, reason in faults]
        lines = "".join(reject.to_json() + "\n" for reject in sorted(rejects, key=lambda reject: reject.row))
        with replacing(_rejects(self.config.out, shard.number)) as partial:
            partial.write_text(lines)
        with replacing(_part(self.config.out, shard.number)) as partial:
            pq.write_table(table, partial, compression="zstd")
        return shard.n_rows, n_tokens

    def _table(self, items: list[Item]) -> tuple[pa.Table, list[tuple[Item, str]], int]:
        digests = [text_digest(item.text) for item in items]
        # A text that several items share is encoded once.
        place = {digest: position for position, digest in enumerate(dict.fromkeys(digests))}
        unique = dict(zip(digests, (item.text for item in items), strict=True))
        content, faults, n_tokens = self.graphs.content([unique[digest] for digest in place])
        record = self.graphs.record(content)
        for row in np.flatnonzero(~np.isfinite(record).all(axis=1)):
            faults.setdefault(int(row), "the item tower returned a vector that is not finite")
        rows = [place[digest] for digest in digests]
        kept = [n for n, row in enumerate(rows) if row not in faults]
        at = np.array([rows[n] for n in kept], dtype=np.int64)
        columns = {
            "id": pa.array([items[n].id for n in kept], pa.string()),
            "text_digest": pa.array([digests[n] for n in kept], pa.binary(N_BYTES)),
            "content": _vectors(content[at].astype(CONTENT_DTYPES[self.config.content_dtype])),
            RECORD: _vectors(record[at]),
        }
        dims = {"item_dim": str(self.graphs.item_dim), "adapted_dim": str(self.graphs.adapted_dim)}
        table = pa.table(columns).replace_schema_metadata(self.graphs.digests | dims)
        return table, [(items[n], faults[row]) for n, row in enumerate(rows) if row in faults], n_tokens


def _vectors(rows: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def _claim(config: BulkConfig, digests: dict[str, str], n_parts: int) -> None:
    job: dict[str, Any] = {
        "bundle_digest": bundle_digest(config.bundle),
        "bundle": "{name} {version}".format(**read_manifest(config.bundle)),
        "shard_rows": config.shard_rows,
        "content_dtype": config.content_dtype,
        "max_text_bytes": config.max_text_bytes,
        "files": digests,
        "n_parts": n_parts,
    }
    claim(config.out / JOB, job)


def claim(path: Path, job: dict[str, Any]) -> None:
    """Writes a job file, or raises DataError if there is one of a different job."""
    if not path.is_file():
        with replacing(path) as partial:
            partial.write_text(json.dumps(job, indent=1) + "\n")
        return
    there = json.loads(path.read_text())
    for name, value in job.items():
        if there.get(name) != value:
            raise DataError(path, None, name, f"the folder holds another job ({there.get(name)!r}, not {value!r})")


def _count(out: Path, shards: list[Shard], n_kept: int) -> Summary:
    n_items = sum(pq.read_metadata(_part(out, shard.number)).num_rows for shard in shards)
    n_rejects = sum(_rejects(out, shard.number).read_bytes().count(b"\n") for shard in shards)
    n_rows = sum(shard.n_rows for shard in shards)
    if n_items + n_rejects != n_rows:
        raise DataError(out, None, None, f"{n_items} items and {n_rejects} rejects do not add up to {n_rows} rows")
    return Summary(n_items, n_rejects, len(shards), n_kept)


def _part(out: Path, number: int) -> Path:
    return out / f"part-{number:06}.parquet"


def _rejects(out: Path, number: int) -> Path:
    return out / f"rejects-{number:06}.jsonl"
