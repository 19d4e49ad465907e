#!/usr/bin/env python3
"""Serve the shipped bundle on free ports, query it, show what the caches did, stop it.

    python3 deploy/demo.py

`make demo` builds the server and runs this; `benches/run.py` imports it to start servers. Standard library only.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIDEMB = ROOT / "target" / "release" / "midemb"
CONFIG = ROOT / "deploy" / "midemb.toml"
START_WITHIN_SECONDS = 120
STOP_WITHIN_SECONDS = 60


@dataclass(frozen=True)
class Server:
    grpc: str
    metrics: str

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            return answer.read().decode()


@contextmanager
def serving(config: Path = CONFIG, **settings: str) -> Iterator[Server]:
    """A server on free ports, stopped at the end by SIGTERM as an orchestrator stops it.

    `settings` are environment variables that override its config, such as MIDEMB__CACHE__ITEM_MB="64".
    """
    free_ports = {
        "MIDEMB__SERVER__LISTEN": "127.0.0.1:0",
        "MIDEMB__ADMIN__LISTEN": "127.0.0.1:0",
        "MIDEMB__TELEMETRY__METRICS_LISTEN": "127.0.0.1:0",
        "MIDEMB__TELEMETRY__LOG_FORMAT": "json",
    }
    command = [str(MIDEMB), "serve", "--config", str(config)]
    process = subprocess.Popen(command, env=os.environ | free_ports | settings, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(START_WITHIN_SECONDS, process.kill)
    watchdog.start()
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))
    try:
        server = wait_until_serving(process)
        watchdog.cancel()
        # The rest of the log must be read, or a full pipe would block the server.
        reader.start()
        yield server
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=STOP_WITHIN_SECONDS)
    reader.join()
    if code != 0:
        sys.exit(f"the server ended with exit code {code}:\n{''.join(log)}")


def wait_until_serving(process: subprocess.Popen) -> Server:
    for line in process.stderr:
        if not line.startswith("{"):
            print(line, end="", file=sys.stderr)
            continue
        event = json.loads(line)
        if event["message"] == "model loaded":
            print(f"loaded {event['name']} {event['version']} on {event['provider']} in {event['load_ms']} ms")
        elif event["message"] == "serving":
            print(f"serving on {event['grpc']}, metrics on {event['metrics']}\n")
            return Server(event["grpc"], event["metrics"])
    sys.exit(f"the server did not start (exit code {process.wait()})")


def run(*arguments: str) -> None:
    print(f"$ midemb {' '.join(arguments)}", flush=True)
    subprocess.run([str(MIDEMB), *arguments], check=True, cwd=ROOT)
    print(flush=True)


def lookups(scrape: str) -> dict[tuple[str, str], float]:
    """The number of look-ups by (cache, result)."""
    pattern = r'^midemb_cache_lookups_total\{cache="(\w+)",result="(\w+)"\} ([\d.]+)$'
    return {(cache, result): float(n) for cache, result, n in re.findall(pattern, scrape, re.MULTILINE)}


def show_caches(title: str, before: dict, after: dict) -> float:
    """Print the look-ups between two scrapes and return the hit rate over all caches of vectors."""
    print(title)
    hits = total = 0.0
    for cache in ("content", "item", "user"):
        counts = {r: after.get((cache, r), 0) - before.get((cache, r), 0) for r in ("hit", "miss", "coalesced")}
        print(f"  {cache:8}" + "".join(f"{result} {n:<6.0f}" for result, n in counts.items()))
        hits, total = hits + counts["hit"], total + sum(counts.values())
    rate = hits / total
    print(f"  hit rate {rate:.1f}" if rate in (0, 1) else f"  hit rate {rate:.3f}", end="\n\n", flush=True)
    return rate


def demo(server: Server) -> None:
    empty = lookups(server.scrape())
    print("The same page twice: first only three golden texts are cached, then everything is.\n")
    run("query", "--server", server.grpc)
    cold = lookups(server.scrape())
    show_caches("caches, first request:", empty, cold)
    run("query", "--server", server.grpc, "--ids-only", "--rows", "3")
    warm = lookups(server.scrape())
    rate = show_caches("caches, second request (ids alone):", cold, warm)
    if rate != 1.0:
        sys.exit("the second request was not answered from the caches")


def main() -> None:
    if not MIDEMB.exists():
        sys.exit(f"{MIDEMB} is missing: run `make build`")
    with serving() as server:
        demo(server)
    print("server stopped")


if __name__ == "__main__":
    main()
