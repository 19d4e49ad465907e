"""PCH (Preference Comprehension): content embeddings -> user and item embeddings.

    content [b,l,C] -> adaptor (MLP) -> [b,l,D]; a learned start token goes before it -> [b,l+1,D]
                    -> causal transformer, pre-LN -> [b,l+1,D] -> norm, projection -> [b,l+1,E]

One set of weights serves as user tower and as item tower (variant 1 of the LEARN paper). The user embedding is the
output at the last item, or at the start token if there is none. The item embedding is the output at the item in the
sequence [start, item].

Three ways lead through the same layers, and tests hold them equal:
- `states`: every position, for training;
- `last`: only what the last position needs. In the last layer that is one query and one feed-forward row;
- `alone`: many items, each by itself. The start token sees nothing but itself, so its keys and values are the same for
  all of them and are computed once.

Items stand on the left and padding on the right, so causality already hides padding from every real position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PchConfig:
    """Sizes of the towers. The defaults are those of the shipped bundle."""

    content_dim: int = 384
    adaptor_hidden: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    ffn: int = 256
    out_dim: int = 64
    max_history: int = 80
    # The paper's adaptor is one linear map; with a small C that is too small a table for the items.
    adaptor: Literal["mlp", "linear"] = "mlp"
    # LEARN's variants of the item tower in training. All of them serve one item at a time.
    # "sequence" (1): targets are read as a sequence. "alone" (2): each by itself. "content" (3): no PCH for items.
    item_tower: Literal["sequence", "alone", "content"] = "sequence"
    positions: Literal["none", "learned"] = "none"
    # "unit": outputs have length 1 and training divides by a temperature. "raw": a plain dot product.
    output: Literal["unit", "raw"] = "unit"
    dropout: float = 0.1


class Block(nn.Module):
    """One pre-LN transformer layer whose queries and keys may come from different positions."""

    def __init__(self, config: PchConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_ffn = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b,k,D] -> keys and values, each [b,heads,k,D/heads]."""
        key, value = self.key_value(self.norm_attention(x)).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Updates the positions in `x` [b,q,D]; `mask` is added to the scores [b,heads,q,k]."""
        query = self._split(self.query(self.norm_attention(x))) * (query_scale(x.shape[-1], self.heads))
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_ffn(x)))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def query_scale(width: int, heads: int) -> float:
    """1 / sqrt(width of a head)."""
    return (width // heads) ** -0.5


def visible(query_index: Tensor, key_index: Tensor) -> Tensor:
    """Causality as an addend: 0 where the key is not after the query, -inf elsewhere. Shapes broadcast."""
    hidden = torch.tensor(float("-inf"), device=query_index.device)
    return torch.where(key_index <= query_index, torch.zeros_like(hidden), hidden)


class Pch(nn.Module):
    """The towers."""

    def __init__(self, config: PchConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptor = _adaptor(config)
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(config.max_history + 1, config.width) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.out_dim)

    def adapt(self, content: Tensor) -> Tensor:
        """[...,C] -> [...,D]: what enters the transformer."""
        return self.adaptor(content)

    def states(self, content: Tensor) -> Tensor:
        """[b,l,C] -> the output at the start token and at every item, [b,l+1,E]."""
        return self.states_of(self.adapt(content))

    def states_of(self, items: Tensor) -> Tensor:
        """`states` of items that are adapted already, [b,l,D]."""
        x = self._embed(items)
        mask = self._causal(x)
        for block in self.blocks:
            x = block(x, *block.keys_values(x), mask)
        return self.output(self._project(x))

    def last(self, content: Tensor, mask: Tensor) -> Tensor:
        """[b,l,C], mask [b,l] (1 = item, items on the left) -> the output at the last item, [b,E]."""
        return self.last_of(self.adapt(content), mask)

    def last_of(self, items: Tensor, mask: Tensor) -> Tensor:
        """`last` of items that are adapted already, [b,l,D]."""
        x = self._embed(items)
        causal = self._causal(x)
        *earlier, final = self.blocks
        for block in earlier:
            x = block(x, *block.keys_values(x), causal)
        n_items = mask.sum(dim=1)  # [b]; the start token stands at 0, so the last item stands at n_items
        at = n_items[:, None, None].expand(-1, 1, x.shape[-1])
        index = torch.arange(x.shape[1], device=x.device)
        seen = visible(n_items[:, None, None, None], index[None, None, None, :])  # [b,1,1,l+1]
        return self.output(self._project(final(x.gather(1, at), *final.keys_values(x), seen))).squeeze(1)

    def alone(self, content: Tensor) -> Tensor:
        """[n,C] -> the output at the item of [start, item], [n,E]."""
        return self.output(self.alone_raw(self.adapt(content)))

    def alone_raw(self, items: Tensor) -> Tensor:
        """`alone` of items that are adapted already, [n,D] -> [n,E], before their length is made 1."""
        x = items[:, None]  # [n,1,D]
        if self.positions is not None:
            x = x + self.positions[1:2]
        x = self.dropout(x)
        shared = (x.shape[0], -1, -1, -1)
        for block, (start_key, start_value) in zip(self.blocks, self.start_keys_values(), strict=True):
            key, value = block.keys_values(x)
            pair_key = torch.cat([start_key.expand(shared), key], dim=2)  # [n,heads,2,D/heads]
            pair_value = torch.cat([start_value.expand(shared), value], dim=2)
            x = block(x, pair_key, pair_value, None)
        return self._project(x).squeeze(1)

    def start_keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """What the start token offers to those after it, one pair [1,heads,1,D/heads] a layer."""
        x = self.start[None, None]  # [1,1,D]
        if self.positions is not None:
            x = x + self.positions[:1]
        x = self.dropout(x)
        pairs = []
        for block in self.blocks:
            pairs.append(block.keys_values(x))
            x = block(x, *pairs[-1], None)
        return pairs

    def _embed(self, items: Tensor) -> Tensor:
        x = torch.cat([self.start.expand(items.shape[0], 1, -1), items], dim=1)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        return self.dropout(x)

    def _causal(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1], device=x.device)
        return visible(index[:, None], index[None, :])  # [l+1,l+1]

    def _project(self, x: Tensor) -> Tensor:
        return self.projection(self.norm_out(x))

    def output(self, raw: Tensor) -> Tensor:
        """A user or item embedding as it is served: of length 1, or as it comes."""
        return F.normalize(raw, dim=-1) if self.config.output == "unit" else raw


def _adaptor(config: PchConfig) -> nn.Sequential:
    """C -> D; in both shapes the first module is a linear layer, into which a standardisation can be folded."""
    if config.adaptor == "linear":
        return nn.Sequential(nn.Linear(config.content_dim, config.width))
    first, second = config.adaptor_hidden, config.width
    return nn.Sequential(nn.Linear(config.content_dim, first), nn.GELU(), nn.Linear(first, second))
