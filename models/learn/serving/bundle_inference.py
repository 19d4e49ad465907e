"""Computes text -> content embedding -> item record from a bundle's own files, as a server does.

ONNX Runtime runs the graphs, the manifest's template and tokenizer produce prompts and token ids, and rows are padded
on the right. No PyTorch model is needed, so any machine that has the bundle folder can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from learn.content.batching import BatchConfig, batches
from learn.data.item_text import ItemText, render
from learn.padding import pad
from learn.serving.bundle_format import batching
from learn.serving.digests import bundle_digest, encoder_digest, read_manifest, tower_digest

# Items per run of the item tower: enough for efficient matrix products, and little memory at any width.
TOWER_ITEMS = 1024


@dataclass(frozen=True)
class GraphsConfig:
    """How the graphs run. The default batches on a CPU are the server's."""

    # "cpu", "cuda", or "auto", which takes CUDA where ONNX Runtime has it.
    provider: str = "auto"
    # Threads per session. Several processes with one thread each are faster than one process with many threads.
    threads: int = 1
    batching: BatchConfig | None = None

    def providers(self) -> list[str]:
        """Returns ONNX Runtime's provider names; raises ValueError for one that is unknown or not available."""
        known = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}
        if self.provider == "auto":
            has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
            return known["cuda" if has_cuda else "cpu"]
        if self.provider not in known:
            raise ValueError(f"provider is {self.provider!r}, but it must be auto, cpu or cuda")
        (name,) = known[self.provider]
        if name not in onnxruntime.get_available_providers():
            raise ValueError(f"provider is {self.provider!r}, but this ONNX Runtime lacks {name}")
        return [name]

    def batches(self) -> BatchConfig:
        """Returns the configured batching, or the default for the provider."""
        is_cpu = self.providers() == ["CPUExecutionProvider"]
        return self.batching or (BatchConfig(512, 16) if is_cpu else BatchConfig(16_384, 256))


class BundleGraphs:
    """The loaded encoder and item tower of a bundle folder."""

    def __init__(self, bundle: Path, config: GraphsConfig) -> None:
        manifest = read_manifest(bundle)
        self.manifest = manifest
        self.digests = {
            "bundle_digest": bundle_digest(bundle),
            "encoder_digest": encoder_digest(manifest),
            "tower_digest": tower_digest(manifest),
        }
        self.content_dim = manifest["encoder"]["dim"]
        self.item_dim, self.adapted_dim = manifest["item_tower"]["dim"], manifest["item_tower"]["adapted_dim"]
        self._tokenizer = Tokenizer.from_file(str(bundle / manifest["encoder"]["tokenizer"]))
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # As in the server: "[SEP]" in a title is text like any other.
        self._tokenizer.enable_truncation(manifest["item_text"]["max_tokens"], direction="right")
        limits = config.batches()
        self._batching = replace(limits, max_items=1) if batching(manifest) == "alone" else limits
        self._encoder = session(bundle / manifest["encoder"]["file"], config)
        self._item_tower = session(bundle / manifest["item_tower"]["file"], config)

    def content(self, texts: Sequence[ItemText]) -> tuple[np.ndarray, dict[int, str], int]:
        """Returns content [n,C] in fp32, the reason for each failed row by row number, and the number of tokens.

        A failed row is all zeros; it does not affect the others.
        """
        template = self.manifest["item_text"]["template"]
        encodings = self._tokenizer.encode_batch([render(text, template) for text in texts])
        ids = [encoding.ids for encoding in encodings]
        vectors = np.zeros((len(ids), self.content_dim), dtype=np.float32)
        faults = {row: "the tokenizer returned no token" for row, tokens in enumerate(ids) if not tokens}
        present = [row for row in range(len(ids)) if row not in faults]
        for batch in batches([len(ids[row]) for row in present], self._batching):
            rows = [present[position] for position in batch]
            self._encode(ids, rows, vectors, faults)
        return vectors, faults, sum(map(len, ids))

    def record(self, content: np.ndarray) -> np.ndarray:
        """Maps content [n,C] to item records [n,E+D] in fp32: the item embedding, then the adapted item."""
        spec = self.manifest["item_tower"]
        records = np.empty((len(content), self.item_dim + self.adapted_dim), dtype=np.float32)
        for begin in range(0, len(content), TOWER_ITEMS):
            piece = slice(begin, begin + TOWER_ITEMS)
            outputs = self._item_tower.run(spec["outputs"], {spec["inputs"][0]: content[piece]})
            records[piece] = np.concatenate(outputs, axis=1)
        return records

    def _encode(self, ids: list[list[int]], rows: list[int], vectors: np.ndarray, faults: dict[int, str]) -> None:
        try:
            found = self._run_encoder([ids[row] for row in rows])
        except Exception as error:  # ONNX Runtime's errors have no common base class.
            if len(rows) == 1:
                faults[rows[0]] = f"the encoder failed: {str(error).splitlines()[0][:200]}"
                return
            # One text may have caused the failure, so each text is encoded alone and the others still succeed.
            for row in rows:
                self._encode(ids, [row], vectors, faults)
            return
        is_finite = np.isfinite(found).all(axis=1)
        for row, vector, good in zip(rows, found, is_finite, strict=True):
            if good:
                vectors[row] = vector
            else:
                faults[row] = "the encoder returned a vector that is not finite"

    def _run_encoder(self, ids: list[list[int]]) -> np.ndarray:
        spec = self.manifest["encoder"]
        feeds = dict(zip(spec["inputs"], pad(ids, spec["pad_id"]), strict=True))  # [b,s] each
        return self._encoder.run(spec["outputs"], feeds)[0]


def session(path: Path, config: GraphsConfig) -> onnxruntime.InferenceSession:
    """Loads a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=config.providers())
