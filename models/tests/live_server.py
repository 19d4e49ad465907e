"""Runs the real server binary on free ports.

MIDEMB_BINARY is the path of the binary; by default, it is the one that `cargo build --release` builds. Tests are
skipped if the binary is missing, and fail instead if MIDEMB_REQUIRE_SERVER=1.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120


def binary() -> Path:
    path = Path(os.environ.get("MIDEMB_BINARY", ROOT / "target" / "release" / "midemb"))
    if not path.is_file():
        reason = f"no server binary at {path}; build it, or set MIDEMB_BINARY"
        if os.environ.get("MIDEMB_REQUIRE_SERVER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@dataclass(frozen=True)
class Server:
    grpc: str
    admin: str
    metrics: str

    def metric(self, name: str, **labels: str) -> float:
        """Returns the sum of a metric over all series with these labels."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=TIMEOUT_SECONDS) as response:
            lines = response.read().decode().splitlines()
        series = [line for line in lines if re.match(rf"{name}[{{ ]", line)]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(line.rsplit(" ", 1)[1]) for line in series if all(label in line for label in wanted))

    def import_cache(self, *files: Path) -> str:
        command = [binary(), "cache", "import", "--admin", self.admin, *files]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_SECONDS).stdout


@contextlib.contextmanager
def serving(bundle: Path, folder: Path):
    """Starts a server of one bundle and stops it at the end of the block. Its config is written to `folder`."""
    library = next(iter(sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"))))
    config = folder / "midemb.toml"
    config.write_text(
        f'server.listen = "127.0.0.1:0"\nadmin.listen = "127.0.0.1:0"\ntelemetry.metrics_listen = "127.0.0.1:0"\n'
        f'telemetry.log_format = "json"\ninference.threads = 1\ninference.provider = "cpu"\n'
        f"inference.onnxruntime = {json.dumps(str(library))}\nlimits.default_deadline_ms = {TIMEOUT_SECONDS * 1000}\n"
        f'[[models]]\nname = "learn"\nbundle = {json.dumps(str(bundle.resolve()))}\n'
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIDEMB__")}
    command = [binary(), "serve", "--config", config]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield _wait_for_addresses(process)
        finally:
            process.terminate()


def _wait_for_addresses(process: subprocess.Popen) -> Server:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        # Reads to the end, so that the server never blocks on a full pipe.
        # When the block of `serving` ends, the pipe may be closed before its end was read.
        with contextlib.suppress(ValueError):
            for line in process.stderr:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    seen = []
    while (line := lines.get(timeout=TIMEOUT_SECONDS)) is not None:
        seen.append(line)
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event.get("message") == "serving":
                return Server(event["grpc"], event["admin"], event["metrics"])
    raise AssertionError("the server exited before it was serving:\n" + "".join(seen))
