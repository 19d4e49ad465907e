#!/usr/bin/env python3
"""Measures what served features cost a hot request: W1 without them, with 1 % of the requests sampled, and with all.

    make bench-served-features                          (or: .venv/bin/python benches/served_features.py)
    .venv/bin/python benches/served_features.py --rounds 9 --write benches/results/DATE-served-features.md

Each round starts one server after the other, and each server is warmed by a run that does not count. A ratio is that of
two runs of one round. CPU time is user plus system time of the whole process, the thread that writes included; the
drain, which writes the last files, is not in it. A sample that was dropped costs little, so the report says how many
were dropped.

Before each run, as many bytes as it writes are written to the same disk and removed. In a virtual machine the first use
of a page of memory costs several times what writing it costs, and a server that has written for an hour uses none for
the first time.
"""

import argparse
import re
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from run import BUSY, Figures, Server, hot, machine, require_built, serving, table

PERCENT = {"off": None, "1 %": "1", "100 %": "100"}
N_REQUESTS = ["--requests", "2000"]
N_PREPARED_MB = 1024
N_DROPPED = re.compile(r'^midemb_served_features_requests_total\{result="(?!written)\w+"\} (\d+)$', re.MULTILINE)


def settings(percent: str | None, folder: Path) -> dict[str, str]:
    if percent is None:
        return {}
    table = {"FOLDER": str(folder), "PERCENT": percent, "MAX_DISK_MB": "8192"}
    return {f"MIDEMB__SERVED_FEATURES__{key}": value for key, value in table.items()}


def prepare_memory(folder: Path) -> None:
    file = folder / "bytes"
    with file.open("wb") as out:
        for _ in range(N_PREPARED_MB):
            out.write(bytes(1 << 20))
    file.unlink()


def n_dropped(server: Server) -> int:
    return sum(int(n) for n in N_DROPPED.findall(server.scrape()))


def measure(name: str, folder: Path, figures: Figures) -> float:
    """CPU ms per request."""
    with serving(**settings(PERCENT[name], folder)) as server:
        hot(server, *BUSY)
        prepare_memory(folder.parent)
        cpu_ms = hot(server, *BUSY, *N_REQUESTS)["server_cpu_ms"]
        figures[f"{name}: CPU ms per request"].append(cpu_ms)
        if PERCENT[name]:
            figures[f"{name}: samples dropped"].append(n_dropped(server))
    files = list(folder.glob("date=*/*.parquet"))
    if PERCENT[name]:
        figures[f"{name}: MB written"].append(sum(file.stat().st_size for file in files) / 1e6)
        shutil.rmtree(folder)
    return cpu_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    require_built()
    figures: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            # Each order comes first in turn, as the machine's speed drifts.
            names = list(PERCENT)[i % len(PERCENT) :] + list(PERCENT)[: i % len(PERCENT)]
            cpu_ms = {name: measure(name, Path(folder) / "features", figures) for name in names}
            for name in names:
                if PERCENT[name]:
                    figures[f"{name} / off"].append(cpu_ms[name] / cpu_ms["off"])
    rows = [
        [name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values)))]
        for name, values in sorted(figures.items())
    ]
    lines = [f"{args.rounds} rounds of `make bench-served-features` on {machine()}.", ""]
    text = "\n".join([*lines, *table(["what", "median", "lowest", "highest"], rows)]) + "\n"
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
