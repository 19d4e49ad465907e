"""Runs a bundle's graphs with ONNX Runtime and compares them with its golden vectors, as a server does."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from learn.padding import pad
from learn.serving.bundle_format import action_numbers, batching
from learn.serving.digests import read_manifest
from learn.serving.tolerances import BATCH_TOLERANCE, MIN_COSINE, SINGLE_PRECISION, Tolerance, of_content

# What vectors are compared with, for messages about a difference. The golden content of an int8 graph was computed by
# ONNX Runtime with the same graph, maybe on another CPU: all CPUs add up the same integers, but their fp32 kernels
# differ in the last digit, and a value on the edge of a step may then go to either side of it. CPUs without VNNI also
# saturate sums if weights have all 8 bits.
PYTORCH, SAME_GRAPH = "PyTorch", "its golden vectors"
CPU_FACTS = Path("/proc/cpuinfo")


def verify(folder: Path) -> None:
    """Runs the graphs on the golden inputs, in other batches than the trainer's; raises ValueError for a difference."""
    verify_encoder(folder)
    verify_towers(folder)


def verify_encoder(folder: Path) -> None:
    """Compares the golden items' content, computed from each one's token ids alone, within the manifest's tolerance.

    Unless the manifest says that the graph gets one text per run, each vector must also be the same in company, within
    `BATCH_TOLERANCE` whatever the manifest's tolerance.
    """
    manifest, golden = _read(folder)
    spec = manifest["encoder"]
    graph = _Graph(folder, spec)
    ids = [item["token_ids"] for item in golden["items"]]
    alone = np.concatenate([graph.run(*pad([row], spec["pad_id"]))[0] for row in ids])
    is_int8 = spec.get("precision") == "int8"
    compare(
        "encoder",
        alone,
        _vectors(golden["items"], "content"),
        of_content(manifest),
        SAME_GRAPH if is_int8 else PYTORCH,
    )
    if batching(manifest) == "alone":
        return
    # Shorter texts, so that there is company of other lengths even for a single golden item.
    company = [*ids, *(row[: len(row) // 2 + 1] for row in ids)]
    for order in (company, company[::-1]):
        together = graph.run(*pad(order, spec["pad_id"]))[0]
        own = together[: len(ids)] if order is company else together[::-1][: len(ids)]
        _check_company(own, alone)


def _check_company(together: np.ndarray, alone: np.ndarray) -> None:
    """Raises ValueError if vectors depend on what else is in their batch."""
    error, cosine = distance(together, alone)
    if not BATCH_TOLERANCE.holds(error, cosine):
        raise ValueError(
            f"encoder: vectors depend on what else is in their batch: on {cpu_name()}, one differs "
            f"{_excess(error, cosine, BATCH_TOLERANCE)}, from the one that is computed alone, as dynamic quantisation "
            "makes them, because it takes its scales from the whole batch: quantise the graph with static "
            'ranges, or give the manifest encoder.batching = "alone", so that the server runs the graph for one text '
            "at a time"
        )


def cpu_name() -> str:
    """Returns the CPU's model name if the system tells it, else its architecture."""
    if CPU_FACTS.is_file():
        for line in CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _colon, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "an unknown CPU"


def verify_towers(folder: Path) -> None:
    """Compares every stage after the encoder; each stage reads the golden vectors of the one before.

    The user tower runs once for all golden users together and once for each of them alone.
    """
    manifest, golden = _read(folder)
    items, users, pairs = golden["items"], golden["users"], golden["pairs"]
    want_item, want_adapted = _vectors(items, "item"), _vectors(items, "adapted")
    want_user = _vectors(users, "user")
    item, adapted = _Graph(folder, manifest["item_tower"]).run(_vectors(items, "content"))
    compare("item tower", item, want_item)
    compare("adaptor", adapted, want_adapted)

    user_tower = _Graph(folder, manifest["user_tower"])
    (together,) = user_tower.run(*_histories(manifest, users, want_adapted))
    compare("user tower", together, want_user)
    alone = [user_tower.run(*_histories(manifest, [user], want_adapted))[0] for user in users]
    compare("user tower, each user alone", np.concatenate(alone), want_user)

    chosen = np.array([pair["item"] for pair in pairs])
    row = np.array([pair["user"] for pair in pairs], np.int64)
    mid_emb, cvr = _Graph(folder, manifest["cvr"]).run(want_user, want_item[chosen], row)
    compare("mid-emb", mid_emb, _vectors(pairs, "mid_emb"))
    compare("cvr", cvr[:, None], _vectors(pairs, "cvr")[:, None])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the manifest and the golden vectors."""
    manifest = read_manifest(folder)
    return manifest, json.loads((folder / manifest["golden"]["file"]).read_text(encoding="utf-8"))


def _vectors(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([entry[key] for entry in entries], np.float32)


def _histories(manifest: Mapping[str, Any], users: list[dict[str, Any]], adapted: np.ndarray) -> list[np.ndarray]:
    """Returns the inputs of the user tower for these golden users, padded to the longest history."""
    rows, mask = pad([user["history"] for user in users])
    inputs = [adapted[rows] * mask[..., None].astype(np.float32), mask]
    if manifest["history"]["actions"]:
        numbers = [action_numbers(manifest, user.get("actions", [])) for user in users]
        inputs.append(pad(numbers, least=mask.shape[1])[0])
    return inputs


class _Graph:
    """One graph of a bundle, called with its inputs in the order of the manifest."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self._table = table
        self._session = session(folder / table["file"])

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Returns the outputs in the order of the manifest."""
        return self._session.run(self._table["outputs"], dict(zip(self._table["inputs"], inputs, strict=True)))


def session(path: Path) -> onnxruntime.InferenceSession:
    """Returns a CPU session with one thread that logs errors only."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare(
    what: str, got: np.ndarray, want: np.ndarray, tolerance: Tolerance = SINGLE_PRECISION, reference: str = PYTORCH
) -> None:
    """Raises ValueError unless every row of [n,d] is within the tolerance of `PYTORCH` or `SAME_GRAPH`."""
    if got.shape != want.shape:
        raise ValueError(f"{what}: the shape is {got.shape}, expected {want.shape}")
    error, cosine = distance(got, want)
    if tolerance.holds(error, cosine):
        return
    message = f"{what}: differs from {reference} {_excess(error, cosine, tolerance)}"
    if reference == SAME_GRAPH:
        message += f", on {cpu_name()}"
        # A vector further away is another vector, which no rounding explains.
        if cosine > MIN_COSINE:
            message += "; a small excess may come from rounding, if another CPU computed the golden vectors"
    raise ValueError(message)


def _excess(error: float, cosine: float, allowed: Tolerance) -> str:
    return f"by {error:.3g} (at most {allowed.absolute:g}), cosine {cosine:.7f} (above {allowed.cosine})"


def distance(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute difference of any value, and the smallest cosine of any row [n,d]."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    cosine = (got * want).sum(axis=1) / np.maximum(norms, 1e-30)
    return float(np.abs(got - want).max()), float(cosine.min())
