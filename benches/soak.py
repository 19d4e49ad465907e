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
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from reload import BUNDLE, FOLDER, variant
from run import machine, table
from soak_traffic import RATES, WARM_ITEMS, ZIPF_RATE, Pushes, Traffic

ROOT = Path(__file__).resolve().parent.parent
MIDEMB = ROOT / "target" / "release" / "midemb"
MB = 1 << 20
BOUNDS_MB = {"content": 3, "item": 1, "user": 1, "known_items": 1}
# The environment also overrides pushed files, so these hold for the whole run.
SETTINGS = {
    "SERVER__LISTEN": "127.0.0.1:0",
    "ADMIN__LISTEN": "127.0.0.1:0",
    "TELEMETRY__METRICS_LISTEN": "127.0.0.1:0",
    "TELEMETRY__LOG_FORMAT": "json",
    "LIMITS__READ_MS": "2000",
    "LIMITS__WRITE_MS": "2000",
    "RELOAD__WARM_SECONDS": "2",
    "SNAPSHOT__INTERVAL_SECONDS": "20",
    **{f"CACHE__{cache.upper()}_MB": str(bound) for cache, bound in BOUNDS_MB.items()},
}
SAMPLE_SECONDS = 5
LONG_IDLE_SECONDS, SHORT_IDLE_SECONDS = 14, 2
N_IDLE_SAMPLES = 5
IDLE_WITHIN_SECONDS = 60
START_WITHIN_SECONDS, STOP_WITHIN_SECONDS = 120, 60
MAX_GROWTH = 0.03
MAX_FILL_ROUNDS, FILL_ENTRIES = 20, 2000
# Gauges that are zero when nothing is under way.
ZERO_WHEN_IDLE = (
    "midemb_queue_depth",
    "midemb_in_flight_requests",
    "midemb_encoding_requests",
    "midemb_budget_bytes",
    "midemb_budget_calls",
)
EXPECTED_WARNINGS = {"push refused", "cache export was interrupted"}

Metrics = dict[tuple[str, tuple], float]


def bench_of(binary: Path) -> Path:
    """Both programs are built into one folder."""
    return binary.with_name("midemb-bench")


def labels_of(text: str) -> tuple:
    return tuple(sorted(re.findall(r'(\w+)="([^"]*)"', text)))


@dataclass
class Sample:
    """The process and its metrics at one moment."""

    at: float
    rss_mb: float
    anonymous_mb: float
    n_files: int
    n_threads: int
    metrics: Metrics

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(v for (metric, of), v in self.metrics.items() if metric == name and wanted <= set(of))

    def values(self, name: str, label: str) -> dict[str, float]:
        """The sums by one label."""
        sums: dict[str, float] = {}
        for (metric, labels), value in self.metrics.items():
            if metric == name:
                key = dict(labels)[label]
                sums[key] = sums.get(key, 0) + value
        return sums

    def not_zero(self) -> dict[str, float]:
        found = {f"{name}{dict(of) or ''}": v for (name, of), v in self.metrics.items() if name in ZERO_WHEN_IDLE and v}
        # Of the third listener, the scrape itself is a connection.
        for listener in ("main", "admin"):
            n_open = self.total("midemb_connections", listener=listener)
            if n_open != 1:
                found[f"midemb_connections{{{listener}}}, of which 1 is ours"] = n_open
        return found


class Server:
    """A server process whose log goes to a file."""

    def __init__(self, binary: Path, config: Path, log: Path):
        settings = {f"MIDEMB__{key}": value for key, value in SETTINGS.items()}
        settings["MIDEMB__SNAPSHOT__FOLDER"] = str(config.parent / "snapshot")
        self.log = log
        with log.open("w") as stderr:
            command = [str(binary), "serve", "--config", str(config)]
            self.process = subprocess.Popen(command, env=os.environ | settings, stderr=stderr)
        self.addresses = self.wait_until_serving()

    def wait_until_serving(self) -> dict[str, str]:
        until = time.monotonic() + START_WITHIN_SECONDS
        while self.process.poll() is None and time.monotonic() < until:
            for event in self.events():
                if event.get("message") == "serving":
                    return {name: event[name] for name in ("grpc", "admin", "metrics")}
            time.sleep(0.2)
        self.process.kill()
        sys.exit(f"the server did not start:\n{self.log.read_text()}")

    def events(self) -> Iterator[dict]:
        for line in self.log.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"level": "ERROR", "message": f"not JSON: {line}"}

    def sample(self) -> Sample:
        with urllib.request.urlopen(f"http://{self.addresses['metrics']}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        metrics: Metrics = {}
        for line in lines:
            if line and not line.startswith("#") and "_bucket{" not in line:
                name, value = line.rsplit(" ", 1)
                metrics[name.split("{", 1)[0], labels_of(name)] = float(value)
        proc = Path("/proc") / str(self.process.pid)
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (proc / "status").read_text(), re.MULTILINE))
        rss, anonymous = (int(status[name]) / 1024 for name in ("VmRSS", "RssAnon"))
        n_files = len(os.listdir(proc / "fd"))
        return Sample(time.monotonic(), rss, anonymous, n_files, int(status["Threads"]), metrics)

    def stop(self) -> tuple[int, float]:
        """Ends the server by SIGTERM; returns its exit code and the seconds that this took."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout=STOP_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code, time.monotonic() - began


@dataclass
class Round:
    """One minute: what its idle moment showed, in medians."""

    minute: float
    rss_mb: float
    anonymous_mb: float
    n_files: int
    n_threads: int
    busy: float
    sample: Sample
    not_idle: dict[str, float]


@dataclass
class Watch:
    """What was seen in the samples taken under traffic."""

    highest: dict[str, float] = field(default_factory=dict)
    over_bound: list[str] = field(default_factory=list)
    # A push makes the server forget the series of older models, and their codes with them.
    codes: set[str] = field(default_factory=set)
    n_samples: int = 0

    def add(self, sample: Sample) -> None:
        self.n_samples += 1
        self.codes |= set(sample.values("midemb_requests_total", "code"))
        values = {name: sample.total(name) for name in ZERO_WHEN_IDLE}
        values |= {"open descriptors": sample.n_files, "threads": sample.n_threads, "VmRSS in MiB": sample.rss_mb}
        for name, value in values.items():
            self.highest[name] = max(value, self.highest.get(name, 0))
        for cache, n_bytes in sample.values("midemb_cache_bytes", "cache").items():
            if n_bytes > BOUNDS_MB[cache] * MB:
                self.over_bound.append(f"{cache}: {n_bytes:.0f} bytes")


@contextmanager
def watching(server: Server, watch: Watch) -> Iterator[None]:
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            watch.add(server.sample())

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
    minute = (time.monotonic() - began) / 60
    busy = cpu_seconds / (end.at - start.at)
    return Round(minute, rss, anonymous, last.n_files, last.n_threads, busy, last, not_idle)


@dataclass
class Plan:
    """Which rounds are compared."""

    n_rounds: int
    seconds: float
    base: range
    end: range

    @classmethod
    def of(cls, minutes: float) -> "Plan":
        n_rounds = max(3, math.ceil(minutes))
        n_warm = max(1, round(0.2 * n_rounds))
        n_compared = min(3, (n_rounds - n_warm) // 2)
        base, end = range(n_warm, n_warm + n_compared), range(n_rounds - n_compared, n_rounds)
        return cls(n_rounds, 60 * minutes / n_rounds, base, end)

    def is_compared(self, i: int) -> bool:
        return i in self.base or i in self.end


@dataclass
class Checks:
    rows: list[list[str]] = field(default_factory=list)
    n_failed: int = 0

    def add(self, name: str, passed: bool, figure: str) -> None:
        self.rows.append([name, "passed" if passed else "**FAILED**", figure])
        self.n_failed += not passed


def check_growth(checks: Checks, plan: Plan, rounds: list[Round]) -> None:
    def median(of: range, name: str) -> float:
        return statistics.median(getattr(rounds[i], name) for i in of)

    for name, label in (("rss_mb", "VmRSS"), ("anonymous_mb", "RssAnon")):
        base, end = median(plan.base, name), median(plan.end, name)
        growth = end / base - 1
        figure = f"{base:.1f} → {end:.1f} MiB ({100 * growth:+.1f} %)"
        checks.add(f"{label} within {100 * MAX_GROWTH:.0f} % of the base line", growth <= MAX_GROWTH, figure)
    for name, label in (("n_files", "open descriptors"), ("n_threads", "threads")):
        base, end = ([getattr(rounds[i], name) for i in of] for of in (plan.base, plan.end))
        checks.add(f"{label} as in the base line", len({*base, *end}) == 1, f"{base} → {end}")


def check_metrics(checks: Checks, plan: Plan, rounds: list[Round], watch: Watch) -> None:
    not_idle = {round(r.minute): r.not_idle for r in rounds if r.not_idle}
    checks.add("queues, calls in flight and budgets are zero at every idle moment", not not_idle, str(not_idle or "0"))
    base, last = rounds[plan.base[0]].sample, rounds[-1].sample
    evictions = base.values("midemb_cache_evictions_total", "cache")
    full = all(evictions.get(cache, 0) > 0 for cache in BOUNDS_MB)
    figure = ", ".join(f"{cache} {n:.0f}" for cache, n in sorted(evictions.items()))
    checks.add("all caches evicted before the base line", full, figure)
    checks.add(
        "bytes of caches within bounds", not watch.over_bound, str(watch.over_bound[:3] or f"{watch.n_samples} samples")
    )
    results = set(last.values("midemb_cache_lookups_total", "result"))
    checks.add(
        "look-ups are hits, misses or coalesced", results <= {"hit", "miss", "coalesced"}, ", ".join(sorted(results))
    )
    unexpected = watch.codes & {"INTERNAL", "UNKNOWN"}
    checks.add("no call ended with INTERNAL or UNKNOWN", not unexpected, ", ".join(sorted(watch.codes)))
    snapshots = last.values("midemb_snapshots_total", "result")
    checks.add("snapshots were written, and none failed", set(snapshots) == {"written"}, str(snapshots))


def check_calls(checks: Checks, traffic: Traffic) -> None:
    probe, errors = traffic.probe, traffic.calls.errors
    figure = f"{probe.n_vectors} vectors in {probe.n_answers} answers of {len(probe.firsts)} models"
    differences = "; ".join(probe.differences[:3])
    checks.add("every vector of the probe has the bits of its model's first", not differences, differences or figure)
    n_calls = sum(traffic.calls.counts.values())
    checks.add("no caller saw an unexpected code", not errors, "; ".join(errors[:3]) or f"{n_calls} calls")


def check_lookups(checks: Checks, server: Server, traffic: Traffic) -> None:
    """One page at an idle moment: its candidates and its user are looked up, and nothing else is."""
    before = server.sample()
    answer = traffic.service.GetMidEmb(traffic.probe.request, timeout=5)
    after = server.sample()
    traffic.probe.check(answer)

    def n_lookups(cache: str) -> float:
        return after.total(name, cache=cache) - before.total(name, cache=cache)

    name, n_rows = "midemb_cache_lookups_total", len(answer.statuses)
    counts = {cache: n_lookups(cache) for cache in ("item", "user")}
    checks.add("one page is as many look-ups as it has rows", counts == {"item": n_rows, "user": 1}, str(counts))


def check_log(checks: Checks, server: Server) -> Counter:
    events = list(server.events())
    counts = Counter(event["message"] for event in events if event.get("level") in ("WARN", "ERROR"))
    errors = [event for event in events if event.get("level") == "ERROR"]
    unexpected = set(counts) - EXPECTED_WARNINGS
    figure = str(errors[:2]) if errors else f"{len(events)} lines"
    checks.add("no ERROR in the log", not errors, figure)
    checks.add("no unexpected WARN in the log", not unexpected, ", ".join(f"{m}: {n}" for m, n in counts.items()))
    return counts


def check_restart(checks: Checks, args: argparse.Namespace, config: Path, traffic: Traffic, digest: str) -> None:
    """The restarted server has the config and the caches of before: it answers the probe by ids alone, bit for bit."""
    server = Server(args.binary, config, config.parent / "restarted.log")
    try:
        restored = [event for event in server.events() if event.get("message") == "caches restored"]
        figure = (
            ", ".join(f"{key} {restored[0][key]}" for key in ("n_contents", "n_items", "n_known_items"))
            if restored
            else "-"
        )
        checks.add("a restart restores the snapshot", bool(restored) and restored[0]["n_items"] > 0, figure)
        traffic.addresses = server.addresses
        with traffic.connect("grpc") as channel, traffic.connect("admin") as admin_channel:
            admin = traffic.grpc.AdminServiceStub(admin_channel)
            found = admin.GetStatus(traffic.pb.GetStatusRequest(), timeout=10).config.digest
            checks.add("a restart finds the pushed config", found == digest, found[:12])
            n_encoded = server.sample().total("midemb_batch_items_sum", stage="encode")
            request = traffic.pb.GetMidEmbRequest()
            request.CopyFrom(traffic.probe.request)
            for item in (*request.history, *request.candidates):
                item.ClearField("text")
            answer = traffic.grpc.MidEmbServiceStub(channel).GetMidEmb(request, timeout=5)
            n_encoded = server.sample().total("midemb_batch_items_sum", stage="encode") - n_encoded
        n_known = len(traffic.probe.differences)
        traffic.probe.check(answer)
        same = n_encoded == 0 and len(traffic.probe.differences) == n_known and set(answer.statuses) == {1}
        checks.add("and answers the probe by ids alone, with the same bits", same, f"{n_encoded:.0f} items encoded")
    finally:
        code, seconds = server.stop()
    checks.add("the restarted server ends with 0", code == 0, f"exit code {code} after {seconds:.1f} s")


def soak(args: argparse.Namespace, folder: Path) -> tuple[Checks, str]:
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
        check_restart(checks, args, config, traffic, digest)
        check_calls(checks, traffic)
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
    return checks, report(args, plan, checks, rounds, watch, traffic, warnings, loads)


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


def report(args, plan, checks, rounds, watch, traffic, warnings, loads) -> str:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    bounds = " + ".join(f"{cache} {bound}" for cache, bound in BOUNDS_MB.items())
    lines = [
        f"# Soak of {args.minutes:g} minutes, {date}",
        "",
        f"`make soak SOAK_MINUTES={args.minutes:g}` on {machine()}. The load average over one minute was",
        f"{min(loads):.1f} to {max(loads):.1f}. {args.note}",
        f"Caches in MB: {bounds}; a snapshot every {SETTINGS['SNAPSHOT__INTERVAL_SECONDS']} s. Before the first round,",
        "made-up entries filled all caches but the users'. [soak.py](../soak.py) says what is compared.",
        "",
        *table(["check", "result", "figures"], checks.rows),
        "",
        f"## Idle moments (base line: rounds {plan.base[0] + 1} to {plan.base[-1] + 1})",
        "",
        *table(
            ["minute", "VmRSS MiB", "RssAnon MiB", "descriptors", "threads", "cores busy under traffic"],
            [
                [
                    f"{r.minute:.1f}",
                    f"{r.rss_mb:.1f}",
                    f"{r.anonymous_mb:.1f}",
                    f"{r.n_files}",
                    f"{r.n_threads}",
                    f"{r.busy:.2f}",
                ]
                for r in rounds
            ],
        ),
        "",
        "## Calls",
        "",
    ]
    kinds = sorted({kind for kind, _ in traffic.calls.counts})
    rows = []
    for kind in kinds:
        outcomes = {code: n for (of, code), n in sorted(traffic.calls.counts.items()) if of == kind}
        rate = f"{RATES[kind]:g}" if kind in RATES else "per round"
        rows.append([kind, rate, ", ".join(f"{code} {n}" for code, n in outcomes.items())])
    lines += table(["caller", "rate per second", "outcomes"], rows)
    pages = [run for run in traffic.bench_runs if run["unit"] == "request"]
    if pages:
        n_sent, n_late, n_shed = (sum(run[key] for run in pages) for key in ("sent", "late", "shed"))
        p50, p99 = (statistics.median(run[key] for run in pages if run[key]) for key in ("p50_ms", "p99_ms"))
        lines += [
            "",
            f"`midemb-bench w3-zipf` sent {n_sent} pages at {ZIPF_RATE} per second: {n_late} late, {n_shed} shed, p50",
            f"{p50:.1f} ms, p99 {p99:.1f} ms (medians of the runs). A run of `w2-cold` sent {64 + WARM_ITEMS} items.",
        ]
    results = sorted(traffic.pushes.results.items())
    lines += ["", "## Pushes", "", *table(["push", "result", "number"], [[*key, str(n)] for key, n in results])]
    if traffic.pushes.took_ms:
        took = sorted(traffic.pushes.took_ms)
        lines += ["", f"A push took {statistics.median(took):.0f} ms (median), {took[-1]} at most."]
    lines += ["", "## Highest values under traffic", ""]
    lines += table(["what", "highest"], [[name, f"{value:.0f}"] for name, value in watch.highest.items()])
    last = rounds[-1].sample
    lines += ["", "## Caches at the end", ""]
    rows = []
    for cache, bound in BOUNDS_MB.items():
        sizes = (last.total(f"midemb_cache_{what}", cache=cache) for what in ("entries", "bytes", "evictions_total"))
        looked_up = [
            last.total("midemb_cache_lookups_total", cache=cache, result=r) for r in ("hit", "miss", "coalesced")
        ]
        rows.append([cache, *(f"{n:.0f}" for n in sizes), str(bound * MB), *(f"{n:.0f}" for n in looked_up)])
    lines += table(["cache", "entries", "bytes", "evicted", "bound", "hits", "misses", "coalesced"], rows)
    lines += ["", "Warnings in the log: " + (", ".join(f"{m} ({n})" for m, n in warnings.items()) or "none") + "."]
    return "\n".join(lines) + "\n"


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
        checks, text = soak(args, Path(folder))
    print(text)
    if args.report:
        args.report.write_text(text)
    if checks.n_failed:
        sys.exit(f"soak: {checks.n_failed} of {len(checks.rows)} checks failed")


if __name__ == "__main__":
    main()
