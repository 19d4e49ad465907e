"""Steps of the wall clock, by libfaketime. The monotonic clock, by which deadlines are kept, runs on."""

import os
import time
from pathlib import Path

from kills import SNAPSHOTS, wait_for_snapshot
from lab import BUNDLE, RETRAINED, Lab, Server, Skipped, config, eventually
from pages import Traffic, ask_all, check_restored, check_vectors

DAY_SECONDS = 86_400
# A day forward, and then to a day before now.
STEPS = (DAY_SECONDS, -DAY_SECONDS)
LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")


class SteppedClock:
    """The wall clock of the servers that are started with `environment`."""

    def __init__(self, folder: Path):
        found = [path for pattern in LIBRARIES for path in Path("/").glob(pattern[1:])]
        if not found:
            raise Skipped("no clock to step: libfaketime is missing (Debian: apt-get install faketime)")
        self.file = folder / "clock"
        self.set(0)
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def set(self, offset_seconds: int) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{offset_seconds:+d}")
        os.replace(new, self.file)


def push_times(server: Server) -> list[tuple[int, int]]:
    """When the pushes began, in seconds from now, and how many milliseconds they took; newest first."""
    return [(round(push.began_unix_ms / 1000 - time.time()), push.took_ms) for push in server.status().pushes]


def clock_steps_while_serving(lab: Lab) -> str:
    """Calls, pushes and snapshots go on through steps of a day, and a restart finds the snapshot written last."""
    clock = SteppedClock(lab.folder)
    file = lab.write_config(*SNAPSHOTS)
    with lab.start(file, environment=clock.environment) as server:
        with Traffic(lab, server) as traffic:
            ask_all(server.client)
            wait_for_snapshot(server)
            for offset, bundle in zip(STEPS, (RETRAINED, BUNDLE), strict=True):
                clock.set(offset)
                traffic.wait_for_answers(20)
                began = time.monotonic()
                wait_for_snapshot(server)
                seconds = time.monotonic() - began
                assert seconds < 20, f"two snapshots took {seconds:.1f} s after a step of {offset} s"
                assert server.push(config(bundle, *SNAPSHOTS)).result == "applied"
                began_in, took_ms = push_times(server)[0]
                assert abs(began_in - offset) < 60, f"a push began {began_in} s from now, the clock is at {offset} s"
                assert took_ms < 30_000, f"a push took {took_ms} ms"
                check_vectors(lab, server)
        calls = traffic.check()
        server.stop()
        paths = [line["path"] for line in server.logs("caches written")]
        assert paths == sorted(paths), f"an older snapshot has a higher number: {paths}"
    kept = [name for name in os.listdir(lab.folder / "snapshot") if name.startswith("snapshot-")]
    assert len(kept) == 1, f"{kept} were kept"
    # The clock is a day behind the snapshot's name.
    with lab.start(file, environment=clock.environment) as server:
        check_restored(lab, server)
        assert server.logs("caches restored")[0]["path"] == paths[-1], "another snapshot was restored"
        server.stop()
    return f"+1 day and -1 day, {len(paths)} snapshots, 2 pushes; {calls}"


def clock_steps_during_calls(lab: Lab) -> str:
    """A deadline is neither over too early nor too late when the clock steps while calls wait for the encoder."""
    clock = SteppedClock(lab.folder)
    with lab.start(lab.write_config(), environment=clock.environment) as server:
        with Traffic(lab, server, n_clients=4, pause=0.0) as traffic:
            for i in range(20):
                clock.set(STEPS[i % 2])
                traffic.wait_for_answers(8)
        calls = traffic.check()
        eventually("no call is left in flight", lambda: server.figure("midemb_in_flight_requests") == 0)
        uptime = server.status().uptime_seconds
        assert uptime < 600, f"up for {uptime} s"
        server.stop()
    return f"20 steps of two days; {calls}"
