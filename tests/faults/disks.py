"""Disks that are full, each a tmpfs of some kilobytes in a mount namespace that the server shares."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

from kills import wait_for_snapshot
from lab import BUNDLE, PATIENCE_SECONDS, RETRAINED, ROOT, Lab, Skipped, config, pb
from object_store import ObjectStore
from pages import Traffic, ask_all, check_restored, check_vectors

NO_SPACE = "No space left on device"
MOUNT = 'mount -t tmpfs -o size="$1" faults "$2" && echo mounted && exec sleep 600'


class SmallDisk:
    """The server finds it at `folder` if it is started with `prefix`, this process at `path`."""

    def __init__(self, lab: Lab, n_bytes: int):
        self.folder = lab.folder / "disk"
        self.folder.mkdir()
        command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(n_bytes), str(self.folder)]
        if not (shutil.which("unshare") and shutil.which("nsenter")):
            raise Skipped("no small disk: unshare and nsenter (util-linux) are missing")
        # It holds the namespace until it is killed.
        self.holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "mounted\n":
            reason = self.holder.stderr.read().strip()
            self.holder.wait()
            raise Skipped(f"no small disk, as user namespaces or mounts are not permitted: {reason}")
        self.path = Path(f"/proc/{self.holder.pid}/root{self.folder}")
        target = ["nsenter", f"--target={self.holder.pid}", "--user", "--mount", "--preserve-credentials"]
        self.prefix = [*target, f"--wd={ROOT}"]
        self.filler = self.path / "filler"

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_) -> None:
        self.holder.kill()
        self.holder.wait()

    def fill(self, n_free: int = 0) -> None:
        """Leaves so many bytes free."""
        found = os.statvfs(self.path)
        n_bytes = found.f_bavail * found.f_frsize - n_free
        with self.filler.open("wb", buffering=0) as file:
            try:
                while n_bytes > 0:
                    n_bytes -= file.write(bytes(min(n_bytes, 4096)))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        self.filler.unlink()


def full_disk_of_snapshots(lab: Lab) -> str:
    """Calls are answered, each failed snapshot is one line, the last whole one is restored, the next one is written."""
    failed = "the snapshot of the caches cannot be written, the previous one is kept"
    with SmallDisk(lab, 4 << 20) as disk:
        file = lab.write_config(f'snapshot.folder = "{disk.folder}"', "snapshot.interval_seconds = 1")
        with lab.start(file, prefix=disk.prefix) as server:
            with Traffic(lab, server) as traffic:
                ask_all(server.client)
                wait_for_snapshot(server)
                disk.fill()
                server.wait_for_log(failed, 2)
                whole = server.logs("caches written")[-1]["path"]
                traffic.kill_server()
            traffic.check()
            server.kill()
            reasons = [line["error"] for line in server.logs(failed)]
            assert all(NO_SPACE in reason for reason in reasons), reasons
        with lab.start(file, prefix=disk.prefix) as server:
            check_restored(lab, server)
            assert server.logs("caches restored")[0]["path"] == whole, "another snapshot was restored"
            server.wait_for_log(failed)
            disk.free()
            server.wait_for_log("caches written")
            names = [name for name in os.listdir(disk.path) if name != ".lock"]
            assert len(names) <= 2, f"{names} were left"
            server.stop()
        return f"{len(reasons)} snapshots failed; {traffic.check()}"


def full_disk_of_the_last_snapshot(lab: Lab) -> str:
    """A drain onto a full disk ends with exit code 0, and one line says that the previous snapshot is kept."""
    with SmallDisk(lab, 4 << 20) as disk:
        file = lab.write_config(f'snapshot.folder = "{disk.folder}"', "snapshot.interval_seconds = 0")
        with lab.start(file, prefix=disk.prefix) as server:
            ask_all(server.client)
            server.stop()
        with lab.start(file, prefix=disk.prefix) as server:
            disk.fill()
            server.stop()
            failed = server.logs("the snapshot of the caches cannot be written, the previous one is kept")
            assert len(failed) == 1 and NO_SPACE in failed[0]["error"], server.tail()
        with lab.start(file, prefix=disk.prefix) as server:
            check_restored(lab, server)
            disk.free()
            server.stop()
    return "SIGTERM with a full disk; the snapshot before it was restored"


def full_disk_of_the_trace(lab: Lab) -> str:
    """The trace ends with one line, what it has can be read, calls are answered, and the process ends with 0."""
    with SmallDisk(lab, 64 << 10) as disk:
        arguments = ["--record-trace", str(disk.folder / "trace.jsonl")]
        with lab.start(lab.write_config(), *arguments, prefix=disk.prefix) as server:
            with Traffic(lab, server) as traffic:
                ended = server.wait_for_log("trace ended: the file cannot be written")
                assert NO_SPACE in ended["error"], ended
                traffic.wait_for_answers(10)
            traffic.check()
            server.stop()
            assert len(server.logs("trace ended: the file cannot be written")) == 1
        lines = (disk.path / "trace.jsonl").read_bytes().split(b"\n")
        n_requests = len([json.loads(line) for line in lines[:-1]])
        command = [*disk.prefix, str(lab.binary), "cache-curve", "--trace", arguments[1]]
        curve = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
        assert curve.returncode == 0, curve.stderr
    return f"{n_requests} requests fit on 64 KiB; {traffic.check()}"


def full_disk_of_the_config(lab: Lab) -> str:
    """A push is refused with the reason, a rollback says what a restart would miss, and both succeed with room."""
    with SmallDisk(lab, 64 << 10) as disk:
        (disk.path / "midemb.toml").write_text(config(BUNDLE))
        file = disk.folder / "midemb.toml"
        with lab.start(file, prefix=disk.prefix) as server:
            with Traffic(lab, server) as traffic:
                before = server.status().config.digest
                disk.fill()
                reason = server.refused_push(config(RETRAINED))
                assert NO_SPACE in reason and "midemb.pushed.toml" in reason, reason
                assert server.status().config.digest == before, "a refused push is in force"
                disk.free()
                for text in (config(RETRAINED), config(RETRAINED, "reload.warm_seconds = 7")):
                    assert server.push(text).result == "applied"
                pushed = server.status().config.digest
                disk.fill()
                rolled_back = server.operator.Rollback(pb.RollbackRequest(), timeout=PATIENCE_SECONDS)
                check_vectors(lab, server)
            calls = traffic.check()
            assert "a restart would not find" in rolled_back.warning, rolled_back.warning
            names = sorted(os.listdir(disk.path))
            assert names == ["filler", "midemb.pushed.toml", "midemb.toml"], names
            server.stop()
        with lab.start(file, prefix=disk.prefix) as server:
            assert server.status().config.digest == pushed, "a restart has another config than the warning said"
            check_vectors(lab, server)
            server.stop()
    return f"a push refused and a rollback, with 0 bytes free; {calls}"


def full_disk_of_bundles(lab: Lab) -> str:
    """A push is refused with the reason, nothing half stays, what serves goes on, and the push succeeds with room."""
    with SmallDisk(lab, 1 << 20) as disk, ObjectStore({"v1": BUNDLE, "v2": RETRAINED}) as store:
        file = lab.write_config(f'bundles.folder = "{disk.folder}"', bundle=store.url("v1"))
        pushed = config(store.url("v2"), f'bundles.folder = "{disk.folder}"')
        with lab.start(file, prefix=disk.prefix) as server:
            with Traffic(lab, server) as traffic:
                for n_free in (0, 64 << 10):
                    disk.fill(n_free)
                    reason = server.refused_push(pushed)
                    assert NO_SPACE in reason, reason
                    left = [name for name in unfinished(disk.path) if name != "filler"]
                    assert not left, f"{left} was left"
                    disk.free()
                assert server.push(pushed).result == "applied"
                check_vectors(lab, server)
            calls = traffic.check()
            server.stop()
        store.is_down = True
        with lab.start(file, prefix=disk.prefix) as server:
            check_vectors(lab, server)
            server.stop()
    return f"2 pushes refused, with 0 and 64 KiB free; {calls}"


def unfinished(folder: Path) -> list[str]:
    """The files and folders of bundles that are being fetched, or were left."""
    paths = [*folder.iterdir(), *folder.glob("files/*")]
    return [path.name for path in paths if len(path.name) != 64 and path.name not in ("files", "latest")]
