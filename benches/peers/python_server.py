"""A peer as a team would write it first: grpcio and onnxruntime in Python, with midemb's contract, bundle and work.

    python benches/peers/python_server.py --bundle models/default --proto proto [--format 2] [--threads 2]

Answers `GetMidEmb` (ids only, F32, mid-emb) and `WarmItems`, and serves the `process_*` metrics for the benchmark.
Prints one line, `serving GRPC METRICS`, when it is ready, and stops on SIGTERM.

It keeps the item tower's adapted items for its user tower to read, as midemb does. With `--format 1` it runs the user
tower of format 1 (`format_1.py`), which reads content embeddings.

It is written to be fast for Python: one session per thread on one core each, vectors in two matrices that are gathered
by row number, and tensors sent without conversion. The features that it lacks make it faster: it has no deadlines, no
statuses except OK and UNKNOWN_ITEM, no metrics of its own and no eviction.
"""

import argparse
import os
import signal
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import format_1
import grpc
import jinja2
import numpy as np
import onnxruntime
import prometheus_client
import tokenizers

from towers import Towers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "clients"))
from stubs import generate_stubs

FIELDS = ("title", "category", "brand", "price", "keywords", "attributes")
GRAPHS = ("encoder", "item_tower", "user_tower", "cvr")
ENCODE_AT_ONCE = 16
OK, UNKNOWN_ITEM = 1, 2
ROWS = 1 << 16


class Model(Towers):
    """A bundle's graphs. Every thread has its own sessions."""

    def __init__(self, folder: Path, format: int) -> None:
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.format = format
        self.graphs: dict[str, str | bytes] = {name: str(folder / self.manifest[name]["file"]) for name in GRAPHS}
        if format == 1:
            self.graphs["user_tower"] = format_1.user_tower(folder).SerializeToString()
            self.manifest["user_tower"]["inputs"] = format_1.inputs(self.manifest)
        self.template = jinja2.Environment(autoescape=False).from_string(self.manifest["item_text"]["template"])
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / self.manifest["encoder"]["tokenizer"]))
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.enable_truncation(self.manifest["item_text"]["max_tokens"])
        self.tokenizer.enable_padding(pad_id=self.manifest["encoder"]["pad_id"])
        self.local = threading.local()

    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        spec = self.manifest[graph]
        sessions = self.local.__dict__
        if graph not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            model = self.graphs[graph]
            sessions[graph] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return sessions[graph].run(spec["outputs"], dict(zip(spec["inputs"], inputs, strict=True)))

    def content(self, texts: list) -> np.ndarray:
        prompts = [self.template.render(**{name: getattr(text, name) for name in FIELDS}) for text in texts]
        encoded = self.tokenizer.encode_batch(prompts)
        ids = np.array([row.ids for row in encoded], dtype=np.int64)
        mask = np.array([row.attention_mask for row in encoded], dtype=np.int64)
        return self.run("encoder", ids, mask)[0]


class Peer:
    """The gRPC service over one model, with vectors of up to `ROWS` items in memory."""

    def __init__(self, model: Model, pb) -> None:
        self.model, self.pb = model, pb
        manifest = model.manifest
        self.max_history = manifest["user_tower"]["max_history"]
        self.row_of: dict[str, int] = {}
        self.history_vectors = np.zeros((ROWS, model.history_dim()), dtype=np.float32)
        self.items = np.zeros((ROWS, manifest["item_tower"]["dim"]), dtype=np.float32)

    def WarmItems(self, chunks, context):
        n_items = n_encoded = 0
        for chunk in chunks:
            n_items += len(chunk.items)
            new = [item for item in chunk.items if item.id not in self.row_of]
            for start in range(0, len(new), ENCODE_AT_ONCE):
                batch = new[start : start + ENCODE_AT_ONCE]
                content = self.model.content([item.text for item in batch])
                first = len(self.row_of)
                if first + len(batch) > ROWS:
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"this peer keeps at most {ROWS} items")
                rows = slice(first, first + len(batch))
                self.items[rows], self.history_vectors[rows] = self.model.item(content)
                self.row_of.update((item.id, first + i) for i, item in enumerate(batch))
                n_encoded += len(batch)
        return self.pb.WarmItemsResponse(items=n_items, encoded=n_encoded, already_cached=n_items - n_encoded)

    def GetMidEmb(self, request, context):
        history = [self.row_of[item.id] for item in request.history[-self.max_history :] if item.id in self.row_of]
        rows = [self.row_of.get(item.id) for item in request.candidates]
        known = [row for row in rows if row is not None]
        no_history = np.zeros((1, 1, self.history_vectors.shape[1]), np.float32)
        vectors = self.history_vectors[history][None] if history else no_history
        mask = np.full(vectors.shape[:2], 1 if history else 0, dtype=np.int64)
        user = self.model.user(vectors, mask)
        mid_emb, _ = self.model.run("cvr", user, self.items[known], np.zeros(len(known), dtype=np.int64))
        if len(known) < len(rows):
            scattered = np.zeros((len(rows), mid_emb.shape[1]), np.float32)
            scattered[[i for i, row in enumerate(rows) if row is not None]] = mid_emb
            mid_emb = scattered
        return self.pb.GetMidEmbResponse(
            mid_emb=self.pb.Tensor(dtype=1, shape=mid_emb.shape, data=mid_emb.tobytes()),
            statuses=[OK if row is not None else UNKNOWN_ITEM for row in rows],
            history_used=len(history),
            history_statuses=[OK] * len(request.history),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--proto", type=Path, required=True)
    parser.add_argument("--format", type=int, choices=[1, 2], default=2, help="format of the graphs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    pb, pb_grpc = generate_stubs(args.proto)
    service = type("Service", (Peer, pb_grpc.MidEmbServiceServicer), {})(Model(args.bundle, args.format), pb)
    server = grpc.server(ThreadPoolExecutor(args.threads), options=[("grpc.max_receive_message_length", 64 << 20)])
    pb_grpc.add_MidEmbServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    http, _ = prometheus_client.start_http_server(0, addr="127.0.0.1")
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(grace=5))
    print(f"serving 127.0.0.1:{port} 127.0.0.1:{http.server_port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
