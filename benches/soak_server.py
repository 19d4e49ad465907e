"""The server of a soak, in a process of its own with small caches, and samples of its metrics and its process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
START_WITHIN_SECONDS, STOP_WITHIN_SECONDS = 120, 60
# Gauges that are zero when nothing is under way.
ZERO_WHEN_IDLE = (
    "midemb_queue_depth",
    "midemb_in_flight_requests",
    "midemb_encoding_requests",
    "midemb_budget_bytes",
    "midemb_budget_calls",
)

Metrics = dict[tuple[str, tuple], float]


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
