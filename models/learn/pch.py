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
    # An MLP, not the paper's linear map: with a small C, a linear adaptor is too small a table for the items.
    adaptor_hidden: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    ffn: int = 512
    out_dim: int = 64
    max_history: int = 80
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
        self.adaptor = nn.Sequential(
            nn.Linear(config.content_dim, config.adaptor_hidden),
            nn.GELU(),
            nn.Linear(config.adaptor_hidden, config.width),
        )
        # Identity until `standardise` is called, and again after `fold_standardisation`.
        self.register_buffer("content_mean", torch.zeros(config.content_dim), persistent=False)
        self.register_buffer("content_scale", torch.ones(config.content_dim), persistent=False)
        self.is_standardised = False
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(config.max_history + 1, config.width) * 0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.out_dim)

    def standardise(self, content: Tensor) -> None:
        """Gives the adaptor inputs of mean 0 and variance 1 over a catalogue [n,C], for training.

        Every prompt opens with the same words, so content embeddings share most of their direction, and being of
        length 1 their entries are near C ** -0.5. Both starve the first layer of signal.
        """
        self.content_mean.copy_(content.mean(dim=0))
        self.content_scale.copy_(1.0 / content.std(dim=0).clamp_min(1e-6))
        self.is_standardised = True

    @torch.no_grad()
    def fold_standardisation(self) -> None:
        """Moves it into the adaptor's first layer, exactly, so that serving pays nothing for it."""
        first = self.adaptor[0]
        first.weight.mul_(self.content_scale)
        first.bias.sub_(first.weight @ self.content_mean)
        self.is_standardised = False

    def _adapt(self, content: Tensor) -> Tensor:
        if self.is_standardised:
            content = (content - self.content_mean) * self.content_scale
        return self.adaptor(content)

    def states(self, content: Tensor) -> Tensor:
        """[b,l,C] -> the output at the start token and at every item, [b,l+1,E]."""
        x = self._embed(content)
        mask = self._causal(x)
        for block in self.blocks:
            x = block(x, *block.keys_values(x), mask)
        return self._output(x)

    def last(self, content: Tensor, mask: Tensor) -> Tensor:
        """[b,l,C], mask [b,l] (1 = item, items on the left) -> the output at the last item, [b,E]."""
        x = self._embed(content)
        causal = self._causal(x)
        *earlier, final = self.blocks
        for block in earlier:
            x = block(x, *block.keys_values(x), causal)
        n_items = mask.sum(dim=1)  # [b]; the start token stands at 0, so the last item stands at n_items
        at = n_items[:, None, None].expand(-1, 1, x.shape[-1])
        index = torch.arange(x.shape[1], device=x.device)
        seen = visible(n_items[:, None, None, None], index[None, None, None, :])  # [b,1,1,l+1]
        return self._output(final(x.gather(1, at), *final.keys_values(x), seen)).squeeze(1)

    def alone(self, content: Tensor) -> Tensor:
        """[n,C] -> the output at the item of [start, item], [n,E]."""
        x = self._adapt(content)[:, None]  # [n,1,D]
        if self.positions is not None:
            x = x + self.positions[1:2]
        x = self.dropout(x)
        shared = (x.shape[0], -1, -1, -1)
        for block, (start_key, start_value) in zip(self.blocks, self.start_keys_values(), strict=True):
            key, value = block.keys_values(x)
            pair_key = torch.cat([start_key.expand(shared), key], dim=2)  # [n,heads,2,D/heads]
            pair_value = torch.cat([start_value.expand(shared), value], dim=2)
            x = block(x, pair_key, pair_value, None)
        return self._output(x).squeeze(1)

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

    def _embed(self, content: Tensor) -> Tensor:
        items = self._adapt(content)
        x = torch.cat([self.start.expand(items.shape[0], 1, -1), items], dim=1)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        return self.dropout(x)

    def _causal(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1], device=x.device)
        return visible(index[:, None], index[None, :])  # [l+1,l+1]

    def _output(self, x: Tensor) -> Tensor:
        out = self.projection(self.norm_out(x))
        return F.normalize(out, dim=-1) if self.config.output == "unit" else out
