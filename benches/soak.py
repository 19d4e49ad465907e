#!/usr/bin/env python3
"""Runs a server with small caches under mixed traffic for some time, and checks that nothing grows, leaks or changes.

    make soak SOAK_MINUTES=60
    .venv/bin/python benches/soak.py --minutes 20 --report benches/results/2026-11-27-soak.md

`soak_traffic.py` has the callers and their rates. Each minute is one round: traffic, and then an idle moment at which
bundle a is in force, bundle b is at hand for a rollback, all queues are empty and one connection to each gRPC listener
is open. Memory, descriptors and threads are compared between such moments only: the median of the first three rounds
after the warm phase (a fifth of all rounds) against the median of the last three. In these rounds the idle moment lasts
14 s, as a thread for blocking work ends after 10 s without any.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reload import BUNDLE, FOLDER, variant
from soak_checks import (
    Checks,
    Plan,
    Round,
    Watch,
    check_calls,
    check_growth,
    check_log,
    check_lookups,
    check_metrics,
    check_restart,
)
from soak_report import Soak, report
from soak_server import Sample, Server
from soak_traffic import Pushes, Traffic

ROOT = Path(__file__).resolve().parent.parent
MIDEMB = ROOT / "target" / "release" / "midemb"
SAMPLE_SECONDS = 5
LONG_IDLE_SECONDS, SHORT_IDLE_SECONDS = 14, 2
N_IDLE_SAMPLES = 5
IDLE_WITHIN_SECONDS = 60
MAX_FILL_ROUNDS, FILL_ENTRIES = 20, 2000


def bench_of(binary: Path) -> Path:
    """Both programs are built into one folder."""
    return binary.with_name("midemb-bench")


@contextmanager
def watching(server: Server, watch: Watch) -> Iterator[None]:
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            try:
                watch.add(server.sample())
            except OSError as error:
                watch.failed_scrapes.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def fill(server: Server, traffic: Traffic) -> None:
    """Fills the caches of contents, items and known texts until they evict, without the encoder's help."""
    for _ in range(MAX_FILL_ROUNDS):
        evictions = server.sample().values("midemb_cache_evictions_total", "cache")
        if all(evictions.get(cache, 0) > 0 for cache in ("content", "item", "known_items")):
            return
        traffic.fill(FILL_ENTRIES)
    sys.exit(f"the caches do not evict after {MAX_FILL_ROUNDS * FILL_ENTRIES} entries: {evictions}")


def idle(server: Server, seconds: float) -> tuple[list[Sample], dict[str, float]]:
    """Waits until nothing is under way and `seconds` have passed; returns samples, and what the last has above zero."""
    began = time.monotonic()
    while server.sample().not_zero() and time.monotonic() - began < IDLE_WITHIN_SECONDS:
        time.sleep(0.5)
    time.sleep(max(0.0, seconds - (time.monotonic() - began)))
    samples = []
    for _ in range(N_IDLE_SAMPLES):
        samples.append(server.sample())
        time.sleep(0.4)
    return samples, samples[-1].not_zero()


def one_round(
    server: Server, traffic: Traffic, watch: Watch, seconds: float, idle_seconds: float, began: float
) -> Round:
    start = server.sample()
    with watching(server, watch):
        traffic.run_for(max(5.0, seconds - idle_seconds - 4))
    cpu_seconds = (end := server.sample()).total("process_cpu_seconds_total") - start.total("process_cpu_seconds_total")
    traffic.pushes.settle(traffic.admin, traffic.pb)
    traffic.count("probe", traffic.ask_probe)
    samples, not_idle = idle(server, idle_seconds)
    watch.add(samples[-1])
    rss, anonymous = (statistics.median(getattr(s, name) for s in samples) for name in ("rss_mb", "anonymous_mb"))
    last = samples[-1]
    # What is leaked stays; a snapshot that is being written has a file open for a moment.
    n_files, n_threads = (min(getattr(s, name) for s in samples) for name in ("n_files", "n_threads"))
    minute = (time.monotonic() - began) / 60
    busy = cpu_seconds / (end.at - start.at)
    return Round(minute, rss, anonymous, n_files, n_threads, busy, last, not_idle)


def soak(args: argparse.Namespace, folder: Path) -> Soak:
    bundles = {"a": BUNDLE, "b": variant(1)}
    pushes = Pushes(bundles)
    config = folder / "midemb.toml"
    config.write_text(pushes.config(a=100))
    plan, watch, checks, rounds = Plan.of(args.minutes), Watch(), Checks(), []
    server = Server(args.binary, config, folder / "midemb.log")
    try:
        traffic = Traffic(server.addresses, pushes, bench_of(args.binary))
        loads = [os.getloadavg()[0]]
        print(f"serving, process {server.process.pid}; filling the caches", flush=True)
        fill(server, traffic)
        print(f"{plan.n_rounds} rounds of {plan.seconds:.0f} s", flush=True)
        began, n_errors = time.monotonic(), 0
        for i in range(plan.n_rounds):
            idle_seconds = LONG_IDLE_SECONDS if plan.is_compared(i) else SHORT_IDLE_SECONDS
            rounds.append(one_round(server, traffic, watch, plan.seconds, idle_seconds, began))
            loads.append(os.getloadavg()[0])
            print(progress(plan, rounds, traffic, began), flush=True)
            for error in traffic.calls.errors[n_errors:]:
                print(f"  {error}", flush=True)
            n_errors = len(traffic.calls.errors)
        check_growth(checks, plan, rounds)
        check_metrics(checks, plan, rounds, watch)
        check_lookups(checks, server, traffic)
        digest = traffic.admin.GetStatus(traffic.pb.GetStatusRequest(), timeout=10).config.digest
        traffic.close()
        code, seconds = server.stop()
        checks.add("SIGTERM ends the server with 0", code == 0, f"exit code {code} after {seconds:.1f} s")
        warnings = check_log(checks, server)
        check_restart(checks, args.binary, config, traffic, digest)
        check_calls(checks, traffic)
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    return Soak(args.minutes, args.note, plan, checks, rounds, watch, traffic, warnings, loads)


def progress(plan: Plan, rounds: list[Round], traffic: Traffic, began: float) -> str:
    last, n_left = rounds[-1], plan.n_rounds - len(rounds)
    left = n_left * (time.monotonic() - began) / len(rounds)
    n_calls, n_errors = sum(traffic.calls.counts.values()), len(traffic.calls.errors)
    figures = (
        f"{last.rss_mb:.1f} MiB ({last.anonymous_mb:.1f} anonymous), {last.n_files} files, {last.n_threads} threads"
    )
    ends = f"{left / 60:.1f} min left" if n_left else "done"
    busy = f"{last.busy:.2f} cores busy"
    return f"round {len(rounds)}/{plan.n_rounds}: {figures}, {busy}, {n_calls} calls, {n_errors} errors; {ends}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="at least 1; filling the caches is not counted")
    parser.add_argument("--binary", type=Path, default=MIDEMB, help="a server with midemb-bench beside it")
    parser.add_argument("--report", type=Path, help="also write the report to this Markdown file")
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else used the machine")
    args = parser.parse_args()
    if not args.minutes >= 1:
        parser.error("--minutes must be at least 1")
    for program, target in ((args.binary, "build"), (bench_of(args.binary), "bench-build")):
        if not program.exists():
            sys.exit(f"{program} is missing: run `make {target}`")
    # SIGTERM must not leave the server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: stopped by SIGTERM"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="soak-") as folder:
        ended = soak(args, Path(folder))
    text, checks = report(ended), ended.checks
    print(text)
    if args.report:
        args.report.write_text(text)
    if checks.n_failed:
        sys.exit(f"soak: {checks.n_failed} of {len(checks.rows)} checks failed")


if __name__ == "__main__":
    main()
