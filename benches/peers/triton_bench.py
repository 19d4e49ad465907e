"""Sends the workload of `midemb-bench w1-hot` to the Triton peer in KServe's protocol, as a closed loop.

    python benches/peers/triton_bench.py --server GRPC --pid PID --bundle models/default [--ids strings]

GRPC and PID are the values that `triton_server.py` prints; `--ids` must be what it was started with. Warms made-up
items with random unit vectors instead of the encoder's, compares one response with onnxruntime's result in this process
(of the bundle's own graphs; those of format 1 give the same), then sends newly drawn histories and candidates. Prints
one JSON object with the keys of `midemb-bench --json`; `server_*` are sums over Triton and the processes of its models
(resident memory counts shared pages once per process).

Requests are serialized before the clock starts and responses are not parsed, so that this client costs little.
"""

import argparse
import itertools
import json
import os
import struct
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import grpc
import numpy as np
import onnxruntime

INFER = "/inference.GRPCInferenceService/ModelInfer"
# Warm-up requests, as memory still grows during the first ones; `midemb-bench` sends the same number.
UNCOUNTED = 40
WARM_AT_ONCE = 250
TOLERANCE = 1e-4
protos = grpc.protos("kserve.proto")

Tensor = tuple[str, str, tuple[int, ...], bytes]


def infer_request(model: str, *tensors: Tensor) -> bytes:
    message = protos.ModelInferRequest(model_name=model)
    for name, datatype, shape, data in tensors:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(data)
    return message.SerializeToString()


def string_id(i: int) -> bytes:
    """Returns an id as long as those of `midemb-bench`, as an element of a BYTES tensor."""
    item = f"hot-{i}".encode()
    return struct.pack("<I", len(item)) + item


def integer_id(i: int) -> bytes:
    """Returns an id as an element of an INT64 tensor. A catalogue's ids are not its row numbers, nor are these."""
    return struct.pack("<q", 1_000_000_007 * (i + 1))


# `--ids`: the protocol's data type and the function that returns the `i`-th id.
ID_TYPES = {"strings": ("BYTES", string_id), "integers": ("INT64", integer_id)}


@dataclass(frozen=True)
class Items:
    """Made-up items. The same ids, which are elements of a tensor of `id_type`, have the same vectors in every run."""

    id_type: str
    ids: list[bytes]
    contents: np.ndarray

    @classmethod
    def made_up(cls, n: int, dim: int, kind: str) -> "Items":
        contents = np.random.default_rng(1).standard_normal((n, dim), dtype=np.float32)
        contents /= np.linalg.norm(contents, axis=-1, keepdims=True)
        id_type, id_of = ID_TYPES[kind]
        return cls(id_type, [id_of(i) for i in range(n)], contents)

    def tensor(self, name: str, rows: Iterable[int]) -> Tensor:
        chosen = [self.ids[row] for row in rows]
        return name, self.id_type, (len(chosen),), b"".join(chosen)

    def warm_requests(self) -> Iterator[bytes]:
        for start in range(0, len(self.ids), WARM_AT_ONCE):
            part = self.contents[start : start + WARM_AT_ONCE]
            ids = self.tensor("IDS", range(start, start + len(part)))
            yield infer_request("items", ids, ("CONTENT", "FP32", part.shape, part.tobytes()))

    def request(self, history: np.ndarray, candidates: np.ndarray) -> bytes:
        return infer_request("mid_emb", self.tensor("HISTORY", history), self.tensor("CANDIDATES", candidates))


def expected(folder: Path, manifest: dict, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Returns the expected MID_EMB for the content embeddings of one request."""

    def run(graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        spec = manifest[graph]
        session = onnxruntime.InferenceSession(str(folder / spec["file"]), providers=["CPUExecutionProvider"])
        return session.run(spec["outputs"], dict(zip(spec["inputs"], inputs, strict=True)))

    mask = np.ones((1, len(history)), np.int64)
    # All actions are 0, which means that none is known.
    actions = [np.zeros_like(mask)] if manifest["history"]["actions"] else []
    _, adapted = run("item_tower", history)
    items, _ = run("item_tower", candidates)
    (user,) = run("user_tower", adapted[None], mask, *actions)
    return run("cvr", user, items, np.zeros(len(candidates), np.int64))[0]


def check(answer: bytes, wanted: np.ndarray) -> None:
    message = protos.ModelInferResponse.FromString(answer)
    (output,), (data,) = message.outputs, message.raw_output_contents
    if tuple(output.shape) != wanted.shape or len(data) != wanted.nbytes:
        sys.exit(f"MID_EMB has the shape {list(output.shape)} in {len(data)} bytes, expected {list(wanted.shape)}")
    difference = np.abs(np.frombuffer(data, np.float32).reshape(wanted.shape) - wanted).max()
    if not difference <= TOLERANCE:
        sys.exit(f"MID_EMB differs from onnxruntime's result by {difference}, more than {TOLERANCE}")


@dataclass(frozen=True)
class Usage:
    """CPU time and resident memory used so far, of one process or of a process with all its descendants."""

    cpu_seconds: float = 0
    resident_bytes: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.cpu_seconds + other.cpu_seconds, self.resident_bytes + other.resident_bytes)

    @classmethod
    def of_one(cls, pid: int) -> "Usage":
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        user, system, pages = int(fields[11]), int(fields[12]), int(fields[21])
        return cls((user + system) / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))

    @classmethod
    def of_tree(cls, pid: int) -> "Usage":
        return sum(map(cls.of_one, [pid, *descendants(pid)]), cls())


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


def send(infer: grpc.UnaryUnaryMultiCallable, requests: Iterable[bytes], concurrency: int) -> tuple[list[float], int]:
    """Returns the seconds of each request and the bytes of the smallest response. A failed request ends the run."""
    left = iter(requests)

    def loop() -> list[tuple[float, int]]:
        answers = []
        # The threads share a list's iterator, which gives each request to one thread only.
        for request in left:
            start = time.perf_counter()
            answer = infer(request)
            answers.append((time.perf_counter() - start, len(answer)))
        return answers

    with ThreadPoolExecutor(concurrency) as pool:
        loops = [pool.submit(loop) for _ in range(concurrency)]
        answers = list(itertools.chain.from_iterable(future.result() for future in loops))
    return [took for took, _ in answers], min(size for _, size in answers)


def measure(args: argparse.Namespace, infer: grpc.UnaryUnaryMultiCallable) -> dict:
    manifest = tomllib.loads((args.bundle / "manifest.toml").read_text())
    items, random = Items.made_up(args.items, manifest["encoder"]["dim"], args.ids), np.random.default_rng()
    draw = lambda n: random.choice(args.items, n, replace=False)  # noqa: E731
    for request in items.warm_requests():
        infer(request)
    history, candidates = draw(args.history), draw(args.candidates)
    wanted = expected(args.bundle, manifest, items.contents[history], items.contents[candidates])
    check(infer(items.request(history, candidates)), wanted)

    requests = [items.request(draw(args.history), draw(args.candidates)) for _ in range(args.requests + UNCOUNTED)]
    send(infer, requests[:UNCOUNTED], args.concurrency)
    before, own, start = Usage.of_tree(args.pid), time.process_time(), time.perf_counter()
    seconds, smallest = send(infer, requests[UNCOUNTED:], args.concurrency)
    took, own, after = time.perf_counter() - start, time.process_time() - own, Usage.of_tree(args.pid)
    if smallest < wanted.nbytes:
        sys.exit(f"a response has {smallest} bytes, but MID_EMB alone must have {wanted.nbytes}")
    p50, p99, longest = np.quantile(seconds, [0.5, 0.99, 1]) * 1e3
    return {
        "scenario": "w1-hot",
        "sent": args.requests,
        "good": len(seconds),
        "history": args.history,
        "candidates": args.candidates,
        "seconds": took,
        "good_per_second": len(seconds) / took,
        "server_cpu_ms": (after.cpu_seconds - before.cpu_seconds) * 1e3 / args.requests,
        "client_cpu_ms": own * 1e3 / args.requests,
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": longest,
        "server_rss_bytes": after.resident_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--ids", choices=ID_TYPES, default="strings", help="what is sent for an item")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--history", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--items", type=int, default=1000)
    args = parser.parse_args()
    with grpc.insecure_channel(args.server, options=[("grpc.max_receive_message_length", 64 << 20)]) as channel:
        # Without serializers, requests and responses are bytes.
        print(json.dumps(measure(args, channel.unary_unary(INFER))))


if __name__ == "__main__":
    main()
