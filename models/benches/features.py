"""Measures `learn features` against the bare graphs, and how its memory and time grow with the log.

    OMP_NUM_THREADS=1 .venv/bin/python -m benches.features --samples 20000 --rounds 5
    OMP_NUM_THREADS=1 .venv/bin/python -m benches.features --samples 20000 --log-rows 5000000

Log, samples and catalogue are made up: users have 160 events on average (--log-rows sets how many users there are), and
a sample is of a random user at a random time. With --rounds, "ours" is each part from its files to its Parquet file,
and "bare" is the user tower and the CVR head in a plain loop over the very batches that ours ran, kept in memory. Both
are CPU seconds, interleaved. The goal is a ratio of 1.15 or less. With --log-rows, a whole job runs in a process of its
own, without the catalogue's embedding, and its peak memory is printed (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from learn.serving import features
from learn.serving.bulk_embedding import BulkConfig, embed_catalogue
from learn.serving.bundle_inference import GraphsConfig
from learn.serving.feature_inputs import read_parts
from learn.serving.features import FeaturesConfig, PartWorker, compute_features

HERE = Path(__file__).parents[1]
N_ITEMS, CHUNK = 2000, 1 << 20


def write_log(folder: Path, n_rows: int, n_samples: int) -> None:
    """Writes log.parquet, samples.parquet and items.jsonl; the log in pieces, so that this needs no memory either."""
    rng = np.random.default_rng(1)
    n_users = max(1, n_rows // 160)
    with (folder / "items.jsonl").open("w") as file:
        items = ({"id": str(item), "title": f"product number {item}"} for item in range(N_ITEMS))
        file.writelines(json.dumps(item) + "\n" for item in items)

    def table(n: int) -> pa.Table:
        columns = {"user": rng.integers(0, n_users, n), "item": rng.integers(0, N_ITEMS, n).astype(str)}
        return pa.table(columns | {"timestamp": rng.integers(0, 10**9, n)})

    with pq.ParquetWriter(folder / "log.parquet", table(1).schema) as writer:
        for begin in range(0, n_rows, CHUNK):
            writer.write_table(table(min(CHUNK, n_rows - begin)))
    pq.write_table(table(n_samples), folder / "samples.parquet")


def config_of(folder: Path) -> FeaturesConfig:
    """Returns a job of one process on the CPU."""
    return FeaturesConfig(
        HERE / "default",
        str(folder / "log.parquet"),
        str(folder / "samples.parquet"),
        folder / "items.jsonl",
        folder / "out",
        graphs=GraphsConfig("cpu"),
        title=None,
    )


class Recording:
    """A session that keeps what it was given."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, []

    def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Runs the graph."""
        self.calls.append((outputs, feeds))
        return self.session.run(outputs, feeds)


def compare(config: FeaturesConfig, rounds: int) -> None:
    """Prints the CPU seconds of both and their ratio."""
    compute_features(config)
    parts, worker = read_parts(features.work_folder(config.out)) or [], PartWorker(config)
    recorded = PartWorker(config)
    recorded.user_tower, recorded.head = Recording(recorded.user_tower), Recording(recorded.head)
    for part in parts:
        recorded.table(part)
    calls = [(worker.user_tower, *call) for call in recorded.user_tower.calls]
    calls += [(worker.head, *call) for call in recorded.head.calls]
    ratios = []
    for number in range(rounds):
        begin = time.process_time()
        for part in parts:
            worker.write(part)
        middle = time.process_time()
        for session, outputs, feeds in calls:
            session.run(outputs, feeds)
        ours, bare = middle - begin, time.process_time() - middle
        ratios.append(ours / bare)
        print(f"round {number + 1}: ours {ours:.2f} s, bare {bare:.2f} s, ratio {ratios[-1]:.3f}")
    n_samples = sum(part.n_samples for part in parts)
    print(f"{n_samples} samples, ratio {statistics.median(ratios):.3f} (the goal: 1.15 or less)")


def peak_mb() -> float:
    """Returns the peak memory of this process. `resource` would count its parent's, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure_memory(config: FeaturesConfig) -> None:
    """Runs a job whose catalogue is embedded already, and prints its time and the process's peak memory."""
    before, begin = peak_mb(), time.process_time()
    compute_features(config)
    print(f"CPU {time.process_time() - begin:.1f} s; peak memory {peak_mb():.0f} MB, {before:.0f} before the job")


def main() -> None:
    """Makes the data and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log-rows", type=int)
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_folder:
        measure_memory(config_of(arguments.in_folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder, arguments.log_rows or 200_000, arguments.samples)
        config = config_of(folder)
        embed_catalogue(BulkConfig(config.bundle, config.items, config.out / "items", graphs=config.graphs, title=None))
        if arguments.log_rows is None:
            compare(config, arguments.rounds)
        else:
            run([sys.executable, "-m", "benches.features", "--in-folder", folder], check=True)


if __name__ == "__main__":
    main()
