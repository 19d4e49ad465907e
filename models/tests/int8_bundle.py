"""A tiny encoder as a folder, its int8 graph and a bundle with it, and fixtures of them that any test may use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learn.content.ceg import Encoder, EncoderFolder, LoadConfig
from learn.content.graph_encoder import GraphEncoder
from learn.data.item_text import ItemText
from learn.serving import bundle, fixture_bundles, int8_encoder

TEXTS = [ItemText(title=f"{name} number {n}") for n in range(6) for name in ("Lamp", "Kettle", "A long jacket")]


def encoder_folder(folder: Path, seed: int = fixture_bundles.FIRST.seed) -> EncoderFolder:
    """Writes the fixtures' encoder as a Hugging Face folder; with another seed, one of other weights."""
    torch.manual_seed(seed)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))
    fixture_bundles.encoder_model().save_pretrained(folder)
    return EncoderFolder(folder, fixture_bundles.MAX_TOKENS, LoadConfig(device="cpu"))


def write_bundle(encoder: Encoder | GraphEncoder, out: Path) -> Path:
    """Writes the first fixture with another encoder to `out`/bundle; its provenance says how a graph was made."""
    first = fixture_bundles.build(out / "tokenizer.json")
    made = {"quantisation": encoder.facts.made} if isinstance(encoder, GraphEncoder) else {}
    bundle.write(replace(first, encoder=encoder, provenance={**first.provenance, **made}), out / "bundle")
    return out / "bundle"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The encoder in fp32."""
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tiny_int8(tiny_folder, tmp_path_factory):
    """Its int8 graph, in the folder of a run."""
    return int8_encoder.of_run(tiny_folder, TEXTS, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_int8, tmp_path_factory):
    """A bundle with the int8 graph."""
    return write_bundle(tiny_int8, tmp_path_factory.mktemp("int8"))
