"""CEG (Content Embedding Generation): prompts -> content embeddings, by a frozen language model.

The embedding is the mean of the last hidden states over the real tokens, scaled to length 1 (`EncoderGraph`).
It depends only on the weights and their dtype, the config, the tokenizer, the prompt and `max_tokens`, so a digest of
these names the files in which `embedding_store` keeps embeddings between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from learn import padding
from learn.content import language_model
from learn.content.batching import BatchConfig, batches
from learn.content.encoder_graph import EncoderGraph
from learn.progress import Rate

GPU_BATCHES = BatchConfig(max_tokens=32_768)


@dataclass(frozen=True)
class LoadConfig:
    """Where and in which precision a frozen model runs."""

    # "cpu", "cuda", "cuda:1" and so on; "auto" is CUDA if available, else the CPU.
    device: str = "auto"
    # The dtype of weights and hidden states: float32, bfloat16 or float16. Mean and norm are always in fp32.
    dtype: str = "float32"
    # None: a batch size that suits the device.
    batching: BatchConfig | None = None

    def resolved_device(self) -> torch.device:
        """The device, with "auto" resolved for this machine."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TextEncoder:
    """What every encoder does with its tokenizer: prompts -> token ids -> batches -> vectors."""

    tokenizer: Tokenizer
    pad_id: int
    dim: int
    batching: BatchConfig

    def embed(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Content embeddings [b,C] fp32 of padded token ids [b,s]."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, truncated to `max_tokens`, without padding."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]

    def encode(self, prompts: Sequence[str], show_progress: str | None = None) -> np.ndarray:
        """Content embeddings [n,C] fp32 in the order of `prompts`.

        All of them are in memory; for a catalogue that does not fit, use `embedding_store.encode_cached`.
        """
        ids = self.tokenize(prompts)
        content = np.empty((len(ids), self.dim), dtype=np.float32)
        with Rate(show_progress, len(ids)) as rate:
            for rows, vectors in self.run(ids):
                content[rows] = vectors
                rate.add(len(rows), sum(len(ids[row]) for row in rows))
        return content

    def run(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Encodes ragged token ids. Yields, by rising length, indices [b] into `ids` and their vectors [b,C] fp32.

        Raises ValueError if a prompt has no token or a vector is not finite.
        """
        for rows in batches([len(row) for row in ids], self.batching):
            if not ids[rows[0]]:
                raise ValueError(f"prompt {rows[0]} has no tokens, so it has no embedding; give it some text")
            vectors = self.embed(*padding.pad([ids[row] for row in rows], self.pad_id))
            if not np.isfinite(vectors).all():
                bad = rows[int(np.argmin(np.isfinite(vectors).all(axis=1)))]
                raise ValueError(f"the embedding of prompt {bad} is not finite; check the weights and the dtype")
            yield rows, vectors


@dataclass(frozen=True)
class Encoder(TextEncoder):
    """A frozen model with its tokenizer, in memory.

    `weights`, `config_path` and `tokenizer_path` are the files that it was loaded from.
    """

    name: str
    graph: EncoderGraph
    tokenizer: Tokenizer
    tokenizer_path: Path
    max_tokens: int
    pad_id: int
    dim: int
    weights: tuple[Path, ...] = ()
    config_path: Path | None = None
    batching: BatchConfig = field(default_factory=BatchConfig)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.graph.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.graph.parameters()).dtype

    def embed(self, input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Content embeddings [b,C] fp32 of padded token ids [b,s]."""
        with torch.inference_mode():
            ids, mask = (torch.from_numpy(array).to(self.device) for array in (input_ids, mask))
            return self.graph(ids, mask).float().cpu().numpy()

    @property
    def identity(self) -> hashlib._Hash:
        """A SHA-256 that identifies the model, whatever its dtype; see `_model_digest`."""
        return _model_digest(self)

    def loaded(self) -> Encoder:
        """Returns itself; see `EncoderFolder.loaded`."""
        return self


@dataclass(frozen=True)
class EncoderFolder:
    """A frozen model on disk. Vectors that were stored earlier can be found without loading its weights."""

    folder: Path
    max_tokens: int
    config: LoadConfig = field(default_factory=LoadConfig)

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files of the weights."""
        return language_model.weight_files(self.folder)

    @property
    def config_path(self) -> Path | None:
        """The model's config file, if the folder has one."""
        return language_model.config_file(self.folder)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return language_model.tokenizer_file(self.folder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights will be loaded."""
        return language_model.DTYPES[self.config.dtype]

    @cached_property
    def identity(self) -> hashlib._Hash:
        """The same digest as `Encoder.identity`; all files are read on the first access."""
        return _model_digest(self)

    def loaded(self) -> Encoder:
        """Loads the model into memory."""
        return load(self.folder, self.max_tokens, self.config)


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads the token ids of several prompts on the right: input_ids [b,s] and attention_mask [b,s]."""
    input_ids, mask = padding.pad(ids, pad_id)
    return torch.from_numpy(input_ids), torch.from_numpy(mask)


def load_tokenizer(path: Path, max_tokens: int) -> Tokenizer:
    """Reads a tokenizer. As in the server, its own padding and truncation are overridden."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exception.
        raise ValueError(f"{path}: cannot be read as a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # As in the server: "[SEP]" in a title is text like any other.
    tokenizer.enable_truncation(max_tokens, direction="right")
    return tokenizer


def wrap(
    name: str, model: nn.Module, tokenizer_path: Path, max_tokens: int, pad_id: int, weights: tuple[Path, ...] = ()
) -> Encoder:
    """Wraps a model in memory."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if max_tokens < 1 or (longest is not None and max_tokens > longest):
        raise ValueError(f"max_tokens is {max_tokens}, but {name} takes 1 to {longest}")
    tokenizer = load_tokenizer(tokenizer_path, max_tokens)
    graph = EncoderGraph(model.eval().requires_grad_(False)).eval()
    return Encoder(name, graph, tokenizer, tokenizer_path, max_tokens, pad_id, model.config.hidden_size, weights)


def load(folder: Path, max_tokens: int, config: LoadConfig | None = None) -> Encoder:
    """Loads an encoder from a folder with a tokenizer.json and weights; see `language_model` for their formats."""
    config = config or LoadConfig()
    checkpoint = language_model.read(folder, config.dtype)
    tokenizer = language_model.tokenizer_file(folder)
    encoder = wrap(checkpoint.name, checkpoint.model, tokenizer, max_tokens, checkpoint.pad_id, checkpoint.weights)
    device = config.resolved_device()
    encoder.graph.to(device)
    batching = config.batching or (BatchConfig() if device.type == "cpu" else GPU_BATCHES)
    return replace(encoder, config_path=checkpoint.config, batching=batching)


def _model_digest(encoder: Encoder | EncoderFolder) -> hashlib._Hash:
    """A SHA-256 over weights, config, tokenizer and `max_tokens`, which identifies the model whatever its dtype."""
    if not encoder.weights:
        raise ValueError("an encoder without a weights file has no cache key; load it from a folder")
    digest = hashlib.sha256()
    config = () if encoder.config_path is None else (encoder.config_path,)
    for path in (*encoder.weights, *config, encoder.tokenizer_path):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(encoder.max_tokens.to_bytes(8, "little"))
    return digest
