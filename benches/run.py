#!/usr/bin/env python3
"""Runs every scenario of `midemb-bench` with the floors and the peers, as docs/performance.md describes.

    make bench                       (or: .venv/bin/python benches/run.py)  five rounds, about thirteen minutes
    .venv/bin/python benches/run.py --rounds 1 --write benches/results/2026-11-24-cpu.md

Each round measures everything once, one after the other, so that the machine's load affects all alike. Figures are
medians over the rounds, with the lowest and the highest; ratios are taken within a round. CPU time is user plus system
time of the whole server process; Triton's includes its models' processes.

In W1, midemb is measured again before each peer and before the graphs, as the machine's speed changes within a round,
too. A ratio is that of two runs that follow each other, and midemb's own figure is the median of its runs. The peers
run with the graphs of format 2, as midemb does, and with those of format 1, which had the adaptor in the user tower.
Triton is sent ids as strings, as midemb is, and as integers, which cost it less.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
from demo import MIDEMB, Server, serving  # noqa: E402

BENCH = ROOT / "target" / "release" / "midemb-bench"
BUNDLE = ROOT / "models" / "default"
PEERS = ROOT / "benches" / "peers"
# About half the capacity of two cores, as the scenario measures how cold work affects hot work, not overload.
W4_RATE = 100
# Eight concurrent requests keep every thread busy. With fewer, threads sleep in between, and the figures include the
# cost of waking up on a virtual machine.
BUSY = ["--concurrency", "8"]
CURVES = {"candidates": [50, 500, 1000, 2000, 4000], "history": [1, 20, 40, 80]}
CURVE_ITEMS = 4000
# Cache sizes in MB for content embeddings and item records; those of the 3000 items take 4.7 and 1.8 MB.
CACHE_SIZES = [(1, 1), (2, 1), (4, 1), (8, 2)]
ZIPF = ["--items", "3000", "--candidates", "50", "--history", "20", "--requests", "400"]

# Values of the peers' options: the formats of the graphs, and what Triton is sent for an item.
FORMATS, ID_KINDS = ("1", "2"), ("strings", "integers")
# Measures W1 on one server, given more arguments of `midemb-bench w1-hot`.
HotBench = Callable[..., dict]
# Adds a figure of one round to the report.
Note = Callable[[str, float], None]
Figures = dict[str, list[float]]


def require_built() -> None:
    """Ends the program unless the server and the load generator are there."""
    for program, target in ((MIDEMB, "build"), (BENCH, "bench-build")):
        if not program.exists():
            sys.exit(f"{program} is missing: run `make {target}`")


def run_json(*command: str) -> list[dict]:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{run.stderr}")
    return [json.loads(line) for line in run.stdout.splitlines()]


def bench(server: Server, scenario: str, *more: str) -> list[dict]:
    addresses = ["--server", server.grpc, "--metrics", server.metrics]
    return run_json(str(BENCH), scenario, "--json", *addresses, *more)


def hot(server: Server, *more: str) -> dict:
    return bench(server, "w1-hot", *more)[0]


def floor(script: str, *more: str) -> dict:
    return run_json(sys.executable, str(PEERS / script), "--bundle", str(BUNDLE), *more)[0]


def triton_bench(triton: tuple[str, str], *more: str) -> dict:
    address, pid = triton
    command = [sys.executable, str(PEERS / "triton_bench.py"), "--bundle", str(BUNDLE)]
    return run_json(*command, "--server", address, "--pid", pid, *more)[0]


@contextmanager
def peer(script: str, *more: str) -> Iterator[tuple[str, str]]:
    """Runs a peer server and yields the two words that it prints after "serving"."""
    command = [sys.executable, str(PEERS / script), "--bundle", str(BUNDLE), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        if words[:1] != ["serving"]:
            sys.exit(f"{script} did not start (exit code {process.wait()})")
        yield words[1], words[2]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@contextmanager
def hot_peers() -> Iterator[dict[str, HotBench]]:
    """Starts W1's peers and yields, by the peer's name in the report, what measures W1 on it."""
    peers: dict[str, HotBench] = {}
    with ExitStack() as running:
        for graphs in FORMATS:
            python = running.enter_context(peer("python_server.py", "--format", graphs, "--proto", str(ROOT / "proto")))
            peers[python_name(graphs)] = partial(hot, Server(*python))
        for graphs, ids in product(FORMATS, ID_KINDS):
            triton = running.enter_context(peer("triton_server.py", "--format", graphs, "--ids", ids))
            peers[triton_name(graphs, ids)] = partial(triton_bench, triton, "--ids", ids)
        yield peers


def python_name(graphs: str) -> str:
    return f"Python server, format-{graphs} graphs"


def triton_name(graphs: str, ids: str) -> str:
    return f"Triton, format-{graphs} graphs, {ids.removesuffix('s')} ids"


# What midemb may cost at most, as a share of a peer's cost.
GOALS = {triton_name(graphs, ids): goal for graphs, goal in (("1", 0.40), ("2", 0.70)) for ids in ID_KINDS}
GRAPHS_GOAL = 1.60
# W1 with two requests at once, which shows what waking up costs, is measured on these peers only.
MEASURED_AT_2 = (python_name("2"), triton_name("2", "strings"))


def hot_round(ours: Server, peers: dict[str, HotBench], note: Note) -> None:
    """Measures W1 on every server, and on ours again before each peer and before the graphs."""
    own, busy = {}, {}
    for name, measure in peers.items():
        own[name], busy[name] = hot(ours, *BUSY), measure(*BUSY)
    beside_graphs = hot(ours, *BUSY)
    floors = {graphs: floor("graphs.py", "--format", graphs) for graphs in ("2", "1")}
    own_at_2, at_2 = hot(ours), {name: peers[name]() for name in MEASURED_AT_2}
    pages = hot(ours, "--pages", "8", *BUSY)

    own_runs = [*own.values(), beside_graphs]
    note("W1 midemb, CPU ms per request", median_of("server_cpu_ms", own_runs))
    for name in peers:
        note(f"W1 {name}, CPU ms per request", busy[name]["server_cpu_ms"])
    note("W1 midemb, 2 requests at once, CPU ms per request", own_at_2["server_cpu_ms"])
    for name in MEASURED_AT_2:
        note(f"W1 {name}, 2 requests at once, CPU ms per request", at_2[name]["server_cpu_ms"])
    note("W1 midemb, sessions of 8 pages, CPU ms per request", pages["server_cpu_ms"])
    note("W1 midemb, requests per second", median_of("good_per_second", own_runs))
    for name in peers:
        note(f"W1 {name}, requests per second", busy[name]["good_per_second"])
    for graphs in FORMATS:
        note(f"W1 the two graphs of format {graphs} in a bare loop, CPU ms", floors[graphs]["graphs_ms"])
        note(f"W1 the matrix products of format {graphs} alone, CPU ms", floors[graphs]["products_ms"])

    for name in peers:
        goal = f" (goal {GOALS[name]:.2f})" if name in GOALS else ""
        note(f"W1 midemb / {name}{goal}", own[name]["server_cpu_ms"] / busy[name]["server_cpu_ms"])
    cpu_ms = beside_graphs["server_cpu_ms"]
    note(f"W1 midemb / graphs of format 2 (goal {GRAPHS_GOAL:.2f})", cpu_ms / floors["2"]["graphs_ms"])
    note("W1 midemb / matrix products of format 2", cpu_ms / floors["2"]["products_ms"])


def median_of(figure: str, runs: list[dict]) -> float:
    return statistics.median(run[figure] for run in runs)


def other_scenarios(ours: Server, note: Note) -> None:
    """Measures W2 to W6."""
    cold, loop = bench(ours, "w2-cold")[0], floor("encoder.py")
    note("W2 midemb, cold items per second", cold["good_per_second"])
    note("W2 midemb, CPU ms per item", cold["server_cpu_ms"])
    note("W2 bare encoder loop, items per second", loop["items_per_second"])
    note("W2 midemb / bare loop (goal 1.15)", cold["good_per_second"] / loop["items_per_second"])

    alone, beside, _ = bench(ours, "w4-hot-while-cold", "--rate", str(W4_RATE), "--requests", "1000")
    note(f"W4 p99 of hot requests alone, {W4_RATE} per second, ms", alone["p99_ms"])
    note("W4 p99 of hot requests beside cold items, ms", beside["p99_ms"])
    note("W4 beside / alone (goal 2)", beside["p99_ms"] / alone["p99_ms"])

    capacity, overload, after = bench(ours, "w5-overload", "--requests", "1500")
    note("W5 capacity, requests per second", capacity["good_per_second"])
    note("W5 goodput at three times that, requests per second", overload["good_per_second"])
    note("W5 late there, percent of what was sent", 100 * overload["late"] / overload["sent"])
    note("W5 goodput / capacity (goal 0.90)", overload["good_per_second"] / capacity["good_per_second"])
    note("W5 memory after / before", after["server_rss_bytes"] / capacity["server_rss_bytes"])

    first, again = bench(ours, "w6-cold-page")
    note("W6 500 cold items with 50 ms: answered after, ms, the slowest of five", first["max_ms"] or 0.0)
    note("W6 of them too late or with no row, percent of pages", 100 * first["late"] / first["sent"])
    note("W6 rows OK in those answers, percent", 100 * (first["rows_ok"] or 0.0))
    note("W6 rows OK when asked again, percent (goal 100)", 100 * again["rows_ok"])


def curve(ours: Server, axis: str) -> list[tuple[int, float]]:
    def cpu_ms(value: int) -> float:
        size = ["--items", str(CURVE_ITEMS), "--requests", "400", f"--{axis}", str(value)]
        return hot(ours, *size)["server_cpu_ms"]

    return [(value, cpu_ms(value)) for value in CURVES[axis]]


def cache_curve() -> list[list[str]]:
    """Measures hit rates, latency, cost and memory by cache size, once the caches have reached their final fill."""
    rows = []
    for content_mb, item_mb in CACHE_SIZES:
        sizes = {"MIDEMB__CACHE__CONTENT_MB": str(content_mb), "MIDEMB__CACHE__ITEM_MB": str(item_mb)}
        with serving(**sizes) as server:
            _, steady = bench(server, "w3-zipf", "--deadline-ms", "1000", *ZIPF)
        hits = [steady["hit_rates"][cache] for cache in ("content", "item")]
        cells = [*(f"{100 * rate:.1f} %" for rate in (*hits, steady["rows_ok"])), f"{steady['server_cpu_ms']:.2f}"]
        cells += [f"{steady[quantile]:.1f}" for quantile in ("p50_ms", "p99_ms")]
        rows.append([f"{content_mb} + {item_mb}", *cells, f"{steady['server_rss_bytes'] / 1e6:.0f}"])
    return rows


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def machine() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":", 1)[1].strip() if models else platform.machine()
    return f"{os.cpu_count()} cores ({name}), shared between server, client and whatever else runs on the machine"


def report(
    figures: Figures, curves: dict[str, list[tuple[int, float]]], by_cache_size: list[list[str]], rounds: int
) -> str:
    rows = [
        [name, *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values)))]
        for name, values in figures.items()
    ]
    lines = [f"{rounds} rounds of `make bench` on {machine()}.", ""]
    lines += table(["what", "median", "lowest", "highest"], rows)
    for axis, points in curves.items():
        other = "history 80" if axis == "candidates" else "500 candidates"
        lines += ["", f"Server CPU ms per request by {axis} ({other}, {CURVE_ITEMS} items, one run each):", ""]
        header = [axis, *(str(value) for value, _ in points)]
        lines += table(header, [["CPU ms", *(f"{ms:.2f}" for _, ms in points)]])
    sent = "W3: 3000 items by Zipf's law (s = 1), 20 history items, 50 candidates, with text, two requests at once"
    lines += ["", f"{sent}, by cache.content_mb + cache.item_mb (one run each):", ""]
    header = ["MB", "content hits", "item hits", "rows in time", "CPU ms", "p50 ms", "p99 ms", "RSS MB"]
    lines += table(header, by_cache_size)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="also write the report to this file")
    args = parser.parse_args()
    require_built()
    figures: Figures = defaultdict(list)

    def note(name: str, value: float) -> None:
        figures[name].append(value)

    with serving() as ours, hot_peers() as peers:
        for i in range(args.rounds):
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
            hot_round(ours, peers, note)
            other_scenarios(ours, note)
        print("curves", file=sys.stderr)
        curves = {axis: curve(ours, axis) for axis in CURVES}
    text = report(figures, curves, cache_curve(), args.rounds)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
