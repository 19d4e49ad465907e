"""What a soak compares and checks, with the figures that it is judged by."""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from soak_server import BOUNDS_MB, MB, ZERO_WHEN_IDLE, Sample, Server
from soak_traffic import Traffic

MAX_GROWTH = 0.03
EXPECTED_WARNINGS = {"push refused", "cache export was interrupted"}


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
    failed_scrapes: list[str] = field(default_factory=list)
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
    checks.add("every scrape was answered", not watch.failed_scrapes, str(watch.failed_scrapes[:3] or watch.n_samples))
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
    figure = f"{probe.n_vectors} vectors in {probe.n_answers} answers of {len(probe.firsts)} models, "
    figure += f"{probe.largest_difference:.0e} apart at most"
    differences = "; ".join(probe.differences[:3])
    same = not differences and len(probe.firsts) == len(traffic.pushes.bundles)
    checks.add("every vector of the probe is what its model answered first", same, differences or figure)
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


def check_restart(checks: Checks, binary: Path, config: Path, traffic: Traffic, digest: str) -> None:
    """The restarted server has the config and the known texts of before: it answers the probe by ids alone."""
    server = Server(binary, config, config.parent / "restarted.log")
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
        same = len(traffic.probe.differences) == n_known and set(answer.statuses) == {1}
        checks.add("and answers the probe by ids alone, as before", same, f"{n_encoded:.0f} items encoded")
    finally:
        code, seconds = server.stop()
    checks.add("the restarted server ends with 0", code == 0, f"exit code {code} after {seconds:.1f} s")
