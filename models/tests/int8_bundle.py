"""A tiny encoder as a folder, its int8 graph and a bundle with it, for tests of int8 encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from learn.content.ceg import EncoderFolder, LoadConfig
from learn.content.graph_encoder import GraphEncoder
from learn.data.item_text import ItemText
from learn.serving import bundle, fixture_bundles

TEXTS = [ItemText(title=f"{name} number {n}") for n in range(6) for name in ("Lamp", "Kettle", "A long jacket")]


def encoder_folder(folder: Path) -> EncoderFolder:
    """Writes the fixtures' encoder as a Hugging Face folder."""
    torch.manual_seed(fixture_bundles.FIRST.seed)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))
    fixture_bundles.encoder_model().save_pretrained(folder)
    return EncoderFolder(folder, fixture_bundles.MAX_TOKENS, LoadConfig(device="cpu"))


def write_bundle(encoder: GraphEncoder, out: Path) -> Path:
    """Writes the first fixture with another encoder to `out`/bundle; its provenance says how the graph was made."""
    first = fixture_bundles.build(out / "tokenizer.json")
    facts = {**first.provenance, "quantisation": encoder.facts.made}
    bundle.write(replace(first, encoder=encoder, provenance=facts), out / "bundle")
    return out / "bundle"
