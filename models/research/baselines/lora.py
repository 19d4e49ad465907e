"""The alternative to LEARN's frozen language model: one that is tuned on what users do.

    prompt -> encoder with LoRA in every linear layer -> mean over tokens -> projection -> item embedding [E]
    user = the mean of the last items' embeddings

There is no transformer over the history: everything that is learned about users goes into the text encoder. Every item
of a batch is encoded with gradients, so a step costs hundreds of times as much as a step of PCH over stored content.
LoRA: Hu et al., ICLR 2022, as peft implements it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from learn.content.batching import batches
from learn.content.ceg import Encoder, pad
from learn.models.recommender import Recommender


@dataclass(frozen=True)
class LoraSizes:
    """Rank and strength of the low-rank updates, and sizes around the encoder."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    out_dim: int = 64
    # Short, because every item of the history is encoded at every step.
    max_history: int = 10


class LoraEncoder(Recommender):
    """A tuned language model: base weights stay frozen, low-rank updates and the projection are trained."""

    def __init__(self, sizes: LoraSizes, encoder: Encoder, prompts: Iterable[str]) -> None:
        super().__init__()
        self.config, self.max_history = sizes, sizes.max_history
        self.ids = encoder.tokenize(list(prompts))
        self.pad_id, self.batching = encoder.pad_id, encoder.batching
        adapter = LoraConfig(
            r=sizes.rank, lora_alpha=sizes.alpha, lora_dropout=sizes.dropout, target_modules="all-linear"
        )
        encoder.graph.model = inject_adapter_in_model(adapter, encoder.graph.model)
        self.graph = encoder.graph
        self.projection = nn.Linear(encoder.dim, sizes.out_dim)
        # In inference mode: the embeddings of all items, encoded once.
        self._table: Tensor | None = None
        # In training: the items of a step's histories, sorted, and their embeddings.
        self._encoded: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(lambda module, _keys: module._forget())

    def train(self, mode: bool = True) -> LoraEncoder:
        """Sets the mode; training mode drops the embeddings that were computed with older weights."""
        if mode:
            self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        self._table = self._encoded = None

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """State j is the mean of the first j item embeddings; state 0 is zero. `times` is not read."""
        if self.training:
            known = torch.unique(items)
            self._encoded = known, self._encode(known)
            vectors = self._encoded[1][torch.searchsorted(known, items)]
        else:
            vectors = self._all()[items]
        return F.normalize(F.pad(vectors.cumsum(dim=1), (0, 0, 1, 0)), dim=-1)

    def settings(self) -> dict[str, Any]:
        """Its sizes and a digest of the texts."""
        return super().settings() | {"texts": hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()}

    def item_embeddings(self, items: Tensor) -> Tensor:
        """[n] -> [n,E]. In training, items that the step has encoded for its histories are not encoded again."""
        if not self.training:
            return self._all()[items]
        if self._encoded is None:
            return self._encode(items)
        known, vectors = self._encoded
        self._encoded = None
        place = torch.searchsorted(known, items).clamp(max=len(known) - 1)
        is_new = known[place] != items
        embeddings = vectors[place]
        if is_new.any():
            embeddings = embeddings.index_put((is_new,), self._encode(items[is_new]))
        return embeddings

    def _all(self) -> Tensor:
        if self._table is None:
            with torch.no_grad():
                self._table = self._encode(torch.arange(len(self.ids), device=self.projection.weight.device))
        return self._table

    def _encode(self, items: Tensor) -> Tensor:
        device, chosen = items.device, [self.ids[item] for item in items.tolist()]
        order, parts = [], []
        for rows in batches([len(ids) for ids in chosen], self.batching):
            input_ids, mask = pad([chosen[row] for row in rows], self.pad_id)
            parts.append(self.graph(input_ids.to(device), mask.to(device)))
            order += rows
        back = torch.argsort(torch.tensor(order, device=device))
        return F.normalize(self.projection(torch.cat(parts)[back]), dim=-1)
