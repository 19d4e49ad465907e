"""Disks that are full or stall, and kills, while served features are written."""

import os
import shutil
import signal
from pathlib import Path

import duckdb
from disks import NO_SPACE, SmallDisk
from lab import Lab, Server, Skipped, eventually
from pages import N_CANDIDATES, Traffic, check_vectors

# With a queue of 1 MB, a row group is written for each quarter of it.
SMALL_QUEUE = "served_features.queue_mb = 1"
# Longer than any step takes: what waits for the disk waits until the process ends.
STALL_SECONDS = 600


def sample_all(folder: Path, *more: str) -> list[str]:
    return [f'served_features.folder = "{folder}"', "served_features.percent = 100", *more]


def n_requests(server: Server, result: str) -> int:
    return int(server.figure("midemb_served_features_requests_total", f'result="{result}"'))


def check_files(folder: Path, at_least: int) -> str:
    """Every file must be whole, with all candidates of each of its requests."""
    files = sorted(folder.glob("date=*/*.parquet"))
    assert files, "no file was finished"
    per_request = "SELECT request_id, count(*) AS n FROM read_parquet(?) WHERE len(mid_emb) > 0 GROUP BY request_id"
    counts = duckdb.execute(per_request, [[str(file) for file in files]]).fetchall()
    assert {n for _, n in counts} == {N_CANDIDATES}, "a request is not complete, or twice in the files"
    assert len(counts) >= at_least, f"{len(counts)} requests in the files, {at_least} were counted"
    return f"{len(counts)} requests in {len(files)} whole files"


def full_disk_of_served_features(lab: Lab) -> str:
    """Calls are answered, what cannot be written is counted, one line says so, and with room it is written again."""
    failed = "served features cannot be written, samples are lost until this is mended"
    with SmallDisk(lab, 8 << 20) as disk:
        file = lab.write_config(*sample_all(disk.folder, SMALL_QUEUE, "served_features.rotate_seconds = 1"))
        with lab.start(file, prefix=disk.prefix) as server:
            with Traffic(lab, server) as traffic:
                eventually("samples are written", lambda: n_requests(server, "written") > 0)
                disk.fill()
                error = server.wait_for_log(failed)["error"]
                assert NO_SPACE in error, error
                eventually("samples are counted as lost", lambda: n_requests(server, "failed") > 0)
                disk.free()
                server.wait_for_log("served features are written again")
                n_before = n_requests(server, "written")
                eventually("samples are written again", lambda: n_requests(server, "written") > n_before)
                check_vectors(lab, server)
            calls = traffic.check()
            n_written, n_failed = n_requests(server, "written"), n_requests(server, "failed")
            assert len(server.logs(failed)) == 1, "the log repeats the failure"
            server.stop()
        found = check_files(disk.path, n_written)
    return f"{n_failed} samples lost and counted; {found}; {calls}"


def stalled_disk_of_served_features(lab: Lab) -> str:
    """Calls are answered while a write hangs, samples are dropped and counted, and SIGTERM ends the process in time."""
    if not shutil.which("strace"):
        raise Skipped("no stalled disk: strace is missing")
    folder = lab.folder / "features"
    # The tracer is not the parent, so signals reach the server. It holds back the first write, and so all after it.
    stall = ["strace", "--daemonize", "--follow-forks", "--seccomp-bpf", f"--output={lab.folder / 'trace'}"]
    stall += ["--trace=pwrite64", f"--inject=pwrite64:delay_enter={STALL_SECONDS}s"]
    file = lab.write_config(*sample_all(folder, SMALL_QUEUE, "server.drain_seconds = 1"))
    with lab.start(file, prefix=stall) as server:
        tracer = tracer_of(server)
        try:
            with Traffic(lab, server) as traffic:
                eventually("the queue is full", lambda: n_requests(server, "queue_full") > 0)
                traffic.wait_for_answers(50)
                check_vectors(lab, server)
            calls = traffic.check()
            n_dropped = n_requests(server, "queue_full")
            assert n_requests(server, "written") == 0, "the disk did not stall"
            server.signal(signal.SIGTERM)
            seconds = eventually("the process ends", lambda: not is_running(server))
        finally:
            # A traced thread would keep the dead process from being waited for.
            os.kill(tracer, signal.SIGKILL)
        # The tracer writes where the server writes.
        server.other_lines[:] = [line for line in server.other_lines if not line.startswith("strace: ")]
        server.stop()
        assert server.logs("served features are not written in time, the open files and what waits are lost")
    unfinished = len(list(folder.glob("date=*/.*.unfinished")))
    with lab.start(lab.write_config(*sample_all(folder))) as server:
        removed = server.wait_for_log("unfinished files of served features removed")["n_files"]
        assert removed == unfinished == 1, f"{removed} of {unfinished} unfinished files removed"
        server.stop()
    return f"{n_dropped} samples dropped and counted, SIGTERM took {seconds:.1f} s; {calls}"


def process_status(server: Server, field: str) -> str:
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))


def tracer_of(server: Server) -> int:
    return int(process_status(server, "TracerPid"))


def is_running(server: Server) -> bool:
    return not process_status(server, "State").startswith("Z")


def killed_while_features_are_written(lab: Lab) -> str:
    """Finished files are whole, the unfinished one is removed by the next start, and that start writes its own."""
    folder = lab.folder / "features"
    file = lab.write_config(*sample_all(folder, SMALL_QUEUE, "served_features.rotate_mb = 1"))
    with lab.start(file) as server:
        with Traffic(lab, server, pause=0.001) as traffic:
            unfinished = lambda: list(folder.glob("date=*/.*.unfinished"))  # noqa: E731
            eventually("one file is finished and one is not", lambda: n_requests(server, "written") and unfinished())
            n_written = n_requests(server, "written")
            traffic.kill_server()
        calls = traffic.check()
    found = check_files(folder, n_written)
    n_left = len(unfinished())
    with lab.start(file) as server:
        removed = server.wait_for_log("unfinished files of served features removed")["n_files"]
        assert removed == n_left, f"{removed} of {n_left} unfinished files removed"
        check_vectors(lab, server)
        server.stop()
    check_files(folder, n_written + 1)
    assert not unfinished() and len(os.listdir(folder)) <= 2, "something else was left"
    return f"{found}, {n_left} unfinished removed; {calls}"
