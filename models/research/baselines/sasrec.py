"""SASRec (Kang and McAuley, ICDM 2018): self-attention over item ids, with one item table for inputs and outputs.

Two choices follow our study and not the paper, so that models differ in their architecture and not in their training:
outputs have length 1 and the loss divides by a temperature (as in the SASRec of the HSTU paper), and the loss is that
of the trainer's config. The baselines over text use the same encoder (`sasrec_text`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.models.pch import causal_mask
from learn.models.recommender import Recommender


@dataclass(frozen=True)
class SasRecConfig:
    """Sizes. The paper's for ML-1M: width 50, 2 layers, 1 head, 200 events, dropout 0.2."""

    width: int = 64
    layers: int = 2
    heads: int = 1
    max_history: int = 80
    dropout: float = 0.2


class SasRec(Recommender):
    """Item embeddings -> encoder -> the state at each event."""

    def __init__(self, config: SasRecConfig, n_items: int) -> None:
        super().__init__()
        self.config, self.max_history = config, config.max_history
        self.table = nn.Parameter(torch.randn(n_items, config.width) * 0.02)
        self.encoder = SasRecEncoder(config)

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state at each event; state 0 is zero, since SASRec needs an event. `times` is not read."""
        return self.encoder(self.table[items] * self.config.width**0.5)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The rows of the item table, scaled to length 1."""
        return F.normalize(self.table[items], dim=-1)


class SasRecEncoder(nn.Module):
    """Item vectors [b,l,D] -> states [b,l+1,D] of length 1; state 0 is zero.

    `norm_in` is applied to the sum of item vector and position embedding; SASRec itself has none.
    """

    def __init__(self, config: SasRecConfig, norm_in: nn.Module | None = None) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(config.max_history, config.width) * 0.02)
        self.norm_in = nn.Identity() if norm_in is None else norm_in
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)

    def forward(self, items: Tensor) -> Tensor:
        """Item vectors [b,l,D] -> states [b,l+1,D]."""
        x = self.dropout(self.norm_in(items + self.positions[: items.shape[1]]))
        index = torch.arange(items.shape[1], device=items.device)
        mask = causal_mask(index[:, None], index[None, :])
        for block in self.blocks:
            x = block(x, mask)
        return F.pad(F.normalize(self.norm_out(x), dim=-1), (0, 0, 1, 0))


class _Block(nn.Module):
    """SASRec's block differs from a usual transformer's in three ways.

    Queries are normalised and keys are not, the residual connection carries the normalised query, and the feed-forward
    part is as narrow as the model.
    """

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        self.norm_query, self.norm_ffn = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, config.dropout, batch_first=True)
        self.up, self.down = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = self.norm_query(x)
        x = query + self.attention(query, x, x, attn_mask=mask, need_weights=False)[0]
        y = self.norm_ffn(x)
        return y + self.dropout(self.down(self.dropout(F.relu(self.up(y)))))
