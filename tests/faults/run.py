#!/usr/bin/env python3
"""Injects faults into a running server, prints a line for each, and fails if one of them did harm.

    make faults                                                      all of them, with the release build
    make faults-smoke                                                those that cost little, in CI
    .venv/bin/python tests/faults/run.py --binary target/debug/midemb killed_during_push
    .venv/bin/python tests/faults/run.py --report benches/results/DATE-faults.md

Each fault is a function whose first line says what must hold. It returns what was done and measured. Servers listen on
free loopback ports, and everything that they write is in a temporary folder.
"""

import argparse
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import clocks
import descriptors
import disks
import features
import kills
import pauses
import peers
import stores
from lab import ROOT, Lab, Skipped
from pages import compute_references

FAULTS = [
    kills.killed_during_traffic,
    kills.killed_during_start,
    kills.killed_during_push,
    kills.killed_during_snapshot,
    kills.killed_during_import,
    stores.killed_during_fetch,
    disks.full_disk_of_snapshots,
    disks.full_disk_of_the_last_snapshot,
    disks.full_disk_of_the_trace,
    disks.full_disk_of_the_config,
    disks.full_disk_of_bundles,
    features.full_disk_of_served_features,
    features.stalled_disk_of_served_features,
    features.killed_while_features_are_written,
    clocks.clock_steps_while_serving,
    clocks.clock_steps_during_calls,
    descriptors.descriptors_run_out,
    stores.store_misbehaves,
    stores.store_changes_between_files,
    stores.store_stalls_with_the_manifest,
    stores.store_stalls_with_a_file,
    stores.store_drips_the_manifest,
    stores.operators_while_a_store_stalls,
    peers.peers_reset_their_calls,
    peers.peers_flood,
    peers.peers_read_nothing,
    peers.peers_cancel,
    peers.peers_send_headers_only,
    peers.peers_send_endless_headers,
    pauses.paused_while_calls_wait,
    pauses.paused_under_traffic,
]
# They wait for half a minute or more and do little else, so they run beside the others.
PATIENT = [
    stores.store_stalls_with_the_manifest,
    stores.store_stalls_with_a_file,
    stores.store_drips_the_manifest,
]
# At least one of each kind, under a minute in all. Those that take longest are left out.
SMOKE = [
    kills.killed_during_start,
    kills.killed_during_push,
    stores.killed_during_fetch,
    disks.full_disk_of_the_last_snapshot,
    disks.full_disk_of_the_trace,
    disks.full_disk_of_the_config,
    disks.full_disk_of_bundles,
    features.full_disk_of_served_features,
    features.stalled_disk_of_served_features,
    features.killed_while_features_are_written,
    clocks.clock_steps_during_calls,
    descriptors.descriptors_run_out,
    stores.store_misbehaves,
    stores.store_changes_between_files,
    stores.operators_while_a_store_stalls,
    peers.peers_reset_their_calls,
    peers.peers_flood,
    peers.peers_send_endless_headers,
    pauses.paused_under_traffic,
]


@dataclass
class Result:
    name: str
    must_hold: str
    outcome: str
    found: str
    seconds: float

    def line(self) -> str:
        return f"{self.name:34} {self.outcome:8}{self.seconds:6.1f} s  {self.found}"

    def row(self) -> str:
        found = self.found.replace("|", "\\|")
        return f"| `{self.name}` | {self.must_hold} | {found} | {self.outcome} | {self.seconds:.1f} |"


def inject(fault: Callable[[Lab], str], lab: Lab) -> Result:
    must_hold = (fault.__doc__ or "").strip().splitlines()[0]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="midemb-faults-") as folder:
        try:
            outcome, found = "ok", fault(replace(lab, folder=Path(folder)))
        except Skipped as reason:
            outcome, found = "skipped", str(reason)
        except Exception as error:
            # Whatever goes wrong is this fault's result, and the others still run.
            traceback.print_exc()
            outcome, found = "failed", " ".join(f"{type(error).__name__}: {error}".split())
    return Result(fault.__name__, must_hold, outcome, found, time.monotonic() - began)


def run(faults: list[Callable[[Lab], str]], lab: Lab) -> list[Result]:
    """Injects the faults one after the other, and beside them those that mostly wait."""
    results = []

    def show(result: Result) -> None:
        results.append(result)
        print(result.line(), flush=True)

    with ThreadPoolExecutor(max_workers=max(len(PATIENT), 1)) as pool:
        waiting: list[Future] = [pool.submit(inject, fault, lab) for fault in faults if fault in PATIENT]
        for fault in faults:
            if fault not in PATIENT:
                show(inject(fault, lab))
        for future in waiting:
            show(future.result())
    return results


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores ({model[1] if model else platform.machine()})"


def report(results: list[Result], binary: Path, seconds: float) -> str:
    built = "release" if "release" in binary.parts else "debug"
    words = [argument for argument in sys.argv[1:] if not argument.startswith("/")]
    n_ok = sum(result.outcome == "ok" for result in results)
    head = (
        f"Faults that were injected into the {built} build: `.venv/bin/python tests/faults/run.py {' '.join(words)}`, "
        f"{seconds:.0f} s on a virtual machine with {machine()}. {n_ok} of {len(results)} held.\n"
    )
    table = [
        "| fault | what must hold | what was done and found | result | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]
    return "\n".join([head, *table, *(result.row() for result in results), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="those to inject instead of all")
    parser.add_argument("--binary", type=Path, default=ROOT / "target" / "release" / "midemb")
    parser.add_argument("--smoke", action="store_true", help="only those that cost little")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the results as a Markdown page")
    arguments = parser.parse_args()
    names = {fault.__name__: fault for fault in FAULTS}
    if unknown := set(arguments.faults) - set(names):
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if not arguments.binary.exists():
        sys.exit(f"{arguments.binary} is missing: run `make build`, or name another one with --binary")
    faults = [names[name] for name in arguments.faults] or (SMOKE if arguments.smoke else FAULTS)

    # So that servers are killed and folders removed, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="midemb-faults-") as folder:
        lab = Lab(arguments.binary.resolve(), Path(folder))
        compute_references(lab)
        results = run(faults, lab)
    seconds = time.monotonic() - began
    n_failed = sum(result.outcome == "failed" for result in results)
    n_skipped = sum(result.outcome == "skipped" for result in results)
    print(f"{len(results)} faults in {seconds:.0f} s: {n_failed} failed, {n_skipped} skipped")
    if arguments.report:
        arguments.report.write_text(report(results, arguments.binary, seconds))
    if n_failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
