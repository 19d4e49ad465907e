"""SASRec over text: its encoder reads adapted content embeddings in place of rows of an item table.

    content [C] -> adaptor -> item vector [D]; item vectors -> SASRec's encoder -> states [D]

The same item vector is read in a history and scaled to length 1 as the item's embedding, so an item that training never
met is recommended like any other. Nothing is learned per item. LEARN differs from this in its item tower, in which an
item goes through the transformer, too.

As in the SASRec of RecBole, on which UniSRec and other text baselines are built, a layer norm follows the sum of item
vector and position: the length of an adapted embedding is arbitrary, unlike that of a row of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from learn.content.content_table import GatheredContent, standardised
from learn.content.standardise import Method, fit
from learn.models.recommender import Recommender
from research.baselines.sasrec import SasRecConfig, SasRecEncoder


@dataclass(frozen=True)
class SasRecTextConfig(SasRecConfig):
    """Sizes of SASRec, and the adaptor: one linear map, or an MLP as that of the towers of LEARN."""

    adaptor: Literal["mlp", "linear"] = "mlp"
    adaptor_hidden: int = 1024


class SasRecText(Recommender):
    """Frozen content embeddings -> adaptor -> SASRec's encoder."""

    content: Tensor | GatheredContent

    def __init__(self, config: SasRecConfig, adaptor: nn.Module, content: Tensor, method: Method) -> None:
        super().__init__()
        self.config, self.max_history = config, config.max_history
        table = standardised(content, fit(content, method))
        if isinstance(table, Tensor):
            self.register_buffer("content", table, persistent=False)
        else:
            self.content = table
        self.adaptor = adaptor
        self.encoder = SasRecEncoder(config, nn.LayerNorm(config.width))

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state at each event; state 0 is zero, as in SASRec. `times` is not read."""
        return self.encoder(self.adaptor(self.content[items]))

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The adapted content, scaled to length 1."""
        return F.normalize(self.adaptor(self.content[items]), dim=-1)

    def settings(self) -> dict[str, Any]:
        """Also names the content by its digest where it is too large for a buffer; see `Recommender.settings`."""
        found = super().settings()
        return found | {"content": self.content.digest()} if isinstance(self.content, GatheredContent) else found


def sasrec_text(config: SasRecTextConfig, content: Tensor, method: Method) -> SasRecText:
    """SASRec over text with random weights."""
    return SasRecText(config, _adaptor(config, content.shape[1]), content, method)


def _adaptor(config: SasRecTextConfig, content_dim: int) -> nn.Module:
    if config.adaptor == "linear":
        return nn.Linear(content_dim, config.width)
    first, second = nn.Linear(content_dim, config.adaptor_hidden), nn.Linear(config.adaptor_hidden, config.width)
    return nn.Sequential(first, nn.GELU(), second)
