"""Towers and CVR head as the server runs them: modules with exactly the ports that the bundle format names.

The golden vectors of a bundle are computed by these modules (for the encoder, by `learn.content.encoder_graph`).
`tower_export` writes the same functions as ONNX, and tests compare both with the golden vectors.
"""

from __future__ import annotations

from torch import Tensor, nn

from learn.models.cvr import CvrHead
from learn.models.pch import Pch


class UserTowerGraph(nn.Module):
    """content [b,l,C], mask [b,l] -> user [b,E]."""

    def __init__(self, pch: Pch) -> None:
        super().__init__()
        self.pch = pch

    def forward(self, content: Tensor, mask: Tensor) -> Tensor:
        """The user embedding: the state after the newest item of each history."""
        return self.pch.last(content, mask)


class ItemTowerGraph(nn.Module):
    """content [n,C] -> item [n,E]."""

    def __init__(self, pch: Pch) -> None:
        super().__init__()
        self.pch = pch

    def forward(self, content: Tensor) -> Tensor:
        """The item embedding: PCH on each item alone."""
        return self.pch.alone(content)


class CvrGraph(nn.Module):
    """user [b,E], item [n,E], row [n] (the user of each item) -> mid_emb [n,M], cvr [n]."""

    def __init__(self, head: CvrHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, user: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The middle vector of the head, and the probability of a conversion."""
        mid_emb, logit = self.head(user, item, row)
        return mid_emb, logit.sigmoid()
