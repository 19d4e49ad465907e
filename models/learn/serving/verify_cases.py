"""Requests to a server, each with the vectors that are expected for it, for `verify_server`.

They come from a bundle's golden vectors, which the trainer computed, or are computed here by a run's own models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from learn.data.actions import ACTIONS, UNSPECIFIED
from learn.data.item_text import ItemText
from learn.serving import digests

if TYPE_CHECKING:
    from learn.content.ceg import Encoder
    from learn.content.graph_encoder import GraphEncoder
    from learn.models.cvr import CvrHead
    from learn.models.pch import Pch

# The seed of the actions in the requests of a run; half of its requests have some.
ACTIONS_SEED = 20240509


@dataclass(frozen=True)
class Case:
    """One request with the vectors that PyTorch computes for it; ONNX Runtime computes the content of an int8 graph."""

    name: str
    history: Sequence[ItemText]
    candidates: Sequence[ItemText]
    user_emb: np.ndarray  # [E]
    item_emb: np.ndarray  # [n,E]
    mid_emb: np.ndarray  # [n,M]; a row of NaN is not compared
    cvr: np.ndarray  # [n]; a NaN is not compared
    content: np.ndarray | None = None  # [n,C]
    adapted: np.ndarray | None = None  # [n,D]
    # What the user did with each history item: names of `learn.data.actions.ACTIONS`, or "unspecified".
    actions: Sequence[str] = ()


def golden_cases(bundle: Path) -> Iterator[Case]:
    """Yields a bundle's golden vectors as one case per golden user, with all golden items as candidates."""
    manifest = digests.read_manifest(bundle)
    golden = json.loads((bundle / manifest["golden"]["file"]).read_text())
    texts = [ItemText.from_json(entry["text"]) for entry in golden["items"]]
    content, adapted, item_emb = (
        np.array([entry[key] for entry in golden["items"]], np.float32) for key in ("content", "adapted", "item")
    )
    for number, user in enumerate(golden["users"]):
        mid_emb = np.full((len(texts), manifest["cvr"]["dim"]), np.nan, np.float32)
        cvr = np.full(len(texts), np.nan, np.float32)
        for pair in golden["pairs"]:
            if pair["user"] == number:
                mid_emb[pair["item"]], cvr[pair["item"]] = pair["mid_emb"], pair["cvr"]
        history = [texts[position] for position in user["history"]]
        yield Case(
            f"golden user {number}",
            history,
            texts,
            np.array(user["user"], np.float32),
            item_emb,
            mid_emb,
            cvr,
            content,
            adapted,
            tuple(user.get("actions", ())),
        )


@dataclass(frozen=True)
class Towers:
    """The PyTorch models of a run."""

    encoder: Encoder | GraphEncoder
    pch: Pch
    head: CvrHead


def torch_cases(
    towers: Towers, texts: Sequence[ItemText], pages: Iterable[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Case]:
    """Yields one case per page of (history, candidates), positions in `texts`, with the vectors that PyTorch computes.

    The texts are encoded page by page. For towers that read actions, every other page has random ones.
    """
    import torch

    from learn.data.item_text import render
    from learn.models.served_graphs import CvrGraph, ItemTowerGraph, UserTowerGraph

    user_tower, item_tower, cvr_graph = UserTowerGraph(towers.pch), ItemTowerGraph(towers.pch), CvrGraph(towers.head)
    modules = [module.eval() for module in (user_tower, item_tower, cvr_graph)]
    sizes, rng = towers.pch.config, np.random.default_rng(ACTIONS_SEED)
    for number, (history, candidates) in enumerate(pages):
        has_actions = bool(sizes.actions) and number % 2 == 0
        actions = rng.choice([UNSPECIFIED, *ACTIONS], len(history)).tolist() if has_actions else []
        window = list(history)[-sizes.max_history :]
        content = torch.from_numpy(towers.encoder.encode([render(texts[p]) for p in [*window, *candidates]]))
        with torch.inference_mode():
            item, adapted = modules[1](content)
            # An empty history is one item of padding.
            seen = adapted[: len(window)] if window else torch.zeros(1, sizes.adapted_dim)
            mask = torch.ones(1, len(seen), dtype=torch.int64) * bool(window)
            action = None
            if has_actions and window:
                action = torch.tensor([[sizes.action_number(name) for name in actions[-len(window) :]]])
            user = modules[0](seen[None], mask, action)
            shown = item[len(window) :]
            mid_emb, cvr = modules[2](user, shown, torch.zeros(len(shown), dtype=torch.int64))
        yield Case(
            f"page {number}",
            [texts[position] for position in history],
            [texts[position] for position in candidates],
            user[0].numpy(),
            shown.numpy(),
            mid_emb.numpy(),
            cvr.numpy(),
            content[len(window) :].numpy(),
            adapted[len(window) :].numpy(),
            actions,
        )
