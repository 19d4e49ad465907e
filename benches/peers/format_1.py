"""Makes the user tower of format 1 from a bundle of format 2, as the peers also run the graphs that format 1 had.

    python benches/peers/format_1.py --bundle models/default --out user_tower.onnx

In format 1 the adaptor was part of the user tower, which read content embeddings [b,l,C]. In format 2 it is the item
tower's beginning, and the user tower reads its output, `adapted` [b,l,D]. Here the nodes that compute `adapted` are
copied from the item tower and put in front of the user tower. The other graphs are the same in both formats, apart from
the item tower's second output.
"""

import argparse
import os
import tomllib
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, compose, helper, numpy_helper
from onnx.utils import Extractor

# Starts the names of the added nodes and tensors, so that none is also a name in the user tower.
PREFIX = "adaptor/"
# Constants for the shapes of the reshaped tensors.
ROWS, WIDTH = f"{PREFIX}rows", f"{PREFIX}width"


def inputs(manifest: dict) -> list[str]:
    """Returns the names of the format-1 user tower's inputs: content [b,l,C], mask [b,l], perhaps action [b,l]."""
    return [content_name(manifest), *manifest["user_tower"]["inputs"][1:]]


def content_name(manifest: dict) -> str:
    return manifest["item_tower"]["inputs"][0]


def user_tower(folder: Path) -> ModelProto:
    """Returns the user tower of the bundle in `folder`, with the adaptor in front of it."""
    manifest = tomllib.loads((folder / "manifest.toml").read_text())
    tower = onnx.load(folder / manifest["user_tower"]["file"])
    adaptor = adaptor_of(onnx.load(folder / manifest["item_tower"]["file"]), manifest)
    content, adapted = content_name(manifest), manifest["user_tower"]["inputs"][0]
    dims = {"content": manifest["encoder"]["dim"], "adapted": manifest["item_tower"]["adapted_dim"]}

    graph = tower.graph
    constants = [
        numpy_helper.from_array(np.array([-1, dims["content"]], np.int64), ROWS),
        numpy_helper.from_array(np.array([dims["adapted"]], np.int64), WIDTH),
    ]
    nodes = [to_rows(content, adaptor), *adaptor.graph.node, *to_histories(content, adaptor, adapted), *graph.node]
    ports = {port.name: port for port in graph.input}
    ports[content] = helper.make_tensor_value_info(content, onnx.TensorProto.FLOAT, ["b", "l", dims["content"]])
    model = helper.make_model(
        helper.make_graph(
            nodes,
            graph.name,
            [ports[name] for name in inputs(manifest)],
            graph.output,
            [*constants, *adaptor.graph.initializer, *graph.initializer],
        ),
        opset_imports=tower.opset_import,
        ir_version=tower.ir_version,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def adaptor_of(item_tower: ModelProto, manifest: dict) -> ModelProto:
    """Returns the part of the item tower that computes `adapted` [n,D] from `content` [n,C], with prefixed names."""
    adapted = manifest["item_tower"]["outputs"][1]
    adaptor = Extractor(item_tower).extract_model([content_name(manifest)], [adapted])
    return compose.add_prefix(adaptor, PREFIX)


def to_rows(content: str, adaptor: ModelProto) -> NodeProto:
    """Returns the node that reshapes the histories' content [b,l,C] to the adaptor's input [b*l,C]."""
    return helper.make_node("Reshape", [content, ROWS], [adaptor.graph.input[0].name])


def to_histories(content: str, adaptor: ModelProto, adapted: str) -> list[NodeProto]:
    """Returns the nodes that reshape the adaptor's output [b*l,D] to the user tower's input [b,l,D]."""
    lengths, shape = f"{PREFIX}lengths", f"{PREFIX}shape"
    return [
        helper.make_node("Shape", [content], [lengths], start=0, end=2),
        helper.make_node("Concat", [lengths, WIDTH], [shape], axis=0),
        helper.make_node("Reshape", [adaptor.graph.output[0].name, shape], [adapted]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="file of the user tower")
    args = parser.parse_args()
    onnx.save(user_tower(args.bundle), args.out)


if __name__ == "__main__":
    main()
