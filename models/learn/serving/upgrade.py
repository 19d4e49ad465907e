"""Upgrades a bundle of format 1 to format 2 without the models that it was exported from (`learn upgrade`).

In format 1 both tower graphs begin with the same adaptor, and the user tower reads content embeddings. In format 2 the
item tower also returns the adaptor's output, and the user tower reads that (`tower_export`). So the adaptor is cut out
of the user tower's graph, and its last value becomes an output of the item tower's. No weight and no other node
changes, so neither does any embedding.

The encoder, the tokenizer and the CVR head are copied byte for byte. The file of golden vectors is written anew: all
that PyTorch computed stays in it, with the same numbers, and each item gains the adaptor's output. That is computed
here in fp64 from the weights, and not by the graph that it checks. As in `bundle.write`, the result is verified before
it is put in place. Format 1 has no actions, and does not say which items the head's histories had in training.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tomli_w
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from learn.serving import bundle_check, bundle_format
from learn.serving.bundle_format import MANIFEST, Keeps
from learn.serving.placing import placing, recover

OLD_FORMAT = 1
CONTENT, ADAPTED = "content", "adapted"
ADVICE = "export its run again with `learn export`"
ASSUMED_KEEPS: Keeps = "all"


@dataclass(frozen=True)
class UpgradeConfig:
    """What to upgrade, and what the new manifest says that the old one does not."""

    old: Path
    # May be the same folder as `old`.
    out: Path
    # None keeps the version.
    version: str | None = None
    # `cvr.history` of the run, which a manifest of format 1 does not have. None: its default is assumed, and the output
    # and the new manifest (`provenance.keeps_assumed`) say so.
    keeps: Keeps | None = None


@dataclass(frozen=True)
class Adaptor:
    """The adaptor in a graph of format 1.

    `layers` has the weight [out,in] and bias [out] of each linear layer, with a Gelu between two of them. `nodes` are
    its nodes, with those that flatten its input and unflatten its output, and `output` is the name of its result.
    """

    layers: list[tuple[np.ndarray, np.ndarray]]
    nodes: list[NodeProto]
    output: str

    @property
    def width(self) -> int:
        """D, the width of the result."""
        return len(self.layers[-1][1])

    def equals(self, other: Adaptor) -> bool:
        """Whether both have the same weights, bit for bit."""
        ours, theirs = ([part for layer in adaptor.layers for part in layer] for adaptor in (self, other))
        return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))

    def apply(self, content: np.ndarray) -> np.ndarray:
        """Maps content [n,C] to adapted items [n,D] in fp64."""
        x = content.astype(np.float64)
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                x = 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))
            x = x @ weight.astype(np.float64).T + bias.astype(np.float64)
        return x


def upgrade(config: UpgradeConfig) -> None:
    """Writes the bundle in format 2, verifies it, and moves it to `config.out`; prints what was done and assumed.

    Files that are fetched from a package may be missing; then the encoder, which stays as it is, is not run. Raises
    ValueError for a bundle of another format, a damaged bundle, files outside its folder, and towers that `learn` did
    not export. An upgrade in place that was interrupted is undone or finished first.
    """
    recover(config.old)
    manifest = _old_manifest(config.old)
    is_complete = _check_files(config.old, manifest)
    item_path, user_path = (config.old / manifest[part]["file"] for part in ("item_tower", "user_tower"))
    item_tower, user_tower = onnx.load(item_path), onnx.load(user_path)
    adaptor, of_user = find_adaptor(item_tower.graph, item_path), find_adaptor(user_tower.graph, user_path)
    if not adaptor.equals(of_user):
        raise ValueError(
            f"{config.old}: its towers have two different adaptors, so format 2 cannot express it: {ADVICE}"
        )
    golden = json.loads((config.old / manifest["golden"]["file"]).read_text(encoding="utf-8"))
    with placing(config.out) as folder:
        for entry in manifest["files"]:
            if (config.old / entry["path"]).is_file():
                shutil.copyfile(config.old / entry["path"], folder / entry["path"])
        onnx.save(with_adapted_output(item_tower, adaptor), folder / item_path.name)
        onnx.save(without_adaptor(user_tower, of_user), folder / user_path.name)
        golden_text = json.dumps(_with_adapted(golden, adaptor), ensure_ascii=True, indent=1) + "\n"
        (folder / manifest["golden"]["file"]).write_text(golden_text, encoding="utf-8")
        upgraded = _new_manifest(config, manifest, adaptor, folder)
        (folder / MANIFEST).write_text(tomli_w.dumps(upgraded), encoding="utf-8")
        if is_complete:
            bundle_check.verify(folder)
        else:
            bundle_check.verify_towers(folder)
        if config.out.resolve() == config.old.resolve():
            _remove_copies(manifest, upgraded, folder)
    unchecked = "" if is_complete else "; the encoder was not run, because its files have not been fetched"
    print(f"{upgraded['name']} {upgraded['version']} is now in format {upgraded['format']}: {config.out}{unchecked}")
    if config.keeps is None:
        print(
            f'history.keeps = "{ASSUMED_KEEPS}" is assumed, because format 1 does not say which items the head was '
            'trained on: if its run had cvr.history = "liked", upgrade with --keeps liked, or correct the new manifest'
        )


def _old_manifest(folder: Path) -> dict[str, Any]:
    path, manifest = folder / MANIFEST, bundle_format.parse_manifest(folder)
    found = manifest.get("format")
    if found == bundle_format.FORMAT:
        raise ValueError(f"{path} already has format {found}, so there is nothing to upgrade")
    if found != OLD_FORMAT:
        raise ValueError(f"{path} has format {found!r}, but only format {OLD_FORMAT} can be upgraded")
    bundle_format.check_manifest(manifest, path)
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Returns whether all files are there.

    Raises ValueError if one is damaged, missing and not to be fetched, or elsewhere than directly in the folder.
    """
    is_complete = True
    for entry in manifest["files"]:
        path = folder / entry["path"]
        if not bundle_format.is_file_name(entry["path"]):
            raise ValueError(f"{folder / MANIFEST}: the file {entry['path']!r} is not directly in the bundle's folder")
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside the bundle's folder: put a copy of it in its place"
            )
        if path.is_file():
            if bundle_format.sha256(path) != entry["sha256"]:
                raise ValueError(f"{path} is not the file that the manifest names, as its digest differs")
        elif "pypi" in entry:
            is_complete = False
        else:
            raise ValueError(f"{path} is missing, but the manifest names it")
    return is_complete


# --- the graphs ------------------------------------------------------------------------------------------------------


def find_adaptor(graph: GraphProto, path: Path) -> Adaptor:
    """Finds the adaptor that reads the graph's content; raises ValueError, naming `path`, if it is of another shape."""
    walk = _Walk(graph, path)
    # The user tower flattens [b,l,C] before the adaptor and restores the axes after it.
    is_nested = walk.next_operators() == ["Reshape"]
    if is_nested:
        walk.step("Reshape")
    walk.linear_layer()
    if walk.next_operators() == ["Gelu"]:
        walk.step("Gelu", approximate=b"none")
        walk.linear_layer()
    if is_nested:
        walk.step("Reshape")
    return Adaptor(walk.layers, walk.nodes, walk.value)


class _Walk:
    """Follows a chain of nodes from the content on, and collects them and the weights of their linear layers."""

    def __init__(self, graph: GraphProto, path: Path) -> None:
        self.value = CONTENT
        self.nodes: list[NodeProto] = []
        self.layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._graph, self._path = graph, path
        self._weights = {tensor.name: tensor for tensor in graph.initializer}

    def next_operators(self) -> list[str]:
        """Returns the operators of the nodes that read the current value."""
        return [node.op_type for node in _readers(self._graph, self.value)]

    def step(self, operator: str, **attributes: object) -> NodeProto:
        """Moves on to the result of the only node that reads the current value, and returns the node."""
        readers = _readers(self._graph, self.value)
        if self.next_operators() != [operator] or _attributes(readers[0]) != attributes:
            found = ", ".join(f"{node.op_type} {_attributes(node) or ''}".strip() for node in readers) or "nothing"
            wanted = f"{operator} {attributes or ''}".strip()
            raise ValueError(
                f"{self._path}: expected an adaptor, with {wanted} after {self.value!r}, found {found}: {ADVICE}"
            )
        self.nodes.append(readers[0])
        self.value = readers[0].output[0]
        return readers[0]

    def linear_layer(self) -> None:
        """Moves on to the result of a linear layer, and keeps its weight and bias."""
        _x, *parameters = self.step("Gemm", transB=1).input
        if len(parameters) != 2 or not all(name in self._weights for name in parameters):
            raise ValueError(f"{self._path}: the adaptor's {self.value!r} has no constant weight and bias: {ADVICE}")
        weight, bias = (numpy_helper.to_array(self._weights[name]) for name in parameters)
        self.layers.append((weight, bias))


def _readers(graph: GraphProto, name: str) -> list[NodeProto]:
    """Returns the nodes that read the values, and not only the shape, of `name`."""
    return [node for node in graph.node if name in node.input and node.op_type != "Shape"]


def _attributes(node: NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def with_adapted_output(item_tower: ModelProto, adaptor: Adaptor) -> ModelProto:
    """Returns the item tower's graph with a second output, the adaptor's result [n,D]."""
    model = _copy(item_tower)
    _rename(model.graph, adaptor.output, ADAPTED)
    (axes,) = bundle_format.ITEM_TOWER.axes
    model.graph.output.append(helper.make_tensor_value_info(ADAPTED, TensorProto.FLOAT, [*axes, adaptor.width]))
    return _checked(model)


def without_adaptor(user_tower: ModelProto, adaptor: Adaptor) -> ModelProto:
    """Returns the user tower's graph with adapted items [b,l,D] in the place of content [b,l,C]."""
    model = _copy(user_tower)
    graph = model.graph
    kept = [node for node in graph.node if node not in adaptor.nodes]
    del graph.node[:]
    graph.node.extend(kept)
    # What is left of the adaptor's ends: its result, and the shape of its input, of which only [b,l] is read.
    _rename(graph, adaptor.output, ADAPTED)
    _rename(graph, CONTENT, ADAPTED)
    (port,) = (port for port in graph.input if port.name == CONTENT)
    axes = bundle_format.user_tower(()).axes[0]
    port.CopyFrom(helper.make_tensor_value_info(ADAPTED, TensorProto.FLOAT, [*axes, adaptor.width]))
    _remove_unread_constants(graph)
    return _checked(model)


def _copy(model: ModelProto) -> ModelProto:
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied


def _rename(graph: GraphProto, old: str, new: str) -> None:
    """Renames a value wherever a node reads or writes it."""
    for node in graph.node:
        for names in (node.input, node.output):
            renamed = [new if name == old else name for name in names]
            del names[:]
            names.extend(renamed)


def _remove_unread_constants(graph: GraphProto) -> None:
    read = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _checked(model: ModelProto) -> ModelProto:
    onnx.checker.check_model(model, full_check=True)
    return model


# --- golden vectors and manifest -------------------------------------------------------------------------------------


def _with_adapted(golden: dict[str, Any], adaptor: Adaptor) -> dict[str, Any]:
    """Returns the golden vectors with `adapted` for every item."""
    content = np.array([item["content"] for item in golden["items"]], np.float32)
    adapted = [bundle_format.numbers(row) for row in adaptor.apply(content)]
    items = [item | {ADAPTED: row} for item, row in zip(golden["items"], adapted, strict=True)]
    return golden | {"items": items}


def _new_manifest(config: UpgradeConfig, old: Mapping[str, Any], adaptor: Adaptor, folder: Path) -> dict[str, Any]:
    """Returns the manifest of the bundle in `folder`, which must already hold every other file that is there."""
    encoder, item_tower, user_tower = old["encoder"], old["item_tower"], old["user_tower"]
    return {
        "format": bundle_format.FORMAT,
        "name": old["name"],
        "version": old["version"] if config.version is None else config.version,
        "item_text": old["item_text"],
        "encoder": _before_ports(encoder) | {"precision": _precision(config.old / encoder["file"])} | _ports(encoder),
        "item_tower": _before_ports(item_tower) | {"adapted_dim": adaptor.width} | bundle_format.ITEM_TOWER.ports(),
        "user_tower": _before_ports(user_tower) | bundle_format.user_tower(()).ports(),
        "history": bundle_format.history((), config.keeps or ASSUMED_KEEPS),
        "cvr": old["cvr"],
        "golden": old["golden"],
        "files": [_new_entry(entry, folder) for entry in old["files"]],
        "provenance": _provenance(config, old),
    }


def _provenance(config: UpgradeConfig, old: Mapping[str, Any]) -> dict[str, Any]:
    assumed = {"keeps_assumed": True} if config.keeps is None else {}
    return {**old.get("provenance", {}), "upgraded_from": bundle_format.sha256(config.old / MANIFEST), **assumed}


def _before_ports(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in ("inputs", "outputs")}


def _ports(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: table[name] for name in ("inputs", "outputs")}


def _new_entry(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = folder / entry["path"]
    return dict(entry) | (bundle_format.file_entry(path, entry["part"]) if path.is_file() else {})


def _precision(encoder: Path) -> str:
    """Returns the precision of an encoder's weights, which need not be there."""
    graph = onnx.load(encoder, load_external_data=False).graph
    return "fp16" if any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer) else "fp32"


def _remove_copies(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Removes the files that the upgrade did not change, so that the originals stay in place."""
    before = {entry["path"]: entry["sha256"] for entry in old["files"]}
    for entry in new["files"]:
        if entry["sha256"] == before[entry["path"]]:
            (folder / entry["path"]).unlink(missing_ok=True)
