"""HSTU (Zhai et al., "Actions Speak Louder than Words", ICML 2024): gated attention without a softmax.

One layer, for x [b,l,D] (their equations 1 to 3):

    u, v, q, k = split(silu(linear(norm(x))))
    a = silu(q k^T + bias) / n            causal; n is the longest sequence, not the number of keys
    y = linear(norm(a v) * u) + x

The bias is learned: one number per distance in positions and, with `time_bias`, one per bucket of the time between the
key's event and the event to be predicted. So with `time_bias` the model knows the time of the request, as a server
does; SASRec and LEARN do not.

Initial values are those of the published code (facebookresearch/generative-recommenders), and so are two details that
the paper does not mention: norms have no learned weights, and their epsilon is 1e-6. The latter counts, because after
the division by n the values that are normalised are small. The state is the last layer's output, scaled to length 1,
without another norm. What follows our study and not that code: the trainer's loss and its weight decay.

The residual connection carries x itself, and not the normalised x as in SASRec, so the embedding of the last item stays
in the state. On ml-latest-small, that seems to be most of what separates the two: with a normalised residual and a norm
before the output, NDCG@10 on validation was .086 in place of .082, where SASRec has .088 (one seed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.models.recommender import Recommender

# Buckets are log(seconds) / BUCKET_WIDTH, as in the paper; 128 of them cover every time difference.
BUCKET_WIDTH = 0.301
N_BUCKETS = 128
NORM_EPSILON = 1e-6
# Standard deviation of the item table, of the linear layer of u, v, q and k, and of both biases at the start.
INITIAL = 0.02


@dataclass(frozen=True)
class HstuConfig:
    """Sizes. The paper's for ML-1M: width 50, 2 layers, 1 head; large: 8 layers, 2 heads. 200 events, dropout 0.2."""

    width: int = 64
    layers: int = 2
    heads: int = 1
    max_history: int = 80
    dropout: float = 0.2
    time_bias: bool = False


class Hstu(Recommender):
    """Item and position embeddings -> HSTU layers -> the state at each event."""

    def __init__(self, config: HstuConfig, n_items: int) -> None:
        super().__init__()
        self.config, self.max_history = config, config.max_history
        # Cut at two standard deviations.
        table = nn.init.trunc_normal_(torch.empty(n_items, config.width), std=INITIAL, a=-2 * INITIAL, b=2 * INITIAL)
        self.table = nn.Parameter(table)
        self.positions = nn.Parameter(nn.init.xavier_normal_(torch.empty(config.max_history, config.width)))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state at each event; state 0 is zero, as in SASRec."""
        length = items.shape[1]
        x = self.dropout(self.table[items] * self.config.width**0.5 + self.positions[:length])
        index = torch.arange(length, device=items.device)
        causal = index[None, :] <= index[:, None]
        bucket = time_buckets(times) if self.config.time_bias else None
        for block in self.blocks:
            x = block(x, causal, bucket)
        return F.pad(F.normalize(x, dim=-1), (0, 0, 1, 0))

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The rows of the item table, scaled to length 1."""
        return F.normalize(self.table[items], dim=-1)


def time_buckets(times: Tensor) -> Tensor:
    """times [b,l+1] -> [b,l,l]: the bucket of (time of the request at i) - (time of event j), for query i and key j."""
    apart = (times[:, 1:, None] - times[:, None, :-1]).abs().clamp(min=1)
    return (apart.double().log() / BUCKET_WIDTH).long().clamp(max=N_BUCKETS - 1)


class _Block(nn.Module):
    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.heads, self.longest = config.heads, config.max_history
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPSILON, elementwise_affine=False)
        self.uvqk = nn.Linear(config.width, 4 * config.width, bias=False)
        nn.init.normal_(self.uvqk.weight, std=INITIAL)
        self.out = nn.Linear(config.width, config.width)
        nn.init.xavier_uniform_(self.out.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.by_distance = nn.Parameter(torch.randn(config.max_history) * INITIAL)
        self.by_time = nn.Parameter(torch.randn(N_BUCKETS) * INITIAL) if config.time_bias else None

    def forward(self, x: Tensor, causal: Tensor, bucket: Tensor | None) -> Tensor:
        u, *vqk = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        value, query, key = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in vqk)
        index = torch.arange(x.shape[1], device=x.device)
        bias = self.by_distance[(index[:, None] - index[None, :]).clamp(min=0)]  # [l,l]
        if bucket is not None and self.by_time is not None:
            bias = bias + self.by_time[bucket][:, None]  # [b,1,l,l]
        weight = F.silu(query @ key.transpose(-1, -2) + bias) / self.longest
        mixed = (weight * causal) @ value
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        return x + self.out(self.dropout(mixed * u))
