"""The mixed traffic of a soak: each kind of caller has a rate and a thread of its own, and counts outcomes by code.

`RATES` states the rates. Together they keep about half a core of the server busy with the shipped bundle.
"""

import itertools
import json
import random
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# At the end, as both folders here have a `run`.
sys.path += [str(ROOT / "tests" / "clients"), str(ROOT / "tests" / "faults")]
from frames import DATA, Peer, frame, message  # noqa: E402
from stubs import generate_stubs  # noqa: E402

WORDS = ["silver", "river", "night", "garden", "winter", "paper", "lantern", "ocean", "copper", "glass", "velvet"]
# Calls per second of each kind.
RATES = {
    "hot page": 10.0,
    "small page": 20.0,
    "cold page": 1.0,
    "warm-up": 0.125,
    "push": 0.2,
    "export and import": 0.1,
    "cancelled call": 2.0,
    "reset in mid-call": 1.0,
    "answer never read": 0.25,
    "headers alone": 0.25,
    "reconnect": 1.0,
    "probe": 1.0,
}
ZIPF_RATE = 12
ZIPF = ["--items", "1000", "--candidates", "500", "--history", "80", "--deadline-ms", "1000"]
WARM_ITEMS = 64
# w2-cold sends no pages, but they must fit its items.
SMALL = ["--candidates", "1", "--history", "1"]
N_HOT_ITEMS, N_COLD_ITEMS, N_SMALL_PAGE = 600, 20, 20
# Longer than limits.write_ms and limits.read_ms of the soak's server.
STALL_SECONDS = 3.0
MAX_PIECE = 1 << 20
# Vectors of length 1 and probabilities, computed in batches of other sizes, differ by far less.
MAX_DIFFERENCE = 1e-5
BUSY = {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
ALLOWED = {"OK", "CANCELLED", "closed", *BUSY}


@dataclass
class Calls:
    """The outcomes of all callers, by kind and code. Messages are kept of codes that are not allowed."""

    counts: Counter
    errors: list[str]
    lock: threading.Lock

    def add(self, kind: str, outcome: str, message: str = "") -> None:
        with self.lock:
            self.counts[kind, outcome] += 1
            if outcome not in ALLOWED and len(self.errors) < 100:
                self.errors.append(f"{kind}: {outcome}: {message.strip()}")


@dataclass
class Probe:
    """A fixed page, asked for all the time: every vector must be what its model answered first.

    Not bit for bit: what was evicted is computed again, in a batch of another size, which rounds differently.
    """

    request: object
    firsts: dict
    n_answers: int = 0
    n_vectors: int = 0
    largest_difference: float = 0.0
    differences: list | None = None

    def check(self, answer) -> None:
        self.n_answers += 1
        digest = answer.model.digest
        # A history item that is late changes the user embedding, and with it every row.
        if any(status != 1 for status in answer.history_statuses):
            return
        rows = vectors_by_row(answer)
        firsts = self.firsts.setdefault(digest, {})
        for key, row in rows.items():
            self.n_vectors += 1
            difference = apart(firsts.setdefault(key, row), row)
            self.largest_difference = max(self.largest_difference, difference)
            if not difference <= MAX_DIFFERENCE and len(self.differences) < 50:
                self.differences.append(f"{key[0]} {key[1]} of model {digest[:12]}: {difference:.1e}")


def vectors_by_row(answer) -> dict[tuple[str, int], bytes]:
    rows = {("user_emb", 0): answer.user_emb.data}
    for name in ("mid_emb", "item_emb", "cvr"):
        data = getattr(answer, name).data
        size = len(data) // len(answer.statuses)
        for i, status in enumerate(answer.statuses):
            if status == 1:
                rows[name, i] = data[i * size : (i + 1) * size]
    return rows


def apart(one: bytes, other: bytes) -> float:
    """The largest difference between two vectors of 32-bit floats."""
    return float(np.max(np.abs(np.frombuffer(one, np.float32) - np.frombuffer(other, np.float32))))


class Traffic:
    """All callers of one server. Between two runs, one connection to each gRPC listener stays open."""

    def __init__(self, addresses: dict[str, str], pushes: "Pushes", bench: Path, seed: int = 1):
        self.bench = bench
        self.pb, self.grpc = generate_stubs(ROOT / "proto")
        self.addresses, self.pushes, self.random = addresses, pushes, random.Random(seed)
        self.calls = Calls(Counter(), [], threading.Lock())
        self.channel = self.connect("grpc")
        self.service = self.grpc.MidEmbServiceStub(self.channel)
        self.admin_channel = self.connect("admin")
        self.admin = self.grpc.AdminServiceStub(self.admin_channel)
        self.hot_items = [self.item(f"soak-hot-{i}") for i in range(N_HOT_ITEMS)]
        self.hot_ids = [self.pb.Item(id=item.id) for item in self.hot_items]
        self.n_cold = itertools.count()
        self.run_id = self.random.getrandbits(48)
        self.probe = Probe(self.probe_request(), {}, differences=[])
        self.bench_runs: list[dict] = []

    def connect(self, listener: str) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        return grpc.insecure_channel(self.addresses[listener], options=options)

    def close(self) -> None:
        self.channel.close()
        self.admin_channel.close()

    def item(self, name: str):
        """An item whose text depends on its name alone."""
        rng = random.Random(name)
        title, category = (" ".join(rng.choices(WORDS, k=n)) for n in (4, 3))
        return self.pb.Item(id=name, text=self.pb.ItemText(title=f"{title} {name}", category=category))

    def cold_items(self, n: int) -> list:
        return [self.item(f"cold-{self.run_id}-{next(self.n_cold)}") for _ in range(n)]

    def probe_request(self):
        names = (f"probe-{i}" for i in itertools.count())
        history = [self.item(next(names)) for _ in range(8)]
        candidates = [self.item(next(names)) for _ in range(20)]
        outputs = [self.pb.OUTPUT_MID_EMB, self.pb.OUTPUT_CVR, self.pb.OUTPUT_USER_EMB, self.pb.OUTPUT_ITEM_EMB]
        return self.pb.GetMidEmbRequest(user_id="probe", history=history, candidates=candidates, outputs=outputs)

    def page(self, n_history: int, n_candidates: int):
        """Known items by id alone, with a history that was never sent."""
        history = self.random.sample(self.hot_ids, n_history)
        candidates = self.random.sample(self.hot_ids, n_candidates)
        user_id = f"soak-user-{self.random.getrandbits(32)}"
        return self.pb.GetMidEmbRequest(user_id=user_id, history=history, candidates=candidates)

    def fill(self, n: int) -> None:
        """Adds `n` entries to each cache but the users': vectors under made-up digests, and ids that share one text."""
        model = self.service.GetModelInfo(self.pb.GetModelInfoRequest(), timeout=10).models[0]
        parts = {"content": (model.encoder_digest, model.content_dim), "item": (model.tower_digest, model.item_dim)}
        for kind, (digest, dim) in parts.items():
            file = vectors_file(kind, digest, np.random.default_rng(self.random.getrandbits(32)), n, dim)
            self.admin.ImportCache((self.pb.CacheChunk(data=piece) for piece in pieces(file)), timeout=60)
        text = self.item("filler").text
        items = [self.pb.Item(id=f"filler-{next(self.n_cold)}", text=text) for _ in range(n)]
        self.service.WarmItems(iter([self.pb.WarmItemsRequest(items=items)]), timeout=60)

    # One call of each kind.

    def ask(self, request, timeout: float = 5.0):
        """Sends a page of known items; those that the server no longer knows are sent again with their text."""
        answer = self.service.GetMidEmb(request, timeout=timeout)
        unknown = self.pb.ROW_STATUS_UNKNOWN_ITEM
        if unknown in answer.statuses or unknown in answer.history_statuses:
            again = self.pb.GetMidEmbRequest(user_id=request.user_id)
            for name in ("history", "candidates"):
                items = [self.hot_items[int(item.id.rsplit("-", 1)[1])] for item in getattr(request, name)]
                getattr(again, name).extend(items)
            self.service.GetMidEmb(again, timeout=timeout)
        return "OK"

    def hot_page(self) -> str:
        return self.ask(self.page(80, 500))

    def small_page(self) -> str:
        return self.ask(self.page(8, N_SMALL_PAGE))

    def cold_page(self) -> str:
        request = self.page(8, 1)
        request.ClearField("candidates")
        request.candidates.extend(self.cold_items(N_COLD_ITEMS))
        self.service.GetMidEmb(request, timeout=0.3)
        return "OK"

    def warm_up(self) -> str:
        """Streams cold items; every third stream is cancelled after its first chunk."""
        chunks = [self.pb.WarmItemsRequest(items=self.cold_items(8)) for _ in range(4)]
        if self.random.randrange(3):
            warmed = self.service.WarmItems(iter(chunks), timeout=30)
            return "OK" if warmed.failed == 0 else "rows failed"
        goes_on = threading.Event()

        def stalling() -> Iterator:
            yield chunks[0]
            goes_on.wait(STALL_SECONDS)

        call = self.service.WarmItems.future(stalling(), timeout=30)
        time.sleep(0.1)
        call.cancel()
        goes_on.set()
        return code_of(call)

    def export_and_import(self) -> str:
        """Reads a whole cache and sends it back; every third time, one of both is left in the middle."""
        cache = self.random.choice(["content", "item"])
        left_in = self.random.choice([None, None, None, None, "export", "import"])
        stream = self.admin.ExportCache(self.pb.ExportCacheRequest(cache=cache), timeout=30)
        if left_in == "export":
            next(stream)
            stream.cancel()
            return "CANCELLED"
        chunks = list(stream)
        if left_in == "import":
            goes_on = threading.Event()

            def stalling() -> Iterator:
                yield from chunks[: max(1, len(chunks) // 2)]
                goes_on.wait(STALL_SECONDS)

            call = self.admin.ImportCache.future(stalling(), timeout=30)
            time.sleep(0.2)
            call.cancel()
            goes_on.set()
            return code_of(call)
        self.admin.ImportCache(iter(chunks), timeout=30)
        return "OK"

    def cancelled_call(self) -> str:
        call = self.service.GetMidEmb.future(self.page(80, 500), timeout=5)
        time.sleep(self.random.uniform(0, 0.01))
        call.cancel()
        return code_of(call)

    def reset_in_mid_call(self) -> str:
        """Resets the connection after the headers, in the middle of the message, or after it."""
        body = message(self.page(80, 500).SerializeToString())
        peer = Peer(self.addresses["grpc"])
        if self.random.randrange(3) == 0:
            peer.call("GetMidEmb", body)
        else:
            peer.call("GetMidEmb", None)
            peer.send(frame(DATA, 0, 1, body[: self.random.choice([0, self.random.randrange(len(body))])]))
        time.sleep(self.random.uniform(0, 0.02))
        peer.reset()
        return "closed"

    def answer_never_read(self) -> str:
        """An answer of 500 rows is larger than the window, so the server waits until `limits.write_ms` is over."""
        return self.stall(message(self.page(80, 500).SerializeToString()))

    def headers_alone(self) -> str:
        return self.stall(None)

    def stall(self, body: bytes | None) -> str:
        peer = Peer(self.addresses["grpc"])
        peer.call("GetMidEmb", body, "1H")
        time.sleep(STALL_SECONDS)
        peer.close()
        return "closed"

    def reconnect(self) -> str:
        with self.connect("grpc") as channel:
            self.grpc.MidEmbServiceStub(channel).GetMidEmb(self.page(8, N_SMALL_PAGE), timeout=5)
        return "OK"

    def ask_probe(self) -> str:
        self.probe.check(self.service.GetMidEmb(self.probe.request, timeout=5))
        return "OK"

    def callers(self) -> dict[str, Callable[[], str]]:
        return {
            "hot page": self.hot_page,
            "small page": self.small_page,
            "cold page": self.cold_page,
            "warm-up": self.warm_up,
            "push": lambda: self.pushes.next(self.admin, self.pb),
            "export and import": self.export_and_import,
            "cancelled call": self.cancelled_call,
            "reset in mid-call": self.reset_in_mid_call,
            "answer never read": self.answer_never_read,
            "headers alone": self.headers_alone,
            "reconnect": self.reconnect,
            "probe": self.ask_probe,
        }

    def run_for(self, seconds: float) -> None:
        """Runs all callers for this long, and returns when the last call has ended."""
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self.repeat, args=(kind, call, until)) for kind, call in self.callers().items()
        ]
        threads.append(threading.Thread(target=self.run_bench, args=(seconds,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def repeat(self, kind: str, call: Callable[[], str], until: float) -> None:
        """Calls at the kind's rate; calls that are overdue are left out."""
        period = 1 / RATES[kind]
        due = time.monotonic() + self.random.uniform(0, min(period, 1))
        while due < until:
            time.sleep(max(0.0, due - time.monotonic()))
            self.count(kind, call)
            due = max(due + period, time.monotonic())

    def count(self, kind: str, call: Callable[[], str]) -> None:
        try:
            self.calls.add(kind, call())
        except grpc.RpcError as error:
            self.calls.add(kind, error.code().name, error.details())
        except Exception as error:
            self.calls.add(kind, type(error).__name__, str(error))

    def run_bench(self, seconds: float) -> None:
        """Lets `midemb-bench` send its share: pages by popularity, and cold items through WarmItems."""
        n_requests = max(10, round(ZIPF_RATE * seconds * 0.35))
        rate = ["--rate", str(ZIPF_RATE), "--requests", str(n_requests)]
        for scenario, *more in (["w3-zipf", *rate, *ZIPF], ["w2-cold", "--items", str(WARM_ITEMS), *SMALL]):
            server = ["--server", self.addresses["grpc"], "--metrics", self.addresses["metrics"]]
            command = [str(self.bench), scenario, "--json", *server, *more]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
                self.bench_runs += [json.loads(line) for line in run.stdout.splitlines()]
                self.calls.add(f"midemb-bench {scenario}", "OK")
            except subprocess.SubprocessError as error:
                self.calls.add(f"midemb-bench {scenario}", "failed", getattr(error, "stderr", None) or str(error))


def vectors_file(kind: str, digest: str, rng: np.random.Generator, n: int, dim: int) -> bytes:
    """A file of `midemb cache import` (safetensors) with random vectors of length 1 under random digests of texts."""
    vectors = rng.standard_normal((n, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tensors = {"vectors": vectors.tobytes(), "text_digests": rng.bytes(16 * n)}
    end = len(tensors["vectors"])
    header = {
        "__metadata__": {"format": "midemb-vectors", "format_version": "1", "kind": kind, "n": str(n)}
        | {"digest": digest, "dim": str(dim)},
        "vectors": {"dtype": "F32", "shape": [n, dim], "data_offsets": [0, end]},
        "text_digests": {"dtype": "U8", "shape": [n, 16], "data_offsets": [end, end + 16 * n]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def pieces(file: bytes) -> Iterator[bytes]:
    return (file[start : start + MAX_PIECE] for start in range(0, len(file), MAX_PIECE))


def code_of(call: grpc.Future) -> str:
    """The code of a call that was cancelled, or that had ended before."""
    return call.code().name if call.done() and call.code() else "CANCELLED"


class Pushes:
    """Two bundles pushed in turn, alone and with shares, with rollbacks and pushes that must be refused in between.

    A bundle is loaded anew when neither the config in force nor the one before it has it, so each is pushed twice in a
    row, with another salt.
    """

    def __init__(self, bundles: dict[str, Path]):
        self.bundles, self.n_salts = bundles, 0
        self.steps = itertools.cycle(
            ["b", "b", "missing", "a", "half", "frozen", "rollback", "stale", "a", "a", "broken"]
        )
        self.results: Counter = Counter()
        self.took_ms: list[int] = []

    def config(self, **shares: int) -> str:
        self.n_salts += 1
        lines = ["[routing]", f'salt = "soak-{self.n_salts}"']
        for name, share in shares.items():
            lines += ["[[models]]", f'name = "{name}"', f'bundle = "{self.bundles[name]}"', f"share = {share}"]
        return "\n".join([*lines, ""])

    def next(self, admin, pb) -> str:
        step = next(self.steps)
        try:
            result = self.do(step, admin, pb)
        except grpc.RpcError as error:
            expected = {
                "missing": grpc.StatusCode.FAILED_PRECONDITION,
                "frozen": grpc.StatusCode.FAILED_PRECONDITION,
                "stale": grpc.StatusCode.ABORTED,
                "broken": grpc.StatusCode.INVALID_ARGUMENT,
            }
            if error.code() != expected.get(step):
                raise
            result = f"refused ({error.code().name})"
        self.results[step, result] += 1
        return "OK"

    def do(self, step: str, admin, pb) -> str:
        in_force = admin.GetStatus(pb.GetStatusRequest(), timeout=10).config.digest
        if step == "rollback":
            admin.Rollback(pb.RollbackRequest(expected_digest=in_force), timeout=10)
            return "rolled back"
        config = {
            "a": lambda: self.config(a=100),
            "b": lambda: self.config(b=100),
            "half": lambda: self.config(a=50, b=50),
            "missing": lambda: self.config(a=100).replace(str(self.bundles["a"]), "no-such-bundle"),
            "frozen": lambda: "limits.max_text_bytes = 4096\n" + self.config(a=100),
            "stale": lambda: self.config(a=100),
            "broken": lambda: "[[models]\n",
        }[step]()
        expected = "0" * 64 if step == "stale" else in_force
        pushed = admin.PushConfig(pb.PushConfigRequest(config=config, expected_digest=expected), timeout=90)
        self.took_ms.append(pushed.report.took_ms)
        return pushed.result

    def settle(self, admin, pb) -> None:
        """Puts bundle a in force and bundle b at hand for a rollback, as at every idle moment."""
        for step in ("b", "a"):
            self.results[step, self.do(step, admin, pb)] += 1
