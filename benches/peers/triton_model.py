"""The Triton peer's two models for Triton's Python backend. One file serves both and selects by model name.

`triton_server.py` copies this file into a model repository; it is not run by hand.

- `items` takes IDS [n] and their content embeddings CONTENT [n, D], runs the item tower and stores content and item
  embeddings in a folder;
- `mid_emb` takes HISTORY [h] and CANDIDATES [n], ids only, and returns MID_EMB [n, M].

Every instance is its own process. It reads the folder into its memory when it finds an unknown id, so a request of the
hot workload uses only a dict and two matrices, as in `python_server.py`.
"""

import json
import os
import tomllib
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

ITEMS, MID_EMB = "items", "mid_emb"


class Graphs:
    """A bundle's graphs, with one session of one thread per graph."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def load(self, graph: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(self.folder / self.manifest[graph]["file"])
        self.sessions[graph] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        spec = self.manifest[graph]
        return self.sessions[graph].run(spec["outputs"], dict(zip(spec["inputs"], inputs, strict=True)))


class Store:
    """Ids with their content and item embeddings, one row per id; one process writes them and others read them."""

    def __init__(self, folder: Path, content_dim: int, item_dim: int) -> None:
        self.file = folder / "vectors.npz"
        self.row_of: dict[bytes, int] = {}
        self.contents = np.zeros((0, content_dim), np.float32)
        self.items = np.zeros((0, item_dim), np.float32)

    def add(self, ids: list[bytes], contents: np.ndarray, items: np.ndarray) -> None:
        self.row_of.update((item, len(self.row_of) + i) for i, item in enumerate(ids))
        self.contents = np.concatenate([self.contents, contents])
        self.items = np.concatenate([self.items, items])
        # The file is renamed once it is complete, so that no reader sees a part of it.
        whole = self.file.with_name("unfinished.npz")
        np.savez(whole, ids=np.array(list(self.row_of)), contents=self.contents, items=self.items)
        os.replace(whole, self.file)

    def read(self) -> None:
        with np.load(self.file) as vectors:
            self.row_of = {item: row for row, item in enumerate(vectors["ids"].tolist())}
            self.contents, self.items = vectors["contents"], vectors["items"]

    def rows(self, ids: list[bytes]) -> list[int]:
        """Returns the ids' rows; a KeyError, which fails the request, means that an id was never sent to `items`."""
        try:
            return [self.row_of[item] for item in ids]
        except KeyError:
            self.read()
            return [self.row_of[item] for item in ids]


class TritonPythonModel:
    """One instance of either model, as Triton's Python backend calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        self.graphs = Graphs(Path(parameters["bundle"]["string_value"]))
        manifest = self.graphs.manifest
        self.max_history = manifest["user_tower"]["max_history"]
        dims = manifest["encoder"]["dim"], manifest["item_tower"]["dim"]
        self.store = Store(Path(parameters["store"]["string_value"]), *dims)
        self.answer = {ITEMS: self.keep_items, MID_EMB: self.mid_emb}[args["model_name"]]
        for graph in {ITEMS: ["item_tower"], MID_EMB: ["user_tower", "cvr"]}[args["model_name"]]:
            self.graphs.load(graph)

    def execute(self, requests: list) -> list:
        return [triton.InferenceResponse([self.answer(request)]) for request in requests]

    def keep_items(self, request):
        ids, contents = tensor(request, "IDS").tolist(), tensor(request, "CONTENT")
        new = [i for i, item in enumerate(ids) if item not in self.store.row_of]
        if new:
            (items,) = self.graphs.run("item_tower", contents[new])
            self.store.add([ids[i] for i in new], contents[new], items)
        return triton.Tensor("KEPT", np.array([len(self.store.row_of)], np.int64))

    def mid_emb(self, request):
        history = self.store.rows(tensor(request, "HISTORY").tolist()[-self.max_history :])
        candidates = self.store.rows(tensor(request, "CANDIDATES").tolist())
        no_history = np.zeros((1, 1, self.store.contents.shape[1]), np.float32)
        content = self.store.contents[history][None] if history else no_history
        mask = np.full(content.shape[:2], 1 if history else 0, np.int64)
        (user,) = self.graphs.run("user_tower", content, mask)
        mid_emb, _ = self.graphs.run("cvr", user, self.store.items[candidates], np.zeros(len(candidates), np.int64))
        return triton.Tensor("MID_EMB", mid_emb)


def tensor(request, name: str) -> np.ndarray:
    return triton.get_input_tensor_by_name(request, name).as_numpy()
