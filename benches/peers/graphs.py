"""Measures the floor of W1: a bundle's user tower and CVR graph in a bare loop, and their products, on one thread.

    python benches/peers/graphs.py --bundle models/default [--format 2] [--history 80] [--candidates 500] [--runs 400]

Prints one JSON object with the CPU milliseconds (of this whole process) per request:

- `graphs_ms`: user tower, then CVR graph, through onnxruntime's Python API, on prepared inputs;
- `products_ms`: only the matrix products of these two graphs, with the shapes that ONNX Runtime's profile reports, as
  MatMul nodes whose weights are constants where the graph's are. An Attention node counts as its two products, over all
  positions. There is no bias, activation, norm or softmax.

The user tower of the bundle reads adapted items. With `--format 1` it is the one of format 1 (`format_1.py`), which has
the adaptor in it and reads content embeddings.

Neither figure includes a server's other work: wire format, cache, gathering of vectors.
"""

import argparse
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import format_1
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

GRAPHS = ("item_tower", "user_tower", "cvr")
PRODUCTS = {"MatMul", "FusedMatMul", "Gemm"}
OPSET = 20


@dataclass(frozen=True)
class Workload:
    """What one request asks for, and the format of the graphs that answer it."""

    n_history: int
    n_candidates: int
    format: int


@dataclass(frozen=True)
class Product:
    """One matrix product: left operand, right operand, and whether the right one is a weight."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    is_weight: bool


def options() -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    return settings


def session(model: str | bytes, settings: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, settings or options(), providers=["CPUExecutionProvider"])


class Graphs:
    """The two graphs of a hot request, with inputs for them."""

    def __init__(self, folder: Path, workload: Workload) -> None:
        self.manifest = tomllib.loads((folder / "manifest.toml").read_text())
        self.models: dict[str, str | bytes] = {name: str(folder / self.manifest[name]["file"]) for name in GRAPHS}
        random = np.random.default_rng(1)
        content = _unit_rows(random, workload.n_history, self.manifest["encoder"]["dim"])
        items = _unit_rows(random, workload.n_candidates, self.manifest["item_tower"]["dim"])
        user = _unit_rows(random, 1, self.manifest["user_tower"]["dim"])
        mask = np.ones((1, workload.n_history), np.int64)
        # All actions are 0, which means that none is known.
        actions = [np.zeros_like(mask)] if self.manifest["history"]["actions"] else []
        vectors = self._adapted(content)
        if workload.format == 1:
            vectors = content
            self.models["user_tower"] = format_1.user_tower(folder).SerializeToString()
            self.manifest["user_tower"]["inputs"] = format_1.inputs(self.manifest)
        self.feeds = {
            "user_tower": self._feed("user_tower", vectors[None], mask, *actions),
            "cvr": self._feed("cvr", user, items, np.zeros(workload.n_candidates, np.int64)),
        }

    def _feed(self, graph: str, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.manifest[graph]["inputs"], inputs, strict=True))

    def _adapted(self, content: np.ndarray) -> np.ndarray:
        """Maps content [n,C] to adapted items [n,D]."""
        output = self.manifest["item_tower"]["outputs"][1]
        return session(self.models["item_tower"]).run([output], self._feed("item_tower", content))[0]

    def loop(self) -> Callable[[], object]:
        """Returns a function that runs both graphs for one request; the CVR graph reads the user tower's output."""
        tower, cvr = session(self.models["user_tower"]), session(self.models["cvr"])
        tower_feed, cvr_feed = self.feeds["user_tower"], dict(self.feeds["cvr"])
        user_name = self.manifest["cvr"]["inputs"][0]

        def once() -> object:
            (cvr_feed[user_name],) = tower.run(None, tower_feed)
            return cvr.run(None, cvr_feed)

        return once

    def products(self) -> list[Product]:
        """Returns every matrix product of one request, as ONNX Runtime ran it."""
        return [product for graph in self.feeds for product in self._products_of(graph)]

    def _products_of(self, graph: str) -> list[Product]:
        settings = options()
        with tempfile.TemporaryDirectory() as folder:
            settings.enable_profiling = True
            settings.profile_file_prefix = f"{folder}/profile"
            settings.optimized_model_filepath = f"{folder}/optimized.onnx"
            profiled = session(self.models[graph], settings)
            profiled.run(None, self.feeds[graph])
            events = json.loads(Path(profiled.end_profiling()).read_text())
            weights = _weights(f"{folder}/optimized.onnx")
            heads = _heads(f"{folder}/optimized.onnx")
        found = []
        for event in events:
            arguments = event.get("args", {})
            if event.get("cat") != "Node" or "input_type_shape" not in arguments:
                continue
            node = event["name"].removesuffix("_kernel_time")
            shapes = [tuple(next(iter(entry.values()))) for entry in arguments["input_type_shape"]]
            if arguments.get("op_name") in PRODUCTS:
                # The profile does not list a weight that was packed for the kernel.
                weight = weights.get(node)
                found.append(Product(shapes[0], _fitting(shapes[0], weight or shapes[1]), weight is not None))
            elif arguments.get("op_name") == "Attention":
                found.extend(_attention(shapes, heads[node]))
        return found


def _unit_rows(random: np.random.Generator, n: int, dim: int) -> np.ndarray:
    rows = random.standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _heads(path: str) -> dict[str, int]:
    """Returns the number of heads of each Attention node, by node name."""
    nodes = (node for node in onnx.load(path).graph.node if node.op_type == "Attention")
    return {node.name: next(part.i for part in node.attribute if part.name == "q_num_heads") for node in nodes}


def _attention(shapes: list[tuple[int, ...]], heads: int) -> tuple[Product, Product]:
    """Returns the two products of queries, keys and values [b,l,D]: the scores and the mixtures per head."""
    n_users, length, width = shapes[0]
    query, scores = (n_users, heads, length, width // heads), (n_users, heads, length, shapes[1][1])
    key = (n_users, heads, width // heads, shapes[1][1])
    value = (n_users, heads, shapes[2][1], shapes[2][2] // heads)
    return Product(query, key, False), Product(scores, value, False)


def _weights(path: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each product's right operand that is a constant of the graph, by node name."""
    graph = onnx.load(path).graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    products = (node for node in graph.node if node.op_type in PRODUCTS)
    return {node.name: constants[node.input[1]] for node in products if node.input[1] in constants}


def _fitting(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the right operand for a plain MatMul, as a fused product may transpose it."""
    return right if left[-1] == right[-2] else (*right[:-2], right[-1], right[-2])


def products_alone(products: list[Product]) -> Callable[[], object]:
    """Returns a function that runs a graph of only `products`, with its outputs bound to preallocated memory."""
    random = np.random.default_rng(2)
    nodes, inputs, outputs, weights, feeds = [], [], [], [], {}
    for i, product in enumerate(products):
        left, right, out = f"left{i}", f"right{i}", f"out{i}"
        values = random.standard_normal(product.right).astype(np.float32)
        feeds[left] = random.standard_normal(product.left).astype(np.float32)
        inputs.append(helper.make_tensor_value_info(left, TensorProto.FLOAT, product.left))
        if product.is_weight:
            weights.append(numpy_helper.from_array(values, right))
        else:
            feeds[right] = values
            inputs.append(helper.make_tensor_value_info(right, TensorProto.FLOAT, product.right))
        nodes.append(helper.make_node("MatMul", [left, right], [out]))
        outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    runner = session(model.SerializeToString())
    binding = runner.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    sizes = [np.matmul(feeds[f"left{i}"], np.zeros(p.right, np.float32)).shape for i, p in enumerate(products)]
    kept = [np.empty(size, np.float32) for size in sizes]
    for i, value in enumerate(kept):
        binding.bind_output(f"out{i}", "cpu", 0, np.float32, value.shape, value.ctypes.data)
    # The closure keeps the arrays alive, because ONNX Runtime writes into their memory.
    return lambda kept=kept, feeds=feeds: runner.run_with_iobinding(binding)


def flops(products: list[Product]) -> int:
    return sum(2 * int(np.prod(product.left)) * product.right[-1] for product in products)


def cpu_ms(once: Callable[[], object], runs: int) -> float:
    """Returns the CPU milliseconds per call, after warm-up calls that are not counted."""
    for _ in range(max(runs // 10, 5)):
        once()
    start = time.process_time()
    for _ in range(runs):
        once()
    return (time.process_time() - start) * 1e3 / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--format", type=int, choices=[1, 2], default=2, help="format of the graphs")
    parser.add_argument("--history", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--runs", type=int, default=400)
    args = parser.parse_args()
    graphs = Graphs(args.bundle, Workload(args.history, args.candidates, args.format))
    products = graphs.products()
    result = {
        "graphs_ms": cpu_ms(graphs.loop(), args.runs),
        "products_ms": cpu_ms(products_alone(products), args.runs),
        "products": len(products),
        "products_mflop": flops(products) / 1e6,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
