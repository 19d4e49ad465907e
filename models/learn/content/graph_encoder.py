"""An encoder's ONNX graph, run by ONNX Runtime on a CPU, as a server runs it.

It is for graphs whose vectors are not those of the PyTorch model, such as a quantised one: towers must be trained on
what a server will compute. Its folder holds the graph, the files with its weights, and a few facts about both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer

from learn.content.batching import BatchConfig
from learn.content.ceg import TextEncoder, load_tokenizer

FACTS = "facts.json"
# The batches of a server.
CPU_BATCHES = BatchConfig(max_tokens=512, max_items=16)


@dataclass(frozen=True)
class GraphFacts:
    """What the files of a graph do not say; the manifest of a bundle with this graph repeats it."""

    name: str
    pad_id: int
    dim: int
    precision: str
    # The name of the graph's file. The other files hold its weights.
    file: str
    # The graph's names for token ids [b,s], attention mask [b,s], and content [b,C].
    inputs: list[str]
    outputs: list[str]
    # "alone": vectors depend on what else is in a run, so each text gets a run of its own.
    batching: Literal["together", "alone"]
    # How far vectors may be from these on another machine: `absolute` per value, `cosine` per vector.
    tolerance: dict[str, float]
    # For the manifest's provenance: how the graph was made, and how close it is to the model that it was made from.
    made: dict[str, Any]


@dataclass(frozen=True)
class GraphEncoder(TextEncoder):
    """A graph on disk, which is loaded when it first runs."""

    folder: Path
    tokenizer_path: Path
    max_tokens: int
    facts: GraphFacts
    batching: BatchConfig = CPU_BATCHES

    @property
    def name(self) -> str:
        """The name of the model that the graph was made from."""
        return self.facts.name

    @property
    def pad_id(self) -> int:
        """The token id of padding."""
        return self.facts.pad_id

    @property
    def dim(self) -> int:
        """C, the width of the content embeddings."""
        return self.facts.dim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return torch.float32

    @property
    def files(self) -> list[Path]:
        """The graph and the files with its weights, sorted by name."""
        return sorted(path for path in self.folder.iterdir() if path.name != FACTS)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, without padding."""
        return load_tokenizer(self.tokenizer_path, self.max_tokens)

    @cached_property
    def identity(self) -> hashlib._Hash:
        """A SHA-256 over everything that a vector depends on except its prompt; see `ceg.Encoder.identity`."""
        digest = hashlib.sha256(b"graph")
        for path in (*self.files, self.tokenizer_path):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for number in (self.pad_id, self.max_tokens):
            digest.update(number.to_bytes(8, "little", signed=True))
        if self.facts.batching == "alone":
            digest.update(b"alone")
        return digest

    def loaded(self) -> GraphEncoder:
        """Returns itself; see `ceg.EncoderFolder.loaded`."""
        return self

    def embed(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Content embeddings [b,C] fp32 of padded token ids [b,s]."""
        feeds = dict(zip(self.facts.inputs, (input_ids, mask), strict=True))
        return self._session.run(self.facts.outputs, feeds)[0]

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(self.folder / self.facts.file, options, providers=["CPUExecutionProvider"])


def read(folder: Path, tokenizer_path: Path, max_tokens: int) -> GraphEncoder:
    """Opens a graph's folder."""
    facts = GraphFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    return open_graph(folder, tokenizer_path, max_tokens, facts)


def open_graph(folder: Path, tokenizer_path: Path, max_tokens: int, facts: GraphFacts) -> GraphEncoder:
    """Opens a graph whose folder does not have its facts yet."""
    batching = CPU_BATCHES if facts.batching == "together" else replace(CPU_BATCHES, max_items=1)
    return GraphEncoder(folder, tokenizer_path, max_tokens, facts, batching)


def write_facts(facts: GraphFacts, folder: Path) -> None:
    """Writes the facts beside the graph; values of `made` that JSON does not have, such as dates, become strings."""
    text = json.dumps(asdict(facts), indent=1, default=str)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8")
