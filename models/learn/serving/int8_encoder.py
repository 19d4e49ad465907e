"""The int8 graph of a run's encoder: exported and quantised once, then kept by digest in the run's cache.

A graph depends on the texts that its ranges were measured on, and so does every vector. The identity of this encoder
therefore covers the graph's bytes (`GraphEncoder.identity`), towers are trained on its vectors, and a bundle gets this
very graph. A later run on a changed catalogue would have another one; `reused` takes the graph of a bundle instead,
which keeps the content embeddings that a server has cached.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from learn.content import graph_encoder
from learn.content.ceg import EncoderFolder
from learn.content.graph_encoder import GraphEncoder, GraphFacts
from learn.data.item_text import ItemText, render
from learn.serving import encoder_export, quantise
from learn.serving.bundle_format import sha256
from learn.serving.digests import read_manifest

PRECISION = "int8"
N_TEXTS = 512
# A graph that another version of the quantiser made is not found again.
VERSION = 1


def of_run(source: EncoderFolder, texts: Sequence[ItemText], cache: Path) -> GraphEncoder:
    """Returns the int8 encoder for a catalogue; loads and quantises the model if `cache` does not have its graph."""
    if source.dtype != torch.float32:
        raise ValueError(f'encoder.dtype is {source.dtype}, but encoder.precision = "int8" starts from float32')
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(N_TEXTS, len(texts))).astype(int))
    prompts = [render(texts[position]) for position in chosen.tolist()]
    digest = source.identity.copy()
    digest.update(json.dumps([VERSION, prompts]).encode())
    folder = cache / f"encoder-int8-{digest.hexdigest()[:32]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".int8-") as temporary:
            _make(source, prompts, Path(temporary))
            _put(Path(temporary) / "int8", folder)
    return graph_encoder.read(folder, source.tokenizer_path, source.max_tokens)


def reused(bundle: Path, source: EncoderFolder, cache: Path) -> GraphEncoder:
    """Returns the int8 encoder of a bundle; raises ValueError for another precision, tokenizer or `max_tokens`."""
    manifest = read_manifest(bundle)
    spec, max_tokens = manifest["encoder"], manifest["item_text"]["max_tokens"]
    if spec.get("precision") != PRECISION:
        raise ValueError(f"{bundle} has an encoder in {spec.get('precision')}, expected int8 for encoder.int8_from")
    if max_tokens != source.max_tokens or sha256(bundle / spec["tokenizer"]) != sha256(source.tokenizer_path):
        raise ValueError(
            f"{bundle} has another tokenizer or max_tokens than {source.folder}, so its encoder does not fit: "
            "pass that bundle's encoder folder, or leave out encoder.int8_from"
        )
    files = [entry for entry in manifest["files"] if entry["part"] == "encoder" and entry["path"] != spec["tokenizer"]]
    folder = cache / f"encoder-int8-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".int8-") as temporary:
            made = Path(temporary) / "int8"
            made.mkdir()
            for entry in files:
                shutil.copyfile(bundle / entry["path"], made / entry["path"])
            made_by = manifest.get("provenance", {}).get("quantisation", {})
            name = made_by.get("model", manifest["name"])
            facts = GraphFacts(name, spec["pad_id"], spec["dim"], PRECISION, made_by)
            _write_facts(facts, made)
            _put(made, folder)
    return graph_encoder.read(folder, source.tokenizer_path, source.max_tokens)


def _make(source: EncoderFolder, prompts: Sequence[str], temporary: Path) -> None:
    encoder = source.loaded()
    in_fp32, in_int8 = temporary / "fp32", temporary / "int8"
    in_fp32.mkdir()
    in_int8.mkdir()
    encoder_export.write_encoder(encoder.graph, in_fp32, encoder.weights)
    quantise.quantise(in_fp32 / encoder_export.GRAPH, in_int8, encoder.tokenize(prompts))
    made = {
        "model": encoder.name,
        "weights": "7 bits per output channel, tables 8 bits per row",
        "activations": "uint8, static ranges",
        "n_texts": len(prompts),
        "quantised_from": ", ".join(sha256(path) for path in encoder.weights),
    }
    _write_facts(GraphFacts(encoder.name, encoder.pad_id, encoder.dim, PRECISION, made), in_int8)


def _write_facts(facts: GraphFacts, folder: Path) -> None:
    (folder / graph_encoder.FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


def _put(made: Path, folder: Path) -> None:
    """Renames `made` to `folder`, unless another process was faster."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
