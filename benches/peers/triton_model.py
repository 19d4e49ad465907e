"""The Triton peer's two models for Triton's Python backend. One file serves both and selects by model name.

`triton_server.py` copies this file and `towers.py` into a model repository; it is not run by hand.

- `items` takes IDS [n] and their content embeddings CONTENT [n, C], runs the item tower, and stores in a folder what it
  returns for each item: the item embedding and the adapted item, which the user tower reads. In format 1 the user tower
  reads the content embedding, so that is stored instead of the adapted item;
- `mid_emb` takes HISTORY [h] and CANDIDATES [n], ids only, and returns MID_EMB [n, M].

The ids are strings or integers, as the models' configuration says. Every instance is its own process. It reads the
folder into its memory when it finds an unknown id, so a request of the hot workload uses only a dict and two matrices,
as in `python_server.py`.
"""

import json
import os
import tomllib
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

from towers import Towers

ITEMS, MID_EMB = "items", "mid_emb"


class Graphs(Towers):
    """A bundle's graphs, with one session of one thread per graph.

    `parameters` are those of the model's configuration: the bundle's folder, and the file of the user tower if that is
    of format 1.
    """

    def __init__(self, parameters: dict[str, str]) -> None:
        folder = Path(parameters["bundle"])
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.files = {graph: folder / self.manifest[graph]["file"] for graph in ("item_tower", "user_tower", "cvr")}
        self.format = 2
        if "format_1_user_tower" in parameters:
            self.format = 1
            self.files["user_tower"] = Path(parameters["format_1_user_tower"])
            self.manifest["user_tower"]["inputs"][0] = self.manifest["item_tower"]["inputs"][0]
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def load(self, graph: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(self.files[graph])
        self.sessions[graph] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        spec = self.manifest[graph]
        return self.sessions[graph].run(spec["outputs"], dict(zip(spec["inputs"], inputs, strict=True)))


# What a client sends for an item: BYTES or INT64 in Triton's protocol.
Id = bytes | int


class Store:
    """Ids with the item embeddings and what the user tower reads, one row per id.

    One process writes them and others read them.
    """

    def __init__(self, folder: Path, item_dim: int, history_dim: int) -> None:
        self.file = folder / "vectors.npz"
        self.row_of: dict[Id, int] = {}
        self.items = np.zeros((0, item_dim), np.float32)
        self.history_vectors = np.zeros((0, history_dim), np.float32)

    def add(self, ids: list[Id], items: np.ndarray, history_vectors: np.ndarray) -> None:
        self.row_of.update((item, len(self.row_of) + i) for i, item in enumerate(ids))
        self.items = np.concatenate([self.items, items])
        self.history_vectors = np.concatenate([self.history_vectors, history_vectors])
        # The file is renamed once it is complete, so that no reader sees a part of it.
        whole = self.file.with_name("unfinished.npz")
        np.savez(whole, ids=np.array(list(self.row_of)), items=self.items, history_vectors=self.history_vectors)
        os.replace(whole, self.file)

    def read(self) -> None:
        with np.load(self.file) as vectors:
            self.row_of = {item: row for row, item in enumerate(vectors["ids"].tolist())}
            self.items, self.history_vectors = vectors["items"], vectors["history_vectors"]

    def rows(self, ids: list[Id]) -> list[int]:
        """Returns the ids' rows; a KeyError, which fails the request, means that an id was never sent to `items`."""
        try:
            return [self.row_of[item] for item in ids]
        except KeyError:
            self.read()
            return [self.row_of[item] for item in ids]


class TritonPythonModel:
    """One instance of either model, as Triton's Python backend calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        entries = json.loads(args["model_config"])["parameters"]
        parameters = {name: entry["string_value"] for name, entry in entries.items()}
        self.graphs = Graphs(parameters)
        manifest = self.graphs.manifest
        self.max_history = manifest["user_tower"]["max_history"]
        self.store = Store(Path(parameters["store"]), manifest["item_tower"]["dim"], self.graphs.history_dim())
        self.answer = {ITEMS: self.keep_items, MID_EMB: self.mid_emb}[args["model_name"]]
        for graph in {ITEMS: ["item_tower"], MID_EMB: ["user_tower", "cvr"]}[args["model_name"]]:
            self.graphs.load(graph)

    def execute(self, requests: list) -> list:
        return [triton.InferenceResponse([self.answer(request)]) for request in requests]

    def keep_items(self, request):
        ids, contents = tensor(request, "IDS").tolist(), tensor(request, "CONTENT")
        new = [i for i, item in enumerate(ids) if item not in self.store.row_of]
        if new:
            self.store.add([ids[i] for i in new], *self.graphs.item(contents[new]))
        return triton.Tensor("KEPT", np.array([len(self.store.row_of)], np.int64))

    def mid_emb(self, request):
        history = self.store.rows(tensor(request, "HISTORY").tolist()[-self.max_history :])
        candidates = self.store.rows(tensor(request, "CANDIDATES").tolist())
        no_history = np.zeros((1, 1, self.store.history_vectors.shape[1]), np.float32)
        vectors = self.store.history_vectors[history][None] if history else no_history
        mask = np.full(vectors.shape[:2], 1 if history else 0, np.int64)
        user = self.graphs.user(vectors, mask)
        mid_emb, _ = self.graphs.run("cvr", user, self.store.items[candidates], np.zeros(len(candidates), np.int64))
        return triton.Tensor("MID_EMB", mid_emb)


def tensor(request, name: str) -> np.ndarray:
    return triton.get_input_tensor_by_name(request, name).as_numpy()
