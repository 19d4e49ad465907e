"""The report of a soak, as Markdown."""

import statistics
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from run import machine, table
from soak_checks import Checks, Plan, Round, Watch
from soak_server import BOUNDS_MB, MB, SETTINGS
from soak_traffic import RATES, WARM_ITEMS, ZIPF_RATE, Traffic


@dataclass
class Soak:
    """A soak that has ended."""

    minutes: float
    note: str
    plan: Plan
    checks: Checks
    rounds: list[Round]
    watch: Watch
    traffic: Traffic
    warnings: Counter
    loads: list[float]


def report(soak: Soak) -> str:
    parts = [
        summary(soak),
        idle_moments(soak),
        calls(soak.traffic),
        pushes(soak.traffic),
        highest(soak.watch),
        caches(soak),
    ]
    warnings = ", ".join(f"{message} ({n})" for message, n in soak.warnings.items()) or "none"
    return "\n\n".join("\n".join(part) for part in [*parts, [f"Warnings in the log: {warnings}."]]) + "\n"


def summary(soak: Soak) -> list[str]:
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    bounds = ", ".join(f"{cache} {bound}" for cache, bound in BOUNDS_MB.items())
    return [
        f"# Soak of {soak.minutes:g} minutes, {date}",
        "",
        f"`make soak SOAK_MINUTES={soak.minutes:g}` on {machine()}.",
        f"The load average over one minute was {min(soak.loads):.1f} to {max(soak.loads):.1f}. {soak.note}".rstrip(),
        f"Caches in MB: {bounds}; a snapshot every {SETTINGS['SNAPSHOT__INTERVAL_SECONDS']} s. Before the first round,",
        "made-up entries filled all caches but the users'. [soak.py](../soak.py) says what is compared.",
        "",
        *table(["check", "result", "figures"], soak.checks.rows),
    ]


def idle_moments(soak: Soak) -> list[str]:
    header = ["minute", "VmRSS MiB", "RssAnon MiB", "descriptors", "threads", "cores busy under traffic"]
    rows = []
    for r in soak.rounds:
        sizes = [f"{r.minute:.1f}", f"{r.rss_mb:.1f}", f"{r.anonymous_mb:.1f}"]
        rows.append([*sizes, str(r.n_files), str(r.n_threads), f"{r.busy:.2f}"])
    base, end = soak.plan.base, soak.plan.end
    which = f"base line: rounds {base[0] + 1} to {base[-1] + 1}; end: {end[0] + 1} to {end[-1] + 1}"
    return [f"## Idle moments ({which})", "", *table(header, rows)]


def calls(traffic: Traffic) -> list[str]:
    rows = []
    for kind in sorted({kind for kind, _ in traffic.calls.counts}):
        outcomes = [f"{code} {n}" for (of, code), n in sorted(traffic.calls.counts.items()) if of == kind]
        rows.append([kind, f"{RATES[kind]:g}" if kind in RATES else "once per round", ", ".join(outcomes)])
    lines = ["## Calls", "", *table(["caller", "rate per second", "outcomes"], rows)]
    pages = [run for run in traffic.bench_runs if run["unit"] == "request"]
    if pages:
        n_sent, n_late, n_shed = (sum(run[key] for run in pages) for key in ("sent", "late", "shed"))
        p50, p99 = (statistics.median(run[key] for run in pages if run[key]) for key in ("p50_ms", "p99_ms"))
        lines += [
            "",
            f"`midemb-bench w3-zipf` sent {n_sent} pages at {ZIPF_RATE} per second: {n_late} late, {n_shed} shed, p50",
            f"{p50:.1f} ms, p99 {p99:.1f} ms (medians of the runs). A run of `w2-cold` sent {64 + WARM_ITEMS} items.",
        ]
    return lines


def pushes(traffic: Traffic) -> list[str]:
    rows = [[*key, str(n)] for key, n in sorted(traffic.pushes.results.items())]
    took = traffic.pushes.took_ms
    figure = f"A push took {statistics.median(took):.0f} ms (median), {max(took)} at most."
    return ["## Pushes", "", *table(["push", "result", "number"], rows), "", figure]


def highest(watch: Watch) -> list[str]:
    rows = [[name, f"{value:.0f}"] for name, value in watch.highest.items()]
    title = f"## Highest values in {watch.n_samples} samples"
    return [title, "", *table(["what", "highest"], rows)]


def caches(soak: Soak) -> list[str]:
    last, rows = soak.rounds[-1].sample, []
    for cache, bound in BOUNDS_MB.items():
        sizes = [last.total(f"midemb_cache_{what}", cache=cache) for what in ("entries", "bytes")]
        counts = [last.total("midemb_cache_evictions_total", cache=cache)]
        for result in ("hit", "miss", "coalesced"):
            counts.append(last.total("midemb_cache_lookups_total", cache=cache, result=result))
        rows.append([cache, *(f"{n:.0f}" for n in (*sizes, bound * MB, *counts))])
    header = ["cache", "entries", "bytes", "bound", "evicted", "hits", "misses", "coalesced"]
    return ["## Caches at the end", "", *table(header, rows)]
