#!/usr/bin/env python3
"""A second bundle for reload benchmarks: the same encoder, and towers that are a little off.

    .venv/bin/python benches/variant.py --bundle models/default --out DIR --version 2

What a retrained bundle costs a server depends on which files changed, not on what their numbers mean, so nothing is
trained here. Each large weight matrix of both towers and of the CVR head is multiplied by 1 + 0.05 times a standard
normal. The noise follows from `--seed` and the matrix alone, so a layer that both towers hold stays one layer. Vectors
stay as they are: they scale and shift whole rows.
The encoder's files are hard links to those of `--bundle`, or copies where a link cannot be made.

The golden vectors are ONNX Runtime's own here, not PyTorch's: they show that a server runs these graphs as this machine
did, and say nothing of whether the graphs are right. Each stage starts from the golden result of the stage before, as
`midemb bundle verify` checks them.

`DIR` has to be new or empty. The manifest is written last.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, external_data_helper, numpy_helper

NOISE = 0.05
# A matrix this large is a layer's weight. Smaller ones may be masks or tables that the graph counts on.
LARGE = 1024
MANIFEST = "manifest.toml"
GRAPHS = ("user_tower", "item_tower", "cvr")


def perturb(model: ModelProto, folder: Path, seed: int) -> int:
    """Multiplies the large matrices in place; external data is inline after that. Returns how many."""
    external_data_helper.load_external_data_for_model(model, str(folder))
    n_changed = 0
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim != 2 or values.size < LARGE or is_mask(values):
            continue
        noise = np.random.default_rng([seed, zlib.crc32(values.tobytes())])
        factors = 1 + NOISE * noise.standard_normal(values.shape)
        tensor.CopyFrom(numpy_helper.from_array((values * factors).astype(np.float32), tensor.name))
        n_changed += 1
    return n_changed


def is_mask(values: np.ndarray) -> bool:
    """Whether it only selects: zeros and one other number, as the item tower has it for which head owns a column."""
    return len(np.unique(values)) <= 2


def link_or_copy(source: Path, target: Path) -> None:
    """One file under two names. What is a link itself is followed, as a relative one would point elsewhere."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class Graph:
    """One graph of the new bundle. Ports go by the manifest's names, in the order that the trainer gives them."""

    def __init__(self, folder: Path, table: dict) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(folder / table["file"], options, ["CPUExecutionProvider"])
        self._inputs, self._outputs = table["inputs"], table["outputs"]

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))


def recompute(golden: dict, folder: Path, manifest: dict) -> None:
    """Replaces what the changed graphs answer, one vector at a time; text, token ids and content stay."""
    user_tower, item_tower, cvr = (Graph(folder, manifest[name]) for name in GRAPHS)
    items, users = golden["items"], golden["users"]
    for item in items:
        item["item"] = numbers(item_tower(row(item["content"]))[0][0])
    for user in users:
        user["user"] = numbers(user_tower(*history([items[index] for index in user["history"]], manifest))[0][0])
    for pair in golden["pairs"]:
        owner = np.zeros(1, np.int64)
        mid_emb, probability = cvr(row(users[pair["user"]]["user"]), row(items[pair["item"]]["item"]), owner)
        pair["mid_emb"], pair["cvr"] = numbers(mid_emb[0]), numbers(probability)[0]


def row(values: list[float]) -> np.ndarray:
    """[1,d]"""
    return np.array([values], np.float32)


def history(items: list[dict], manifest: dict) -> tuple[np.ndarray, np.ndarray]:
    """content [1,l,C] and mask [1,l]; nobody's history is one position that does not count."""
    if not items:
        return np.zeros((1, 1, manifest["encoder"]["dim"]), np.float32), np.zeros((1, 1), np.int64)
    return np.array([[item["content"] for item in items]], np.float32), np.ones((1, len(items)), np.int64)


def numbers(values: np.ndarray) -> list[float]:
    """fp32 -> the shortest decimals that read back as the same fp32. What is not finite is no answer."""
    if not np.isfinite(values).all():
        sys.exit("a graph gave a number that is not finite")
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def relabel(text: str, version: str, folder: Path, provenance: list[str]) -> str:
    """The manifest with another version, the changed files' sizes and digests, and another provenance.

    It is edited as text because the standard library reads TOML and does not write it; `main` reads it back.
    """
    head, *files = re.split(r"(?m)^\[\[files\]\]\n", text.split("\n[provenance]\n")[0])
    head = re.sub(r'(?m)^version = ".*"$', f"version = {json.dumps(version)}", head, count=1)
    entries = [f"[[files]]\n{redigest(entry, folder).rstrip()}\n" for entry in files]
    return "\n".join([head.rstrip() + "\n", *entries, "[provenance]", *provenance]) + "\n"


def redigest(entry: str, folder: Path) -> str:
    """One entry of the manifest's list of files, true of the file in `folder`."""
    path = folder / tomllib.loads(entry)["path"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = re.sub(r"(?m)^bytes = \d+$", f"bytes = {path.stat().st_size}", entry)
    return re.sub(r'(?m)^sha256 = ".*"$', f'sha256 = "{digest}"', entry)


def write_files(source: Path, out: Path, manifest: dict, seed: int) -> None:
    """Everything but the manifest."""
    changed = {manifest["golden"]["file"]}
    for name in GRAPHS:
        file = manifest[name]["file"]
        model = onnx.load(source / file, load_external_data=False)
        n_changed = perturb(model, source, seed)
        if n_changed == 0:
            sys.exit(f"{source / file}: holds no large fp32 matrix")
        print(f"{file}: {n_changed} matrices changed")
        onnx.save(model, out / file)
        changed.add(file)
    for entry in manifest["files"]:
        if entry["path"] not in changed:
            link_or_copy(source / entry["path"], out / entry["path"])
    golden = json.loads((source / manifest["golden"]["file"]).read_text())
    recompute(golden, out, manifest)
    (out / manifest["golden"]["file"]).write_text(json.dumps(golden, ensure_ascii=True, indent=1) + "\n")


def provenance(manifest: dict, seed: int) -> list[str]:
    """What the new manifest says of where its numbers came from; what the old one says of others' work is kept."""
    origin, old = f"{manifest['name']} {manifest['version']}", manifest.get("provenance", {})
    table = {f"origin_{key}": old[key] for key in ("data", "commit") if key in old}
    table |= {key: old[key] for key in ("encoder",) if key in old}
    table |= {
        "data": f"none of its own: the weights of {origin} with noise on them, for benchmarks only",
        "noise": f"every large matrix of towers and head times 1 + {NOISE} N(0, 1); the encoder is unchanged",
        "golden": "from ONNX Runtime on the changed graphs, not from PyTorch",
        "onnxruntime": onnxruntime.__version__,
        "seed": seed,
    }
    # A string of JSON, in ASCII, and a whole number are TOML as well.
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="what to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--version", required=True, help="version in the new manifest")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty")
    text = (args.bundle / MANIFEST).read_text()
    manifest = tomllib.loads(text)
    write_files(args.bundle, args.out, manifest, args.seed)
    text = relabel(text, args.version, args.out, provenance(manifest, args.seed))
    assert tomllib.loads(text)["version"] == args.version
    (args.out / MANIFEST).write_text(text)
    print(f"{args.out} is {manifest['name']} {args.version}")


if __name__ == "__main__":
    main()
