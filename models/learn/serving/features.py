"""Computes for samples of the past what a server would have answered, as a table to train a ranking model on.

    OUT/job.json               the job's inputs and settings; a different job in the same folder is refused
    OUT/items/                 item records of the catalogue, which `bulk_embedding` writes
    OUT/work/                  log and samples, divided by user (`feature_inputs`), and records.npy [I,E+D]
    OUT/part-000000.parquet    one row per sample of some users, in the order of the samples

A row has the sample's own columns and then `mid_emb`, `cvr`, `user_emb` and `item_emb`, as far as they are asked for;
`status`; `history_length`, how many items the user tower read; and `bundle_digest`. As in a server, the history is what
happened strictly before the sample's time, of that the newest `user_tower.max_history` items, and of these the ones
that have a vector. A row whose status is not OK has no vectors.

A part is written under a temporary name and renamed, so a job that was killed continues with the missing parts. Each is
computed by one worker with a session of its own per graph: this process, other processes, or Ray Data actors. Memory is
that of a part, of DuckDB's limit, and of the catalogue's records, and does not grow with the log.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from learn.atomic_file import replacing
from learn.data import DataError
from learn.data.actions import ACTIONS, ActionThresholds
from learn.progress import Rate
from learn.serving import bulk_embedding, bundle_format, feature_inputs, feature_tables
from learn.serving.bulk_embedding import JOB, RECORD, BulkConfig, RayConfig
from learn.serving.bundle_inference import GraphsConfig, session
from learn.serving.digests import bundle_digest, read_manifest
from learn.serving.feature_inputs import (
    INVALID_ITEM,
    ITEM,
    UNKNOWN_ITEM,
    Catalogue,
    HistoryRules,
    Part,
    SortConfig,
)

VECTORS = ("mid_emb", "cvr", "user_emb", "item_emb")
STATUS, HISTORY_LENGTH, BUNDLE_DIGEST = "status", "history_length", "bundle_digest"
STATUSES = {UNKNOWN_ITEM: "UNKNOWN_ITEM", INVALID_ITEM: "INVALID_ITEM"}
# Positions (rows x the longest history among them) per run of the user tower, and samples per run of the CVR head.
TOWER_POSITIONS, HEAD_ROWS = 8192, 4096


@dataclass(frozen=True)
class FeaturesConfig:
    """Settings of one job."""

    bundle: Path
    # Interactions and samples: a file, a folder or a glob each, see `feature_inputs`.
    log: str
    samples: str
    # The catalogue: a .jsonl or .parquet file, or a folder of such files.
    items: Path
    out: Path
    outputs: tuple[str, ...] = ("mid_emb", "cvr")
    # From which value on, and up to which one, a user likes and dislikes an item, for logs without actions, if the
    # bundle does not say it.
    liked_from: float | None = None
    disliked_to: float | None = None
    sort: SortConfig = field(default_factory=SortConfig)
    graphs: GraphsConfig = field(default_factory=GraphsConfig)
    # Processes on this machine, unless the job runs on Ray.
    workers: int = 1
    ray: RayConfig | None = None
    title: str | None = "features"

    def __post_init__(self) -> None:
        unknown = [name for name in self.outputs if name not in VECTORS]
        if unknown or not self.outputs:
            raise ValueError(f"outputs are {list(self.outputs)}, but must be one or more of {', '.join(VECTORS)}")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, but it must be at least 1")


@dataclass(frozen=True)
class Summary:
    """How many samples have each status, in how many parts, and how many of these an earlier run had written."""

    n_by_status: dict[str, int]
    # Samples of users who did nothing before. If it is most of them, the ids of log and samples may not match.
    n_without_history: int
    n_parts: int
    n_parts_kept: int

    def __str__(self) -> str:
        total = sum(self.n_by_status.values())
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.n_by_status.items()))
        counts += f"; {self.n_without_history} without a history"
        return f"{total} samples ({counts}) in {self.n_parts} parts ({self.n_parts_kept} from an earlier run)"


def compute_features(config: FeaturesConfig) -> Summary:
    """Runs the job, or the missing part of it, and prints and returns a summary."""
    config.out.mkdir(parents=True, exist_ok=True)
    _claim(config)
    items = config.out / "items"
    catalogue = BulkConfig(config.bundle, config.items, items, graphs=config.graphs, ray=config.ray)
    bulk_embedding.embed_catalogue(catalogue)
    parts = _divide(config, items)
    missing = [part for part in parts if not part_path(config.out, part).is_file()]
    with Rate(config.title, sum(part.n_samples for part in parts), unit="sample") as rate:
        rate.skip(sum(part.n_samples for part in parts) - sum(part.n_samples for part in missing))
        for n_samples in _run(config, missing):
            rate.add(n_samples)
    summary = _count(config.out, parts, len(parts) - len(missing))
    print(f"{summary}: {config.out}")
    return summary


def history_rules(manifest: dict[str, Any], config: FeaturesConfig) -> HistoryRules:
    """Returns how events become a history for this bundle.

    Values become actions as the manifest says or, where it says nothing, as the config does. Raises ValueError if they
    disagree.
    """
    history, own = manifest["history"], bundle_format.thresholds(manifest)
    told = ActionThresholds(config.liked_from, config.disliked_to)
    if own != ActionThresholds() and told not in (own, ActionThresholds()):
        raise ValueError(
            f"the bundle was trained with liked_from = {own.liked_from} and disliked_to = {own.disliked_to}, but the "
            f"job has {told.liked_from} and {told.disliked_to}: leave --liked-from and --disliked-to out"
        )
    values = told if own == ActionThresholds() else own
    return HistoryRules(tuple(history["actions"]), history["keeps"], values.liked_from, values.disliked_to)


def work_folder(out: Path) -> Path:
    """Returns the folder of the divided log."""
    return out / "work"


def part_path(out: Path, part: Part) -> Path:
    """Returns the file of the part's features."""
    return out / f"part-{part.number:06}.parquet"


def _claim(config: FeaturesConfig) -> None:
    """Writes the job file, or raises DataError if the folder holds features of a different job."""
    manifest = read_manifest(config.bundle)
    tables = {name: feature_tables.files(where) for name, where in (("log", config.log), ("samples", config.samples))}
    job: dict[str, Any] = {
        "bundle_digest": bundle_digest(config.bundle),
        "bundle": "{name} {version}".format(**manifest),
        "outputs": list(config.outputs),
        "history": json.loads(json.dumps(asdict(history_rules(manifest, config)))),
    }
    for name, paths in tables.items():
        # A log may be large, so size and time of change stand for its content.
        job[name] = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    path = config.out / JOB
    if path.is_file() and json.loads(path.read_text()) != job and not any(config.out.glob("part-*.parquet")):
        # An earlier run ended before its first part, such as for a mistake in a file or option that is mended now.
        shutil.rmtree(work_folder(config.out), ignore_errors=True)
        path.unlink()
    bulk_embedding.claim(path, job)


def _divide(config: FeaturesConfig, items: Path) -> list[Part]:
    work = work_folder(config.out)
    if (parts := feature_inputs.read_parts(work)) is not None:
        return parts
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    embedded = sorted(items.glob("part-*.parquet"))
    _write_records(embedded, work / "records.npy")
    rejects = [json.loads(line) for path in sorted(items.glob("rejects-*.jsonl")) for line in path.open()]
    rejected = [reject["id"] for reject in rejects if reject["id"] is not None]
    ids = (pq.read_table(path, columns=["id"]) for path in embedded)
    rules = history_rules(read_manifest(config.bundle), config)
    reserved = {*config.outputs, STATUS, HISTORY_LENGTH, BUNDLE_DIGEST}
    return feature_inputs.divide(
        config.log, config.samples, Catalogue(ids, rejected), rules, work, config.sort, reserved
    )


def _write_records(embedded: list[Path], path: Path) -> None:
    """Writes the records of all parts as one array [I,E+D], which workers map into memory and share."""
    n_items = sum(pq.read_metadata(part).num_rows for part in embedded)
    width = pq.read_schema(embedded[0]).field(RECORD).type.list_size
    records = np.lib.format.open_memmap(path, "w+", np.float32, (n_items, width))
    row = 0
    for part in embedded:
        column = pq.read_table(part, columns=[RECORD])[RECORD].combine_chunks()
        found = column.flatten().to_numpy().reshape(-1, width)
        records[row : row + len(found)] = found
        row += len(found)
    records.flush()


def _run(config: FeaturesConfig, parts: list[Part]) -> Iterator[int]:
    """Yields the number of samples of each part as it is finished."""
    if config.ray is not None and parts:
        rows = bulk_embedding.map_on_ray(PartWorker, config, config.ray, [asdict(part) for part in parts])
        yield from (int(row["n_samples"]) for row in rows)
    elif config.workers == 1 or len(parts) < 2:
        worker = PartWorker(config) if parts else None
        yield from (worker.write(part) for part in parts)
    else:
        # Spawned, because ONNX Runtime's threads do not survive a fork.
        pool = ProcessPoolExecutor(config.workers, get_context("spawn"), _start_worker, (config,))
        with pool:
            jobs = [pool.submit(_work, part) for part in parts]
            try:
                yield from (job.result() for job in as_completed(jobs))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_worker: PartWorker | None = None


def _start_worker(config: FeaturesConfig) -> None:
    global _worker
    _worker = PartWorker(config)


def _work(part: Part) -> int:
    if _worker is None:
        raise RuntimeError("the process was not started by `_start_worker`")
    return _worker.write(part)


@dataclass(frozen=True)
class Windows:
    """Histories of samples: `first` and `end` [w] are rows of a part's events, `window` [n] is that of each sample."""

    first: np.ndarray
    end: np.ndarray
    window: np.ndarray


def windows(events: dict[str, np.ndarray], samples: dict[str, np.ndarray], longest: int) -> Windows:
    """Finds the newest `longest` events before each sample's time; samples that share a history share a window."""
    user, ts = events.get("user", np.empty(0, np.int64)), events.get("ts", np.empty(0, np.int64))
    sample_user, sample_ts = samples[feature_inputs.USER], samples[feature_inputs.TS]
    begins, ends = (np.searchsorted(user, sample_user, side=side) for side in ("left", "right"))
    end = np.empty(len(sample_user), np.int64)
    for of_user in np.split(np.arange(len(end)), np.flatnonzero(np.diff(sample_user)) + 1):
        begin, stop = begins[of_user[0]], ends[of_user[0]]
        end[of_user] = begin + np.searchsorted(ts[begin:stop], sample_ts[of_user], side="left")
    first = np.maximum(begins, end - longest)
    pairs, window = np.unique(np.stack([first, end], axis=1), axis=0, return_inverse=True)
    return Windows(pairs[:, 0], pairs[:, 1], window.reshape(-1))


class PartWorker:
    """Computes parts one after the other, with the bundle's own graphs."""

    def __init__(self, config: FeaturesConfig) -> None:
        self.config, manifest = config, read_manifest(config.bundle)
        self.manifest, self.digest = manifest, bundle_digest(config.bundle)
        self.item_dim = manifest["item_tower"]["dim"]
        self.records = np.load(work_folder(config.out) / "records.npy", mmap_mode="r")
        self.user_tower = session(config.bundle / manifest["user_tower"]["file"], config.graphs)
        self.head = session(config.bundle / manifest["cvr"]["file"], config.graphs)
        known = manifest["history"]["actions"]
        # [1 + number of actions]: the user tower's number of each action.
        self.action_numbers = np.array([0] + [1 + known.index(name) if name in known else 0 for name in ACTIONS])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Ray's interface to `write`: takes parts as columns and returns the counts as a column."""
        parts = [
            Part(*map(int, row)) for row in zip(batch["number"], batch["n_samples"], batch["n_events"], strict=True)
        ]
        return {"n_samples": np.array([self.write(part) for part in parts], dtype=np.int64)}

    def write(self, part: Part) -> int:
        """Writes the features of the part and returns its number of samples."""
        with replacing(part_path(self.config.out, part)) as partial:
            table = self.table(part)
            # Vectors do not become smaller; trying would take longer than computing the scores.
            codecs = {name: "NONE" if name in VECTORS else "ZSTD" for name in table.column_names}
            pq.write_table(table, partial, compression=codecs, use_dictionary=[STATUS, BUNDLE_DIGEST])
        return part.n_samples

    def table(self, part: Part) -> pa.Table:
        """Computes the features of the part."""
        work = work_folder(self.config.out)
        events = feature_inputs.read(feature_inputs.events_of(work, part))
        given = pq.read_table(feature_inputs.samples_of(work, part))
        own = (feature_inputs.RECORD, feature_inputs.USER, feature_inputs.TS, ITEM)
        samples = {name: given[name].to_numpy() for name in own}
        found = windows(events, samples, self.manifest["user_tower"]["max_history"])
        user, length = self.user_embeddings(events, found)
        item, status = samples[ITEM], np.full(len(given), "OK", dtype=object)
        for number, name in STATUSES.items():
            status[item == number] = name
        vectors = self.scores(user, found.window, item)
        is_finite = np.logical_and.reduce([np.isfinite(values).reshape(len(values), -1).all(1) for values in vectors])
        status[(item >= 0) & ~is_finite] = "FAILED"
        columns = {name: given[name] for name in given.column_names if name not in own}
        missing = status != "OK"
        for name, values in zip(VECTORS, vectors, strict=True):
            if name in self.config.outputs:
                columns[name] = _column(values, missing)
        columns[STATUS] = pa.array(status, pa.string()).dictionary_encode()
        columns[HISTORY_LENGTH] = pa.array(length[found.window].astype(np.int32))
        columns[BUNDLE_DIGEST] = pa.array([self.digest] * len(given), pa.string()).dictionary_encode()
        return pa.table(columns).take(np.argsort(samples[feature_inputs.RECORD], kind="stable"))

    def user_embeddings(self, events: dict[str, np.ndarray], found: Windows) -> tuple[np.ndarray, np.ndarray]:
        """Returns the user embedding of each window [w,E], and how many items the tower read [w]."""
        item, action = events.get("item", np.empty(0, np.int32)), events.get("action", np.empty(0, np.uint8))
        known = np.concatenate([[0], np.cumsum(item >= 0)])
        # Items without a vector are left out, so rows of events become rows of the events that have one.
        first, end = known[found.first], known[found.end]
        item, action = item[item >= 0], self.action_numbers[action[item >= 0]]
        length = end - first
        order = np.argsort(length, kind="stable")
        user = np.empty((len(length), self.manifest["user_tower"]["dim"]), np.float32)
        begin = 0
        while begin < len(order):
            rows = order[begin : begin + _batch_size(length[order[begin:]])]
            positions = np.arange(max(1, int(length[rows].max())))[None]
            mask = positions < length[rows][:, None]  # [b,l]
            at = (first[rows][:, None] + positions)[mask]
            user[rows] = self._run_user_tower(mask, item[at], action[at])
            begin += len(rows)
        return user, length

    def _run_user_tower(self, mask: np.ndarray, item: np.ndarray, action: np.ndarray) -> np.ndarray:
        spec = self.manifest["user_tower"]
        adapted = np.zeros((*mask.shape, self.records.shape[1] - self.item_dim), np.float32)
        adapted[mask] = self.records[item, self.item_dim :]
        feeds = {spec["inputs"][0]: adapted, spec["inputs"][1]: mask.astype(np.int64)}
        if len(spec["inputs"]) > 2:
            numbers = np.zeros(mask.shape, np.int64)
            numbers[mask] = action
            feeds[spec["inputs"][2]] = numbers
        return self.user_tower.run(spec["outputs"], feeds)[0]

    def scores(self, user: np.ndarray, window: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, ...]:
        """Returns mid_emb [n,M], cvr [n], user_emb [n,E], item_emb [n,E] of all samples; zeros without an item."""
        spec, n_samples = self.manifest["cvr"], len(item)
        mid_emb, cvr = np.zeros((n_samples, spec["dim"]), np.float32), np.zeros(n_samples, np.float32)
        item_emb = np.zeros((n_samples, self.item_dim), np.float32)
        present = np.flatnonzero(item >= 0)
        # Neighbours share users, so a run needs few of them.
        present = present[np.argsort(window[present], kind="stable")]
        for begin in range(0, len(present), HEAD_ROWS):
            rows = present[begin : begin + HEAD_ROWS]
            item_emb[rows] = self.records[item[rows], : self.item_dim]
            distinct, row = np.unique(window[rows], return_inverse=True)
            feeds = dict(zip(spec["inputs"], (user[distinct], item_emb[rows], row.astype(np.int64)), strict=True))
            mid_emb[rows], cvr[rows] = self.head.run(spec["outputs"], feeds)
        return mid_emb, cvr, user[window], item_emb


def _batch_size(lengths: np.ndarray) -> int:
    """Returns how many of these windows, which are in ascending order of length, fit into one run."""
    cost = np.maximum(lengths[:TOWER_POSITIONS], 1) * np.arange(1, len(lengths[:TOWER_POSITIONS]) + 1)
    return max(1, int(np.searchsorted(cost, TOWER_POSITIONS, side="right")))


def _column(values: np.ndarray, missing: np.ndarray) -> pa.Array:
    """Returns vectors [n,D] or numbers [n] as a column, with nulls where `missing` [n]."""
    if values.ndim == 1:
        return pa.array(values, mask=missing)
    flat, width = pa.array(np.ascontiguousarray(values).ravel()), values.shape[1]
    return pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(missing))


def _count(out: Path, parts: list[Part], n_kept: int) -> Summary:
    counts: dict[str, int] = {}
    n_without = 0
    for part in parts:
        table = pq.read_table(part_path(out, part), columns=[STATUS, HISTORY_LENGTH])
        for entry in table[STATUS].combine_chunks().value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        n_without += int((table[HISTORY_LENGTH].to_numpy() == 0).sum())
    if sum(counts.values()) != sum(part.n_samples for part in parts):
        raise DataError(out, None, None, "the parts do not hold all samples: remove the folder, and compute them again")
    return Summary(counts, n_without, len(parts), n_kept)
