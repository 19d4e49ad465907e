"""Measures `learn prepare` and the training of the towers on a made-up log: time, peak memory, and several processes.

    .venv/bin/python -m benches.train_scale --events 5000000 --items 1000000 --ranks 1 2
    .venv/bin/python -m benches.train_scale --events 200000 --items 20000 --steps 20

The log is in folders of Parquet, with milliseconds; the popularity of items follows Zipf's law, and content is random,
in fp16. Every phase runs in processes of its own, with one thread each:

    prepare    raw files -> prepared folder
    train      the trainer's set-up, then `--steps` steps; with several ranks under torchrun, on the CPU
    validate   a sample of the validation events, each ranked among the whole catalogue

Peak memory is that of the process (Linux, VmHWM), which counts pages of memory-mapped files that are in memory; such
pages are given back when memory is short, and `anonymous` is what is left without them. Two ranks share the users of a
step, and should do 1.6 times as many steps per second as one, or more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from learn import data
from learn.evaluation.retrieval import retrieve
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import Learn
from learn.training import data_parallel
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer

CHUNK = 1 << 20
EVENTS_PER_USER = 50
# 2026-01-01 in milliseconds, and a year.
BEGIN, YEAR = 1_767_225_600_000, 365 * 86_400_000
# Steps before the clock starts.
WARM_UP = 2


@dataclass(frozen=True)
class Sizes:
    """How large the made-up data are, and how much is measured."""

    events: int = 5_000_000
    items: int = 1_000_000
    users: int = 100_000
    dim: int = 384
    steps: int = 50
    batch_users: int = 32
    validation: int = 100
    memory_mb: int = 1024


def write_data(folder: Path, sizes: Sizes) -> None:
    """Writes raw/ (interactions and items) and content.npy piece by piece, unless they are there."""
    marker, wanted = folder / "sizes.json", json.dumps([sizes.events, sizes.items, sizes.users, sizes.dim])
    if marker.is_file() and marker.read_text() == wanted:
        return
    rng = np.random.default_rng(1)
    popularity = np.cumsum(1.0 / np.arange(1, sizes.items + 1))
    for number, begin in enumerate(range(0, sizes.events, CHUNK)):
        n = min(CHUNK, sizes.events - begin)
        rank = np.searchsorted(popularity, rng.random(n) * popularity[-1])
        table = {"user": rng.integers(0, sizes.users, n), "item": np.minimum(rank, sizes.items - 1)}
        part = folder / "raw" / "interactions" / f"part={number:04}"
        part.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table | {"timestamp": BEGIN + rng.integers(0, YEAR, n)}), part / "0.parquet")
    titles = [f"product number {item}" for item in range(sizes.items)]
    pq.write_table(pa.table({"id": list(map(str, range(sizes.items))), "title": titles}), folder / "raw/items.parquet")
    shape = (sizes.items, sizes.dim)
    content = np.lib.format.open_memmap(folder / "content.npy", mode="w+", dtype=np.float16, shape=shape)
    for begin in range(0, sizes.items, CHUNK // 16):
        rows = content[begin : begin + CHUNK // 16]
        rows[:] = rng.standard_normal(rows.shape, dtype=np.float32) * sizes.dim**-0.5
    content.flush()
    marker.write_text(wanted)


def measure_prepare(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Prepares the log."""
    # What the imports alone take, PyTorch above all.
    before, begin, cpu = memory()["peak_mb"], time.monotonic(), time.process_time()
    config = data.PrepareConfig(memory_mb=sizes.memory_mb, threads=1)
    meta = data.prepare(folder / "raw", folder / "data", config)
    found = {"seconds": time.monotonic() - begin, "cpu_seconds": time.process_time() - cpu, "events": meta.n_events}
    return found | {"before_mb": before} | memory()


def measure_training(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Makes a trainer and does the steps; in several processes, the figures are those of this one."""
    data_parallel.start()
    begin = time.monotonic()
    model, dataset = _model(folder), data.read_prepared(folder / "data")
    config = TrainConfig(steps=WARM_UP + sizes.steps, warmup=1, users=sizes.batch_users)
    trainer = Trainer(config, model, dataset, data.split(dataset.sequences, data.SplitConfig()))
    found = {"set_up_seconds": time.monotonic() - begin}
    for number in range(WARM_UP):
        trainer.step(number)
    begin, cpu = time.monotonic(), time.process_time()
    for number in range(WARM_UP, WARM_UP + sizes.steps):
        trainer.step(number)
    per_second = sizes.steps / (time.monotonic() - begin)
    found |= {"steps_per_second": per_second, "users_per_second": per_second * sizes.batch_users}
    found |= {"cpu_seconds_per_step": (time.process_time() - cpu) / sizes.steps} | memory()
    data_parallel.stop()
    return found


def measure_validation(folder: Path, sizes: Sizes) -> dict[str, float]:
    """Ranks the catalogue for a sample of the validation events."""
    model, dataset = _model(folder), data.read_prepared(folder / "data")
    held_out = data.split(dataset.sequences, data.SplitConfig()).validation
    events = data.sample_events(held_out, sizes.validation, seed=1)
    begin = time.monotonic()
    retrieve(model, dataset, events)
    return {"seconds": time.monotonic() - begin, "events": len(events)} | memory()


PHASES = {"prepare": measure_prepare, "train": measure_training, "validate": measure_validation}


def _model(folder: Path) -> Learn:
    torch.manual_seed(1)
    content = torch.from_numpy(np.load(folder / "content.npy", mmap_mode="c"))
    return Learn(Pch(PchConfig(content_dim=content.shape[1])), content)


def memory() -> dict[str, float]:
    """Peak memory of this process in MB, and what of its memory is not in files now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_mb": "VmHWM", "anonymous_mb": "RssAnon"}
    return {name: int(status[field].split()[0]) / 1024 for name, field in names.items()}


def run_phase(phase: str, folder: Path, sizes: Sizes, ranks: int = 1) -> list[dict[str, float]]:
    """Runs a phase in `ranks` processes, and returns the figures of each."""
    results = folder / "results"
    results.mkdir(exist_ok=True)
    for path in results.iterdir():
        path.unlink()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benches.train_scale", "--phase", phase, "--folder", str(folder)]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(sizes).items()]
    subprocess.run([*command, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [json.loads(path.read_text()) for path in sorted(results.iterdir())]


def report(phase: str, figures: list[dict[str, float]]) -> None:
    """Prints the figures of each process of a phase."""
    for rank, found in enumerate(figures):
        shown = ", ".join(f"{name} {value:,.3f}" for name, value in found.items())
        print(f"{phase:10} rank {rank} of {len(figures)}: {shown}", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Makes the data, runs the phases and prints their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in asdict(Sizes()).items():
        default = None if name == "users" else value
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of processes to train in")
    parser.add_argument("--folder", type=Path, help="kept, so that a second call does not make the data again")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args(argv))
    ranks, folder, phase = (arguments.pop(name) for name in ("ranks", "folder", "phase"))
    arguments["users"] = arguments["users"] or max(1, arguments["events"] // EVENTS_PER_USER)
    sizes = Sizes(**arguments)
    if phase is not None:
        torch.set_num_threads(1)
        figures = PHASES[phase](folder, sizes)
        (folder / "results" / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder, sizes)
        report("prepare", run_phase("prepare", folder, sizes))
        rates = {}
        for n_ranks in ranks:
            figures = run_phase("train", folder, sizes, n_ranks)
            rates[n_ranks] = figures[0]["users_per_second"]
            report("train", figures)
        if len(rates) > 1:
            least, most = min(rates), max(rates)
            print(f"{most} ranks do {rates[most] / rates[least]:.2f} times the users per second of {least}")
        report("validate", run_phase("validate", folder, sizes))


if __name__ == "__main__":
    main()
