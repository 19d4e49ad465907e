"""The CVR auxiliary task: user and item embedding -> mid-emb -> probability of a conversion.

    user [b,E] -> linear -> [b,F], gathered by row -> [n,F]
    item [n,E] -> linear ----------------------------> [n,F]
    their sum, and the product terms -> GELU -> linear -> GELU = mid_emb [n,M] -> linear -> logit [n]

The two linear maps and the sum are one linear layer over the pair, split so that the user's part is computed once per
user instead of once per candidate. The ranking model uses mid_emb, the vector before the output layer.

A layer over the pair can only add what it knows of the user to what it knows of the item, up to its GELU. Two terms,
each optional, let it see how well both match; they are added to the sum:

    product   sigmoid(linear(user)) * linear(user), gathered by row, times linear(item) -> [n,F], entry by entry
    dot       the dot product of user and item [n,1], the score of retrieval, times a learned vector -> [n,F]

The gate of the product, a number per user and entry, says which products matter for the user. It depends on the user
alone, so it costs nothing per candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CvrConfig:
    """Sizes and parts of the head. The defaults are those of the shipped bundle."""

    in_dim: int = 64
    fuse_dim: int = 128
    mid_dim: int = 64
    # The gated product of projections of user and item, entry by entry.
    product: bool = False
    # The dot product of user and item embedding.
    dot: bool = False
    # Of the hidden layers, in training.
    dropout: float = 0.0
    # A second output from mid_emb, whether the item is clicked, for training alone (`CvrHead.outcome`).
    click: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected 0 or more and less than 1")


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
        self.product = GatedProduct(config) if config.product else None
        # Starts at 0: the head then starts as one without it.
        self.dot = nn.Parameter(torch.zeros(config.fuse_dim)) if config.dot else None
        self.dropout = nn.Dropout(config.dropout)
        self.click = nn.Linear(config.mid_dim, 1) if config.click else None

    def forward(self, user: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Scores each item for the user at index `row` of `user`; shapes as above."""
        fused = self.fuse_user(user).index_select(0, row) + self.fuse_item(item)  # [n,F]
        if self.product is not None:
            fused = fused + self.product(user, item, row)
        if self.dot is not None:
            score = (user.index_select(0, row) * item).sum(dim=-1, keepdim=True)  # [n,1]
            fused = fused + score * self.dot
        mid_emb = F.gelu(self.mid(self.dropout(F.gelu(fused))))
        return mid_emb, self.out(self.dropout(mid_emb)).squeeze(-1)

    def outcome(self, user: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logit [n] of what training labels and, if the head knows clicks, that of a click [n].

        Without clicks, a conversion is labelled. With them, it is a click and a conversion, whose probability is the
        product of both (ESMM): so the probability of a conversion after a click is learned from all items that were
        shown, and not only from those that were clicked.
        """
        mid_emb, logit = self(user, item, row)
        if self.click is None:
            return logit, None
        click = self.click(self.dropout(mid_emb)).squeeze(-1)
        # log p and log(1 - p) of the product p; the clamp keeps the second one finite.
        log_p = (F.logsigmoid(click) + F.logsigmoid(logit)).clamp(max=-1e-6)
        return log_p - torch.log(-torch.expm1(log_p)), click


class GatedProduct(nn.Module):
    """user [b,E], item [n,E], row [n] -> [n,F]."""

    def __init__(self, config: CvrConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.in_dim, config.fuse_dim)
        self.user = nn.Linear(config.in_dim, config.fuse_dim, bias=False)
        self.item = nn.Linear(config.in_dim, config.fuse_dim, bias=False)

    def forward(self, user: Tensor, item: Tensor, row: Tensor) -> Tensor:
        """The products of each item with the user at index `row`."""
        gated = self.gate(user).sigmoid() * self.user(user)  # [b,F]
        return gated.index_select(0, row) * self.item(item)
