#!/usr/bin/env python3
"""Runs fuzz targets, two at a time on two cores, and prints a line of figures for each.

    make fuzz-smoke                          a fixed number of executions from the committed corpora, in CI
    make fuzz FUZZ_SECONDS=600               every target for ten minutes
    make fuzz FUZZ_TARGETS="config trace"    two of them
    python3 fuzz/run.py --runs 1000000       a million executions of each, without building them anew

New inputs are kept in target/fuzz/<target>/corpus, and the next run starts from them. An input that fails is written
beside that folder, and its path is printed with the end of the log.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUZZ = ROOT / "fuzz"
OUT = ROOT / "target" / "fuzz"
TARGETS = sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs"))
# Executions of a smoke run, a few seconds each on one core. A number rather than a time, so that every machine runs the
# same inputs.
SMOKE_RUNS = {
    "answer": 1_000_000,
    "config": 40_000,
    "get_mid_emb": 10_000,
    "grpc_timeout": 2_000_000,
    "item_text": 30_000,
    "warm_items": 10_000,
}
SMOKE_RUNS_OF_OTHERS = 80_000
LIMITS = ["-max_len=4096", "-timeout=20", "-rss_limit_mb=2048"]
LOG_LINES = 25


@dataclass
class Run:
    target: str
    status: int
    seconds: float
    log: str

    def figure(self, pattern: str) -> str:
        found = re.findall(pattern, self.log)
        return found[-1] if found else "0"

    def row(self) -> str:
        n_executions = int(self.figure(r"stat::number_of_executed_units:\s+(\d+)"))
        n_branches, n_inputs = self.figure(r"\bcov: (\d+)"), self.figure(r"\bcorp: (\d+)/")
        per_second = round(n_executions / self.seconds)
        return f"| `{self.target}` | {n_executions} | {per_second} | {n_branches} | {n_inputs} |"


HEADER = "| target | executions | per second | branches covered | inputs kept |\n| --- | --- | --- | --- | --- |"


def run(target: str, corpus: Path, bounds: list[str]) -> Run:
    corpus.mkdir(parents=True, exist_ok=True)
    failures = OUT / target
    failures.mkdir(parents=True, exist_ok=True)
    command = [str(ROOT / "target" / "debug" / target), str(corpus), str(FUZZ / "corpus" / target)]
    dictionary = FUZZ / "dictionaries" / f"{target}.dict"
    if dictionary.exists():
        command.append(f"-dict={dictionary}")
    command += [*LIMITS, *bounds, f"-artifact_prefix={failures}/", "-print_final_stats=1"]
    # Settings of this machine would change what a config means. Backtraces would push the reason out of the log's end.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIDEMB__")}
    environment["RUST_BACKTRACE"] = "0"
    began = time.monotonic()
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    seconds = time.monotonic() - began
    return Run(target, ended.returncode, seconds, ended.stdout.decode(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="those to run instead of all")
    how_long = parser.add_mutually_exclusive_group(required=True)
    how_long.add_argument("--smoke", action="store_true", help="a fixed number of executions, the same ones each time")
    how_long.add_argument("--seconds", type=int, help="the time of each target")
    how_long.add_argument("--runs", type=int, help="the executions of each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="targets that run at once (default: cores)")
    arguments = parser.parse_args()
    targets = arguments.targets or TARGETS
    if unknown := set(targets) - set(TARGETS):
        sys.exit(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")

    with tempfile.TemporaryDirectory() as empty, ThreadPoolExecutor(arguments.jobs) as pool:

        def start(target: str) -> Run:
            if arguments.smoke:
                n_runs = SMOKE_RUNS.get(target, SMOKE_RUNS_OF_OTHERS)
                return run(target, Path(empty) / target, [f"-runs={n_runs}", "-seed=1"])
            bound = f"-max_total_time={arguments.seconds}" if arguments.seconds else f"-runs={arguments.runs}"
            return run(target, OUT / target / "corpus", [bound])

        print(HEADER)
        failed = []
        for ended in pool.map(start, targets):
            print(ended.row(), flush=True)
            if ended.status != 0:
                failed.append(ended)
    for ended in failed:
        end_of_log = "\n".join(ended.log.splitlines()[-LOG_LINES:])
        print(f"\n{ended.target} failed:\n{end_of_log}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
