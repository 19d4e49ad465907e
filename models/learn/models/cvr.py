"""The CVR auxiliary task: user and item embedding -> mid-emb -> probability of a conversion.

    user [b,E] -> linear -> [b,F], gathered by row -> [n,F]
    item [n,E] -> linear ----------------------------> [n,F]
    their sum -> GELU -> linear -> GELU = mid_emb [n,M] -> linear -> logit [n]

The two linear maps and the sum are one linear layer over the pair, split so that the user's part is computed once per
user instead of once per candidate. The ranking model uses mid_emb, the vector before the output layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CvrConfig:
    """Sizes of the head. The defaults are those of the shipped bundle."""

    in_dim: int = 64
    fuse_dim: int = 128
    mid_dim: int = 64


class CvrHead(nn.Module):
    """user [b,E], item [n,E], row [n] -> mid_emb [n,M], logit [n]."""

    def __init__(self, config: CvrConfig) -> None:
        super().__init__()
        self.config = config
        self.fuse_user = nn.Linear(config.in_dim, config.fuse_dim)
        # No bias: the two parts are added, and the user's part has one.
        self.fuse_item = nn.Linear(config.in_dim, config.fuse_dim, bias=False)
        self.mid = nn.Linear(config.fuse_dim, config.mid_dim)
        self.out = nn.Linear(config.mid_dim, 1)

    def forward(self, user: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Scores each item for the user at index `row` of `user`; shapes as above."""
        fused = F.gelu(self.fuse_user(user).index_select(0, row) + self.fuse_item(item))  # [n,F]
        mid_emb = F.gelu(self.mid(fused))
        return mid_emb, self.out(mid_emb).squeeze(-1)
