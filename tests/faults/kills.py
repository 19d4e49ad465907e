"""kill -9 at every moment at which something is being written."""

import os
import threading
import time
from pathlib import Path

import grpc
from lab import BUNDLE, PATIENCE_SECONDS, RETRAINED, Lab, Server, config, eventually, pb
from pages import Traffic, ask_all, check_restored, check_vectors, films

SNAPSHOTS = ('snapshot.folder = "snapshot"', "snapshot.interval_seconds = 1")


def wait_for_snapshot(server: Server) -> str:
    """Waits for a snapshot that began after everything so far, and returns its path."""
    return server.wait_for_log("caches written", len(server.logs("caches written")) + 2)["path"]


def killed_during_traffic(lab: Lab) -> str:
    """A restart has the snapshot that the log named last, and answers from it without encoding anything."""
    file = lab.write_config(*SNAPSHOTS)
    n_rounds, n_calls = 3, 0
    for i in range(n_rounds):
        with lab.start(file) as server:
            if i > 0:
                check_restored(lab, server)
            with Traffic(lab, server) as traffic:
                ask_all(server.client)
                # All pages are in the snapshot that begins after they were answered.
                wait_for_snapshot(server)
                time.sleep(0.3 * i)
                traffic.kill_server()
            traffic.check()
            n_calls += len(traffic.seconds)
            server.kill()
            written = server.logs("caches written")[-1]["path"]
    with lab.start(file) as server:
        check_restored(lab, server)
        restored = server.logs("caches restored")[0]["path"]
        assert restored >= written, f"{restored} was restored, {written} was written before the kill"
        server.stop()
    return f"kill -9 in {n_rounds} rounds; {n_calls} innocent calls before, none wrong"


def killed_during_start(lab: Lab) -> str:
    """A start that was killed takes nothing from the next one: config, pushed config and snapshot are as before."""
    file = lab.write_config(*SNAPSHOTS)
    with lab.start(file) as server:
        ask_all(server.client)
        server.push(config(RETRAINED, *SNAPSHOTS))
        ask_all(server.client)
        digest = server.status().config.digest
        server.stop()
    began = time.monotonic()
    with lab.start(file) as server:
        seconds = time.monotonic() - began
        server.stop()
    n_kills = 8
    for i in range(n_kills):
        with lab.spawn(file) as server:
            time.sleep(seconds * (i + 1) / (n_kills + 1))
    with lab.start(file) as server:
        assert server.status().config.digest == digest, "another config is in force"
        check_restored(lab, server)
        server.stop()
    return f"kill -9 at {n_kills} moments of a start of {seconds:.1f} s"


class Push:
    """A push that is under way."""

    def __init__(self, server: Server, text: str):
        digest = server.status().config.digest
        self.result = ""
        self.call = server.operator.PushConfig.future(
            pb.PushConfigRequest(config=text, expected_digest=digest), timeout=PATIENCE_SECONDS
        )

    def is_acknowledged(self) -> bool:
        try:
            return self.call.result(timeout=PATIENCE_SECONDS).result == "applied"
        except grpc.RpcError:
            return False


def wait_for_step(server: Server, step: str) -> None:
    """Returns once the push has reached this step."""

    def is_reached() -> bool:
        status = server.status()
        return step in [reached.step for reached in status.push.steps] or len(status.pushes) > 1

    eventually(f"the push reaches {step}", is_reached, every=0)


def wait_for_file(folder: Path, is_it) -> None:
    """Returns as soon as the folder has such a file, within microseconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(is_it(name) for name in os.listdir(folder)):
        assert time.monotonic() < deadline, "the push writes no file"


PUSHED_FILE = "midemb.pushed.toml"
# Steps of a push, and what can be seen of it from outside.
MOMENTS = ("digests", "graphs", "golden", "warm", "replay", "before the rename", "after the rename", "acknowledged")


def wait_for_moment(moment: str, server: Server, push: Push) -> None:
    match moment:
        case "before the rename":
            # The new file is there for less than a millisecond, so a busy machine may see it only under its last name.
            wait_for_file(server.file.parent, lambda name: name.endswith(".new") or name == PUSHED_FILE)
        case "after the rename":
            wait_for_file(server.file.parent, lambda name: name == PUSHED_FILE)
        case "acknowledged":
            assert push.is_acknowledged()
        case step:
            wait_for_step(server, step)


def killed_during_push(lab: Lab) -> str:
    """A restart has the old config or the new one, the new one if the push was acknowledged, and its vectors."""
    found = {}
    for moment in MOMENTS:
        file = lab.folder / moment.replace(" ", "-") / "midemb.toml"
        file.parent.mkdir()
        file.write_text(config(BUNDLE))
        with lab.start(file) as server:
            old = server.status().config.digest
            with Traffic(lab, server, n_clients=1) as traffic:
                push = Push(server, config(RETRAINED))
                wait_for_moment(moment, server, push)
                traffic.kill_server()
            is_acknowledged = push.is_acknowledged()
            traffic.check()
        with lab.start(file) as server:
            in_force = server.status().config
            check_vectors(lab, server)
            is_new = in_force.digest != old
            assert bool(in_force.pushed_file) == is_new, f"{moment}: the pushed file is {in_force.pushed_file!r}"
            assert is_new or not is_acknowledged, f"{moment}: an acknowledged push was lost"
            # The next push is not in the way of what the killed one left.
            assert server.push(config(RETRAINED)).result == ("unchanged" if is_new else "applied")
            check_vectors(lab, server)
            server.stop()
        left = [name for name in os.listdir(file.parent) if name not in ("midemb.toml", PUSHED_FILE)]
        assert not left, f"{moment}: {left} was left beside the config file"
        found[moment] = "new" if is_new else "old"
    return "killed at " + ", ".join(f"{moment}: {config_found}" for moment, config_found in found.items())


def killed_during_snapshot(lab: Lab) -> str:
    """A restart has a whole snapshot, the last one of the log or a later one; the next one removes the rest."""
    file = lab.write_config(*SNAPSHOTS)
    folder = lab.folder / "snapshot"
    n_kills, n_unfinished, written = 6, 0, ""
    for i in range(n_kills + 1):
        with lab.start(file) as server:
            if i == 0:
                server.client.WarmItems(iter([pb.WarmItemsRequest(items=films("filler", 3000, "long " * 40))]))
                ask_all(server.client)
            else:
                check_restored(lab, server)
                restored = server.logs("caches restored")[0]["path"]
                assert restored >= written, f"{restored} was restored, {written} was written before the kill"
            written = wait_for_snapshot(server)
            left = [name for name in os.listdir(folder) if name.startswith(".new-")]
            # One may be under way.
            assert len(left) <= 1, f"{left} was left"
            if i == n_kills:
                server.stop()
                break
            wait_for_file(folder, lambda name: name.startswith(".new-"))
            time.sleep(0.002 * i)
            server.kill()
            n_unfinished += any(name.startswith(".new-") for name in os.listdir(folder))
    assert n_unfinished > 0, "no kill came in time"
    return f"kill -9 in {n_kills} snapshots, {n_unfinished} of them unfinished"


def killed_during_import(lab: Lab) -> str:
    """After a kill in an import the same import succeeds, and one that a snapshot followed is not lost."""
    n_items = 1000
    source = lab.folder / "source.toml"
    source.write_text(config(BUNDLE))
    with lab.start(source) as server:
        server.client.WarmItems(iter([pb.WarmItemsRequest(items=films("imported", n_items))]))
        request = pb.ExportCacheRequest(cache="content")
        exported = b"".join(chunk.data for chunk in server.operator.ExportCache(request, timeout=PATIENCE_SECONDS))
        server.stop()
    file = lab.write_config(*SNAPSHOTS)
    size = 64 << 10
    chunks = [pb.CacheChunk(data=exported[at : at + size]) for at in range(0, len(exported), size)]
    n_kills = 4
    for i in range(n_kills):
        with lab.start(file) as server:
            kill_in_import(server, chunks, len(chunks) * (i + 1) // (n_kills + 1))
    with lab.start(file) as server:
        imported = server.operator.ImportCache(iter(chunks), timeout=PATIENCE_SECONDS)
        assert imported.entries >= n_items, f"{imported.entries} entries were imported"
        check_vectors(lab, server)
        wait_for_snapshot(server)
        server.kill()
    with lab.start(file) as server:
        n_contents = server.wait_for_log("caches restored")["n_contents"]
        assert n_contents >= imported.entries, f"{n_contents} of {imported.entries} imported entries were restored"
        check_restored(lab, server)
        server.stop()
    return (
        f"kill -9 in {n_kills} imports of {len(exported) >> 10} KiB; {imported.entries} entries restored after a fifth"
    )


def kill_in_import(server: Server, chunks: list, n_sent: int) -> None:
    """Kills the server after so many chunks."""
    is_killed = threading.Event()

    def send():
        yield from chunks[:n_sent]
        is_killed.wait(PATIENCE_SECONDS)
        yield from chunks[n_sent:]

    call = server.operator.ImportCache.future(send(), timeout=PATIENCE_SECONDS)
    time.sleep(0.05)
    server.process.kill()
    is_killed.set()
    assert isinstance(call.exception(timeout=PATIENCE_SECONDS), grpc.RpcError), "half an import was acknowledged"
    server.end()
