"""CEG (Content Embedding Generation): prompts -> content embeddings, by a frozen language model.

The embedding is the mean of the last hidden states over the real tokens, scaled to length 1 (`graphs.EncoderGraph`).
It depends on the weights, the tokenizer, the prompt and `max_tokens`, and on nothing else, so these four name the file
in which embeddings are kept between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, BertModel

from learn import minilm
from learn.graphs import EncoderGraph

BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A frozen model with its tokenizer. `weights` and `tokenizer_path` are the files that were read."""

    name: str
    graph: EncoderGraph
    tokenizer: Tokenizer
    tokenizer_path: Path
    max_tokens: int
    pad_id: int
    dim: int
    weights: Path | None = None

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, cut at `max_tokens`, never padded."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]

    def encode(self, prompts: Sequence[str], show_progress: str | None = None) -> np.ndarray:
        """[n,C] fp32 in the order of `prompts`; sorted by length inside, so that little is spent on padding."""
        ids = self.tokenize(prompts)
        order = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
        content = np.empty((len(ids), self.dim), dtype=np.float32)
        progress = tqdm(total=len(ids), desc=show_progress, unit="item", disable=show_progress is None)
        for begin in range(0, len(order), BATCH):
            chosen = order[begin : begin + BATCH]
            with torch.inference_mode():
                content[chosen] = self.graph(*pad([ids[index] for index in chosen], self.pad_id)).numpy()
            progress.update(len(chosen))
        progress.close()
        if not np.isfinite(content).all():
            raise ValueError("the encoder gave a vector that is not finite")
        return content


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged ids -> input_ids [b,s] and attention_mask [b,s], padded on the right."""
    length = max(len(row) for row in ids)
    input_ids = torch.full((len(ids), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(ids), length), dtype=torch.int64)
    for index, row in enumerate(ids):
        input_ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return input_ids, mask


def wrap(
    name: str, model: nn.Module, tokenizer_path: Path, max_tokens: int, pad_id: int, weights: Path | None = None
) -> Encoder:
    """A model in memory -> an encoder. The tokenizer's own padding and truncation are overridden, as in the server."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens, direction="right")
    graph = EncoderGraph(model.eval().requires_grad_(False)).eval()
    return Encoder(name, graph, tokenizer, tokenizer_path, max_tokens, pad_id, model.config.hidden_size, weights)


def load(folder: Path, max_tokens: int) -> Encoder:
    """An encoder from a folder: a Hugging Face one (config.json), or the two fetched files of all-MiniLM-L6-v2."""
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    for path in (weights, tokenizer):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; `make setup` fetches the default encoder")
    if (folder / "config.json").is_file():
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else 0
        return wrap(folder.resolve().name, model, tokenizer, max_tokens, pad_id, weights)
    model = BertModel(minilm.config(), add_pooling_layer=False)
    missing, _unused = model.load_state_dict(load_file(weights), strict=False)
    if missing:
        raise ValueError(f"{weights}: lacks {len(missing)} tensors of all-MiniLM-L6-v2, the first is {missing[0]}")
    return wrap(minilm.NAME, model, tokenizer, max_tokens, minilm.PAD_ID, weights)


def cache_key(encoder: Encoder, prompts: Sequence[str]) -> str:
    """A digest over everything that the embeddings depend on."""
    digest = hashlib.sha256()
    for path in (encoder.weights, encoder.tokenizer_path):
        if path is None:
            raise ValueError("an encoder without a weights file has no cache key")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(encoder.max_tokens.to_bytes(8, "little"))
    for prompt in prompts:
        raw = prompt.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def encode_cached(encoder: Encoder, prompts: Sequence[str], cache: Path) -> np.ndarray:
    """`Encoder.encode`, kept in `cache` under its key. A half-written file is never seen under that name."""
    path = cache / f"content-{cache_key(encoder, prompts)[:32]}.npy"
    if path.is_file():
        return np.load(path)
    content = encoder.encode(prompts, show_progress="encode items")
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, content)
    partial.rename(path)
    return content
