#!/usr/bin/env python3
"""Makes a second bundle for reload benchmarks: the same encoder, with slightly changed towers.

    .venv/bin/python benches/variant.py --bundle models/default --out DIR --version 2

The cost of a retrained bundle for a server depends on which files changed, not on their values, so nothing is trained
here. Each large weight matrix of both towers and of the CVR head is multiplied elementwise by 1 + 0.05 times a standard
normal. The noise depends only on `--seed` and the matrix, so a layer that both towers share stays the same in both.
Vectors are unchanged, because they scale and shift whole rows.
The encoder's files are hard links to those of `--bundle`, or copies where a link cannot be made.

The golden vectors come from ONNX Runtime, not from PyTorch: they show that a server runs these graphs as this machine
did, but not that the graphs are right. Each stage starts from the golden result of the previous stage, as in `midemb
bundle verify`.

`DIR` must be new or empty. The manifest is written last.
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

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it while it is imported.

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, external_data_helper, numpy_helper

NOISE = 0.05
# A matrix with at least this many values is a layer's weight. Smaller ones may be masks or tables.
LARGE = 1024
FORMAT = 2
MANIFEST = "manifest.toml"
GRAPHS = ("user_tower", "item_tower", "cvr")


def perturb(model: ModelProto, folder: Path, seed: int) -> int:
    """Multiplies the large matrices in place and makes external data inline; returns the number of changed matrices."""
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
    """Whether the matrix holds at most two different values, like the item tower's mask of each head's columns."""
    return len(np.unique(values)) <= 2


def link_or_copy(source: Path, target: Path) -> None:
    """Links or copies a file. A symbolic link is resolved first, as a relative one would be wrong in another folder."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


class Graph:
    """One graph of the new bundle. Inputs and outputs have the manifest's names and order."""

    def __init__(self, folder: Path, table: dict) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(folder / table["file"], options, ["CPUExecutionProvider"])
        self._inputs, self._outputs = table["inputs"], table["outputs"]

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        return self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))


def recompute(golden: dict, folder: Path, manifest: dict) -> None:
    """Recomputes the results of the changed graphs, one vector at a time; text, token ids and content are unchanged."""
    user_tower, item_tower, cvr = (Graph(folder, manifest[name]) for name in GRAPHS)
    items, users = golden["items"], golden["users"]
    for item in items:
        embedding, adapted = item_tower(row(item["content"]))
        item["item"], item["adapted"] = numbers(embedding[0]), numbers(adapted[0])
    for user in users:
        user["user"] = numbers(user_tower(*history(user, items, manifest))[0][0])
    for pair in golden["pairs"]:
        owner = np.zeros(1, np.int64)
        mid_emb, probability = cvr(row(users[pair["user"]]["user"]), row(items[pair["item"]]["item"]), owner)
        pair["mid_emb"], pair["cvr"] = numbers(mid_emb[0]), numbers(probability)[0]


def row(values: list[float]) -> np.ndarray:
    """Returns the values as an array [1,d]."""
    return np.array([values], np.float32)


def history(user: dict, items: list[dict], manifest: dict) -> list[np.ndarray]:
    """Returns the user tower's inputs: adapted [1,l,D], mask [1,l] and, if the manifest lists actions, action [1,l].

    An empty history is one masked position. The golden file has no actions for users of whose actions none is known.
    """
    n = len(user["history"])
    adapted = np.zeros((1, max(n, 1), manifest["item_tower"]["adapted_dim"]), np.float32)
    mask, action = np.zeros(adapted.shape[:2], np.int64), np.zeros(adapted.shape[:2], np.int64)
    if n > 0:
        adapted[0] = [items[index]["adapted"] for index in user["history"]]
        mask[0] = 1
    if names := user.get("actions"):
        action[0] = action_numbers(names, manifest)
    return [adapted, mask, action] if manifest["history"]["actions"] else [adapted, mask]


def action_numbers(names: list[str], manifest: dict) -> list[int]:
    """Returns each action's number: 1 for the first that the manifest lists; 0 for one that it does not list."""
    known = manifest["history"]["actions"]
    return [known.index(name) + 1 if name in known else 0 for name in names]


def numbers(values: np.ndarray) -> list[float]:
    """Converts fp32 values to the shortest decimals that parse to the same values; exits if one is not finite."""
    if not np.isfinite(values).all():
        sys.exit("a graph returned a number that is not finite, so no golden vectors can be written")
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def relabel(text: str, version: str, folder: Path, provenance: list[str]) -> str:
    """Returns the manifest with the new version and provenance, and the changed files' sizes and digests.

    It is edited as text because the standard library cannot write TOML; `main` parses the result as a check.
    """
    head, *files = re.split(r"(?m)^\[\[files\]\]\n", text.split("\n[provenance]\n")[0])
    head = re.sub(r'(?m)^version = ".*"$', f"version = {json.dumps(version)}", head, count=1)
    entries = [f"[[files]]\n{redigest(entry, folder).rstrip()}\n" for entry in files]
    return "\n".join([head.rstrip() + "\n", *entries, "[provenance]", *provenance]) + "\n"


def redigest(entry: str, folder: Path) -> str:
    """Returns a manifest entry with the size and digest of the file in `folder`."""
    path = folder / tomllib.loads(entry)["path"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = re.sub(r"(?m)^bytes = \d+$", f"bytes = {path.stat().st_size}", entry)
    return re.sub(r'(?m)^sha256 = ".*"$', f'sha256 = "{digest}"', entry)


def write_files(source: Path, out: Path, manifest: dict, seed: int) -> None:
    """Writes every file except the manifest."""
    changed = {manifest["golden"]["file"]}
    for name in GRAPHS:
        file = manifest[name]["file"]
        model = onnx.load(source / file, load_external_data=False)
        n_changed = perturb(model, source, seed)
        if n_changed == 0:
            sys.exit(f"{source / file} holds no large fp32 matrix, so a variant cannot be made")
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
    """Returns the lines of the new provenance table, which keeps the old data, commit and encoder entries."""
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
    # An ASCII JSON string and an integer are also valid TOML.
    return [f"{key} = {json.dumps(value)}" for key, value in table.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle to start from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--version", required=True, help="version in the new manifest")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        sys.exit(f"{args.out} is not empty: give a new or empty folder")
    text = (args.bundle / MANIFEST).read_text()
    manifest = tomllib.loads(text)
    if manifest["format"] != FORMAT:
        sys.exit(f"{args.bundle / MANIFEST} has format {manifest['format']}, but this program reads format {FORMAT}")
    write_files(args.bundle, args.out, manifest, args.seed)
    text = relabel(text, args.version, args.out, provenance(manifest, args.seed))
    assert tomllib.loads(text)["version"] == args.version
    (args.out / MANIFEST).write_text(text)
    print(f"{args.out} is {manifest['name']} {args.version}")


if __name__ == "__main__":
    main()
