"""The server under test: its config, its process, its log and its figures."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
# Two bundles with the same encoder and different towers.
BUNDLE, RETRAINED = FIXTURES / "bundle", FIXTURES / "retrained"
# How long anything may take that is not itself measured.
PATIENCE_SECONDS = 30
MIB = 1 << 20

sys.path.insert(0, str(ROOT / "tests" / "clients"))
import grpc  # noqa: E402
from stubs import generate_stubs  # noqa: E402

pb, pb_grpc = generate_stubs(ROOT / "proto")
LOCAL = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", 64 * MIB)]


class Skipped(Exception):
    """This machine does not permit the fault; the message says what is missing."""


def eventually(what: str, holds: Callable[[], bool], within: float = PATIENCE_SECONDS, every: float = 0.02) -> float:
    """Waits until `holds` and returns the seconds that it took."""
    began = time.monotonic()
    while not holds():
        waited = time.monotonic() - began
        assert waited < within, f"not within {within} s: {what}"
        time.sleep(every)
    return time.monotonic() - began


def config(bundle: Path | str, *lines: str) -> str:
    """A config file of a server on free ports, with further lines of dotted keys."""
    own = ['server.listen = "127.0.0.1:0"', 'admin.listen = "127.0.0.1:0"', 'telemetry.metrics_listen = "127.0.0.1:0"']
    own += ['telemetry.log_format = "json"', "limits.default_deadline_ms = 30000"]
    model = ["", "[[models]]", 'name = "learn"', f'bundle = "{bundle}"', ""]
    return "\n".join([*own, *lines, *model])


@dataclass
class Lab:
    """What all faults share. `folder` is the current fault's own."""

    binary: Path
    folder: Path
    # The answers to all pages by the version of the bundle.
    references: dict = field(default_factory=dict)

    def write_config(self, *lines: str, bundle: Path | str = BUNDLE) -> Path:
        file = self.folder / "midemb.toml"
        file.write_text(config(bundle, *lines))
        return file

    def start(
        self,
        file: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> "Server":
        """Starts a server, under `prefix`, and waits until it serves."""
        server = self.spawn(file, *arguments, prefix=prefix, environment=environment)
        try:
            server.wait_until_serving()
        except BaseException:
            server.kill()
            raise
        return server

    def spawn(
        self,
        file: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> "Server":
        command = [*prefix, str(self.binary), "serve", "--config", str(file), *arguments]
        own = {name: value for name, value in os.environ.items() if not name.startswith("MIDEMB__")}
        own |= {"NO_PROXY": "127.0.0.1", "ORT_DISABLE_TELEMETRY": "1"}
        return Server(file, command, own | (environment or {}))


class Server:
    """A running server. Leaving its `with` block kills it if it still runs."""

    def __init__(self, file: Path, command: list[str], environment: dict[str, str]):
        self.file = file
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.lines: list[dict] = []
        self.other_lines: list[str] = []
        self.logged = threading.Condition()
        self.channels: list[grpc.Channel] = []
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def read_log(self) -> None:
        for raw in self.process.stderr:
            line = raw.decode(errors="replace").rstrip()
            with self.logged:
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    self.other_lines.append(line)
                self.logged.notify_all()

    def logs(self, message: str) -> list[dict]:
        with self.logged:
            return [line for line in self.lines if line.get("message") == message]

    def wait_for_log(self, message: str, n: int = 1, within: float = PATIENCE_SECONDS) -> dict:
        """The line that has this message for the `n`th time."""

        def is_there() -> bool:
            return len(self.logs(message)) >= n or not self.reader.is_alive()

        eventually(f"the log says {message!r} {n} times; it ends with {self.tail()}", is_there, within)
        found = self.logs(message)
        assert len(found) >= n, f"the server ended without {message!r}: {self.tail()}"
        return found[n - 1]

    def tail(self) -> str:
        with self.logged:
            lines = [line.get("message", "") for line in self.lines[-5:]]
            return " | ".join([*lines, *self.other_lines[-3:]])

    def wait_until_serving(self) -> None:
        line = self.wait_for_log("serving", within=60)
        self.grpc, self.admin, self.metrics = line["grpc"], line["admin"], line["metrics"]

    @property
    def pid(self) -> int:
        return self.process.pid

    def channel(self, address: str) -> grpc.Channel:
        # Channels to the same address share a connection unless their arguments differ.
        number = ("midemb.faults.channel", len(self.channels))
        channel = grpc.insecure_channel(address, options=[*LOCAL, number])
        self.channels.append(channel)
        return channel

    def new_client(self):
        """A client with a connection of its own."""
        return pb_grpc.MidEmbServiceStub(self.channel(self.grpc))

    @cached_property
    def client(self):
        return self.new_client()

    @cached_property
    def operator(self):
        return pb_grpc.AdminServiceStub(self.channel(self.admin))

    def status(self):
        return self.operator.GetStatus(pb.GetStatusRequest(), timeout=PATIENCE_SECONDS)

    def push(self, text: str, timeout: float = PATIENCE_SECONDS):
        request = pb.PushConfigRequest(config=text, expected_digest=self.status().config.digest)
        return self.operator.PushConfig(request, timeout=timeout)

    def refused_push(self, text: str, timeout: float = PATIENCE_SECONDS) -> str:
        """Pushes a config that must be refused, and returns the reason, which the log has in one line, too."""
        n_refused = len(self.logs("push refused"))
        try:
            answer = self.push(text, timeout)
        except grpc.RpcError as error:
            reason = error.details()
            assert error.code() != grpc.StatusCode.DEADLINE_EXCEEDED, f"not refused within {timeout} s"
        else:
            raise AssertionError(f"the push was not refused: {answer.result}")
        assert "\n" not in reason, f"the reason has several lines: {reason}"
        logged = self.wait_for_log("push refused", n_refused + 1)["reason"]
        assert logged == reason, f"the log says {logged!r}, the answer {reason!r}"
        return reason

    def scrape(self) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{self.metrics}/metrics", timeout=PATIENCE_SECONDS) as answer:
            return answer.read().decode()

    def figure(self, name: str, labels: str = "") -> float:
        """The sum over the series of a metric that have these labels."""
        series = re.findall(rf"^{name}(\{{[^}}]*\}})? (\S+)$", self.scrape(), re.MULTILINE)
        return sum(float(value) for found, value in series if labels in found)

    def n_encoded(self) -> int:
        return int(self.figure("midemb_batch_items_sum", 'stage="encode"'))

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10

    def n_open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kills the process as a crash of the machine would, if it still runs."""
        self.process.kill()
        self.end()

    def end(self) -> int:
        code = self.process.wait(timeout=PATIENCE_SECONDS * 2)
        for channel in self.channels:
            channel.close()
        self.channels.clear()
        self.reader.join(timeout=PATIENCE_SECONDS)
        return code

    def stop(self) -> None:
        """Ends the process as an orchestrator does; every line of its log must be JSON, and none a panic."""
        self.signal(signal.SIGTERM)
        code = self.end()
        assert code == 0, f"exit code {code} after SIGTERM: {self.tail()}"
        assert not self.other_lines, f"log lines that are not JSON: {self.other_lines[:3]}"
        panics = [line for line in self.lines if "panic" in json.dumps(line)]
        assert not panics, f"panicked: {panics[:1]}"
