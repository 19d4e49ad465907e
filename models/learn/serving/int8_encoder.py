"""The int8 graph of a run's encoder: exported and quantised once, then kept by digest.

A graph depends on the texts that its ranges were measured on, and so does every vector. The identity of this encoder
therefore covers the graph's bytes (`GraphEncoder.identity`), towers are trained on its vectors, and a bundle gets this
very graph. A later run on a changed catalogue would have another one; `reused` takes the graph of a bundle instead,
which keeps the content embeddings that a server has cached.

    RUN/cache/encoder-int8-KEY/   the graph, when it has been made
    RUN/encoder-int8-KEY/         a copy of it, once towers are trained on it (`keep`), which later steps read (`kept`)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learn.atomic_file import rename_folder
from learn.content import graph_encoder
from learn.content.ceg import Encoder, EncoderFolder
from learn.content.graph_encoder import GraphEncoder, GraphFacts
from learn.data.item_text import ItemText, render, template_source
from learn.serving import bundle_format, encoder_export, quantise
from learn.serving.bundle_format import sha256
from learn.serving.digests import read_manifest
from learn.serving.tolerances import INT8, of_content

PRECISION = "int8"
# Texts to measure ranges on, and other texts to compare the graph with the model on.
N_TEXTS, N_CHECKED = 512, 256
# The smallest cosine to the model that any text of `N_CHECKED` may have. MiniLM with the titles of ml-latest-small has
# .9939 at least and .9963 in the median there, and .9922 and .9964 over all 9,742 titles; graphs that were quantised
# badly had .79 to .93 (models/INT8.md). A manifest's tolerance cannot be wider, either.
MIN_COSINE = 0.98
# A graph that another version of the quantiser made is not found again.
VERSION = 2
_PREFIX = "encoder-int8-"


def of_run(source: EncoderFolder, texts: Sequence[ItemText], run: Path) -> GraphEncoder:
    """Returns the int8 encoder for a catalogue; loads and quantises the model if the run's folder lacks its graph.

    Raises ValueError for weights that are not in float32, a catalogue that is too small to check the graph on, and a
    graph whose vectors are too far from the model's.
    """
    if source.dtype != torch.float32:
        raise ValueError(f'encoder.dtype is {source.dtype}, but encoder.precision = "int8" starts from float32')
    measured, checked = sample(texts)
    digest = source.identity.copy()
    digest.update(json.dumps([VERSION, measured]).encode())
    folder = _folder(run, digest.hexdigest(), lambda temporary: _make(source, (measured, checked), temporary))
    return graph_encoder.read(folder, source.tokenizer_path, source.max_tokens)


def sample(texts: Sequence[ItemText]) -> tuple[list[str], list[str]]:
    """Returns prompts to measure ranges on, and others to check the graph on, both from the whole catalogue.

    Small catalogues give a fifth of their texts to the check. Raises ValueError if no text is left for it.
    """
    n_checked = min(N_CHECKED, len(texts) // 5)
    measured = _spread(np.arange(len(texts)), min(N_TEXTS, len(texts) - n_checked))
    checked = _spread(np.setdiff1d(np.arange(len(texts)), measured), n_checked)
    prompts = [render(texts[position]) for position in measured.tolist()]
    others = [render(texts[position]) for position in checked.tolist()]
    known = set(prompts)
    others = [prompt for prompt in others if prompt not in known]
    if not others:
        raise ValueError(
            f'encoder.precision = "int8" needs at least 5 items with texts of their own, and got {len(texts)} items '
            f"with {len(known)} texts: some of them must be left to compare the int8 graph with the model on"
        )
    return prompts, others


def reused(bundle: Path, source: EncoderFolder, texts: Sequence[ItemText], run: Path) -> GraphEncoder:
    """Returns the int8 encoder of a bundle, with all that its manifest says about the graph.

    Raises ValueError for a graph of another model, tokenizer, `max_tokens` or template, for one whose vectors of
    texts of this catalogue are too far from the model's, and for a file that is not the one that the manifest lists.
    """
    if not (bundle / bundle_format.MANIFEST).is_file():
        raise ValueError(f"encoder.int8_from is {str(bundle)!r}, but there is no bundle in that folder")
    manifest = read_manifest(bundle)
    spec, max_tokens = manifest["encoder"], manifest["item_text"]["max_tokens"]
    if spec.get("precision") != PRECISION:
        raise ValueError(f"{bundle} has an encoder in {spec.get('precision')}, expected int8 for encoder.int8_from")
    if max_tokens != source.max_tokens or sha256(bundle / spec["tokenizer"]) != sha256(source.tokenizer_path):
        raise ValueError(
            f"{bundle} has another tokenizer or max_tokens than {source.folder}, so its encoder does not fit: "
            "pass that bundle's encoder folder, or leave out encoder.int8_from"
        )
    if manifest["item_text"]["template"] != template_source():
        raise ValueError(
            f"{bundle} has another template for the text of items, so no content that servers have cached for it would "
            "be used again: leave out encoder.int8_from"
        )
    files = [entry for entry in manifest["files"] if entry["part"] == "encoder" and entry["path"] != spec["tokenizer"]]
    made = manifest.get("provenance", {}).get("quantisation")
    made = made if isinstance(made, dict) else {}
    made_from = made.get("quantised_from")
    if made_from is not None and made_from != _digests(source):
        raise ValueError(
            f"{bundle} has an int8 graph of other weights than those in {source.folder}: pass the folder of its model, "
            "or leave out encoder.int8_from"
        )
    checked = [render(texts[position]) for position in _spread(np.arange(len(texts)), N_CHECKED).tolist()]
    facts = GraphFacts(
        name=made.get("model", manifest["name"]),
        pad_id=spec["pad_id"],
        dim=spec["dim"],
        precision=PRECISION,
        file=spec["file"],
        inputs=spec["inputs"],
        outputs=spec["outputs"],
        batching=bundle_format.batching(manifest),
        tolerance=of_content(manifest).table(),
        made=made,
    )
    digests = [[entry["path"], entry["sha256"]] for entry in files]
    model = source.identity.hexdigest()
    key = json.dumps([VERSION, digests, spec, facts.name, made, model, checked], sort_keys=True, default=str)

    def copy(temporary: Path) -> Path:
        copied = temporary / PRECISION
        copied.mkdir()
        for entry in files:
            _copy_file(bundle, entry, copied)
        graph = graph_encoder.open_graph(copied, source.tokenizer_path, source.max_tokens, facts)
        _write_facts(source.loaded(), graph, checked)
        return copied

    folder = _folder(run, hashlib.sha256(key.encode()).hexdigest(), copy)
    return graph_encoder.read(folder, source.tokenizer_path, source.max_tokens)


def keep(encoder: GraphEncoder, run: Path) -> None:
    """Copies the graph to where it stays as long as the towers of `run` that are trained on it."""
    kept = run / encoder.folder.name
    if kept.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=run, prefix=".int8-") as temporary:
        copied = shutil.copytree(encoder.folder, Path(temporary) / PRECISION)
        rename_folder(copied, kept)


def kept(run: Path, name: str, source: EncoderFolder) -> GraphEncoder:
    """Returns the encoder whose graph lies in the folder `name` of the run (`keep`)."""
    if not (run / name).is_dir():
        raise ValueError(f"{run / name} is missing, and the towers of this run need that int8 graph: train again")
    return graph_encoder.read(run / name, source.tokenizer_path, source.max_tokens)


def only_kept(run: Path) -> str | None:
    """Returns the folder of the one graph that the run keeps, for towers that do not name theirs; None without one."""
    names = [folder.name for folder in run.glob(f"{_PREFIX}*")]
    return names[0] if len(names) == 1 else None


def forget_others(name: str | None, run: Path) -> None:
    """Removes the graphs that earlier towers of `run` were trained on, all but the folder `name`."""
    for folder in run.glob(f"{_PREFIX}*"):
        if folder.name != name:
            shutil.rmtree(folder)


def _folder(run: Path, key: str, make: Callable[[Path], Path]) -> Path:
    """Returns the folder of a graph. If there is none, `make` writes one within a temporary folder and returns it."""
    cache, name = run / "cache", f"{_PREFIX}{key[:32]}"
    for folder in (run / name, cache / name):
        if folder.is_dir():
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".int8-") as temporary:
        rename_folder(make(Path(temporary)), cache / name)
    return cache / name


def _copy_file(bundle: Path, entry: dict[str, Any], folder: Path) -> None:
    """Copies one listed file and checks the copy, so that it does not matter who changes the bundle meanwhile."""
    name = entry["path"]
    if not bundle_format.is_file_name(name) or name == graph_encoder.FACTS:
        raise ValueError(f"{bundle}: the encoder's file {name!r} has a name that encoder.int8_from cannot copy")
    if not (bundle / name).is_file():
        raise ValueError(f"{bundle / name} is missing, but encoder.int8_from needs it")
    shutil.copyfile(bundle / name, folder / name)
    if sha256(folder / name) != entry["sha256"]:
        raise ValueError(f"{bundle / name} is not the file that the manifest lists, as its digest differs")


def _make(source: EncoderFolder, prompts: tuple[list[str], list[str]], temporary: Path) -> Path:
    measured, checked = prompts
    encoder = source.loaded()
    in_fp32, in_int8 = temporary / "fp32", temporary / PRECISION
    in_fp32.mkdir()
    in_int8.mkdir()
    encoder_export.write_encoder(encoder.graph, in_fp32, encoder.weights)
    quantise.quantise(in_fp32 / encoder_export.GRAPH, in_int8, encoder.tokenize(measured))
    made = {
        "model": encoder.name,
        "weights": "7 bits per output channel, tables 8 bits per row",
        "activations": "uint8, static ranges",
        "n_texts": len(measured),
        "quantised_from": _digests(source),
    }
    facts = GraphFacts(
        name=encoder.name,
        pad_id=encoder.pad_id,
        dim=encoder.dim,
        precision=PRECISION,
        file=encoder_export.GRAPH,
        inputs=list(bundle_format.ENCODER.inputs),
        outputs=list(bundle_format.ENCODER.outputs),
        batching="together",
        tolerance=INT8.table(),
        made=made,
    )
    graph = graph_encoder.open_graph(in_int8, source.tokenizer_path, source.max_tokens, facts)
    _write_facts(encoder, graph, checked)
    return in_int8


def _digests(source: EncoderFolder) -> str:
    """Returns the SHA-256 of each file of the model's weights."""
    return ", ".join(sha256(path) for path in source.weights)


def _write_facts(encoder: Encoder, graph: GraphEncoder, prompts: Sequence[str]) -> None:
    """Compares the graph with the model and writes its facts with the result; raises ValueError below `MIN_COSINE`."""
    if graph.dim != encoder.dim:
        raise ValueError(
            f"the int8 graph has content embeddings of {graph.dim} numbers, and those of {encoder.name} have "
            f"{encoder.dim}"
        )
    want, got = encoder.encode(prompts), graph.encode(prompts)
    lengths = np.linalg.norm(want, axis=1) * np.linalg.norm(got, axis=1)
    cosines = (want * got).sum(axis=1) / np.maximum(lengths, 1e-30)
    lowest, median = float(cosines.min()), float(np.median(cosines))
    # The comparison is written so that a NaN fails it.
    if not lowest >= MIN_COSINE:
        raise ValueError(
            f"the int8 graph of {encoder.name} is too far from the model: over {len(prompts)} texts of the catalogue, "
            f"the smallest cosine of their content embeddings is {lowest:.4f} and the median {median:.4f}, but each "
            f'must be at least {MIN_COSINE}: use encoder.precision = "float"'
        )
    found = {"n_checked": len(prompts), "cosine_min": round(lowest, 5), "cosine_median": round(median, 5)}
    graph_encoder.write_facts(replace(graph.facts, made=graph.facts.made | found), graph.folder)


def _spread(positions: np.ndarray, n: int) -> np.ndarray:
    """Returns `n` of the positions, evenly spread."""
    return positions[np.unique(np.linspace(0, len(positions) - 1, n).astype(int))] if n else positions[:0]
