"""Towers and CVR head as the server runs them: modules with exactly the ports that the bundle format names.

Both towers begin with the same adaptor. The item tower returns its output beside the item embedding, the server caches
both, and the user tower reads histories from it.

The golden vectors of a bundle are computed by these modules (for the encoder, by `learn.content.encoder_graph`).
`tower_export` writes the same functions as ONNX, and tests compare both with the golden vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learn.models.cvr import CvrHead
from learn.models.pch import Pch, centred


class UserTowerGraph(nn.Module):
    """adapted [b,l,D+S], mask [b,l], and for towers with actions action [b,l] -> user [b,E]."""

    def __init__(self, pch: Pch) -> None:
        super().__init__()
        self.pch = pch

    def forward(self, adapted: Tensor, mask: Tensor, action: Tensor | None = None) -> Tensor:
        """The user embedding: the state after the newest item of each history."""
        return self.pch.last_from_adapted(adapted, mask, action)


class ItemTowerGraph(nn.Module):
    """content [n,C] -> item [n,E], adapted [n,D+S]."""

    def __init__(self, pch: Pch) -> None:
        super().__init__()
        self.pch = pch

    def forward(self, content: Tensor) -> tuple[Tensor, Tensor]:
        """The item embedding, of each item alone; and what the user tower reads of the item.

        The latter is the adaptor's output without its mean, which every LayerNorm of the user tower would subtract,
        and the direction of the content skip, if the towers have one.
        """
        adapted, width = self.pch.adapt(content), self.pch.config.width
        read, directions = adapted[:, :width], adapted[:, width:]
        return self.pch.alone_from_adapted(adapted), torch.cat([centred(read), directions], dim=-1)


class CvrGraph(nn.Module):
    """user [b,E], item [n,E], row [n] (the user of each item) -> mid_emb [n,M], cvr [n]."""

    def __init__(self, head: CvrHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, user: Tensor, item: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The middle vector of the head, and the probability of a conversion."""
        mid_emb, logit = self.head(user, item, row)
        return mid_emb, logit.sigmoid()
