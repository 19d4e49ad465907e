"""What every retrieval model of the harness looks like from outside: users and items as vectors, scored by dot product.

Trainer, evaluation and study know this class and nothing of what is inside. Items are catalogue indices, so a model may
look them up in an embedding table, in a table of content embeddings, or in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.content.standardise import Method, fit
from learn.models.pch import Pch, PchConfig

Ids = Literal["none", "tied", "separate"]


class Recommender(nn.Module, ABC):
    """A sequence model over a catalogue of I items.

    `items` [b,l] are catalogue indices, oldest first, padded on the right. `times` [b,l+1] are the seconds at which
    those events happened and, last, the moment of each request; models that know no time ignore it.
    """

    # Whether the state before the first event was trained, so that a user without history can be served.
    has_start: ClassVar[bool] = False
    max_history: int
    # A dataclass; of every model that is trained.
    config: Any

    @abstractmethod
    def states(self, items: Tensor, times: Tensor) -> Tensor:
        """[b,l] -> [b,l+1,E]: state j has read the first j events and asks for the next."""

    @abstractmethod
    def item_embeddings(self, items: Tensor) -> Tensor:
        """[n] -> [n,E], each item by itself, as it is served."""

    def target_keys(self, items: Tensor, times: Tensor) -> Tensor:
        """[b,t] -> [b,t,E]: a user's targets as the alignment loss sees them; each by itself unless a model differs."""
        return self.item_embeddings(items.flatten()).unflatten(0, items.shape)

    def last(self, items: Tensor, times: Tensor, length: Tensor) -> Tensor:
        """The state after the last of `length` [b] real events, [b,E]."""
        states = self.states(items, times)
        at = length[:, None, None].expand(-1, 1, states.shape[-1])
        return states.gather(1, at).squeeze(1)

    def settings(self) -> dict[str, Any]:
        """What it does beyond its weights and buffers, fit for JSON: models alike in all of these are the same."""
        return asdict(self.config)

    def finish(self) -> None:
        """Called once after training, for what training holds apart and serving wants folded in."""


class Learn(Recommender):
    """LEARN: PCH over frozen content embeddings, in two towers that share their weights.

    With `ids`, every item also has free vectors that no text determines, added where the item enters the tower and to
    its item embedding. The paper has no such thing, so results of it are labelled LEARN+ID.
    """

    has_start = True

    def __init__(self, pch: Pch, content: Tensor, method: Method = "scale", ids: Ids = "none") -> None:
        super().__init__()
        self.pch, self.config, self.max_history = pch, pch.config, pch.config.max_history
        self.standardisation = fit(content, method)
        self.register_buffer("content", self.standardisation.apply(content), persistent=False)
        self.ids = None if ids == "none" else IdTables(len(content), pch.config, ids)

    def states(self, items: Tensor, times: Tensor) -> Tensor:
        """As above; `times` is not read."""
        return self.pch.states_of(self._entered(items))

    def item_embeddings(self, items: Tensor) -> Tensor:
        """Variants 1 and 2 put each item through PCH by itself; variant 3 takes its content embedding as it is."""
        if self.pch.config.item_tower == "content":
            return F.normalize(self.content[items], dim=-1)
        raw = self.pch.alone_raw(self._entered(items))
        return self.pch.output(raw if self.ids is None else raw + self.ids.leaving(items))

    def target_keys(self, items: Tensor, times: Tensor) -> Tensor:
        """Variant 1 reads the whole target sequence causally, the others each item by itself."""
        if self.pch.config.item_tower == "sequence":
            return self.states(items, times)[:, 1:]
        return super().target_keys(items, times)

    def last(self, items: Tensor, times: Tensor, length: Tensor) -> Tensor:
        """As served: the last layer is computed at the last item alone."""
        mask = (torch.arange(items.shape[1], device=items.device)[None] < length[:, None]).long()
        return self.pch.last_of(self._entered(items), mask)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Takes over the weights of towers that read raw content, such as another run's `finish` left."""
        self.pch.load_state_dict(weights)
        self.standardisation.unfold_from(self.pch.adaptor[0])

    def finish(self) -> None:
        """Gives back towers that take raw content, as served. The recommender itself is used up by this."""
        self.standardisation.fold_into(self.pch.adaptor[0])
        del self.content

    def _entered(self, items: Tensor) -> Tensor:
        x = self.pch.adapt(self.content[items])
        return x if self.ids is None else x + self.ids.entering(items)


class IdTables(nn.Module):
    """Free vectors of every item, for both ends of a tower.

    "tied": one vector for both, as in SASRec, so both ends have to be of one width. "separate": one each; they begin so
    small that text speaks first, and items that are never trained on keep what text says.
    """

    def __init__(self, n_items: int, config: PchConfig, ids: Ids) -> None:
        super().__init__()
        if ids == "tied" and config.width != config.out_dim:
            sizes = f"width {config.width}, out_dim {config.out_dim}"
            raise ValueError(f"tied ids need towers as wide as their output, got {sizes}")
        self.scale = config.width**0.5 if ids == "tied" else 1.0
        self.first = nn.Parameter(torch.randn(n_items, config.width) * 0.02)
        self.second = None if ids == "tied" else nn.Parameter(torch.randn(n_items, config.out_dim) * 0.02)

    def entering(self, items: Tensor) -> Tensor:
        """[...] -> [...,D]."""
        return self.first[items] * self.scale

    def leaving(self, items: Tensor) -> Tensor:
        """[...] -> [...,E]."""
        return self.entering(items) if self.second is None else self.second[items]


class IdTowers(Recommender):
    """Our own towers over free item vectors in place of content: what is left of LEARN when the text is taken away."""

    has_start = True

    def __init__(self, pch: Pch, n_items: int) -> None:
        super().__init__()
        self.pch, self.config, self.max_history = pch, pch.config, pch.config.max_history
        # No text enters, so what would read it is no part of the model.
        self.pch.adaptor = nn.Identity()
        self.ids = IdTables(n_items, pch.config, "tied")

    def states(self, items: Tensor, times: Tensor) -> Tensor:
        """As above; `times` is not read."""
        return self.pch.states_of(self.ids.entering(items))

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The table itself: an id needs no tower to become an item embedding."""
        return self.pch.output(self.ids.leaving(items))


class ContentMean(Recommender):
    """No alignment at all: the mean of the history's content embeddings against each item's own. Nothing is trained."""

    def __init__(self, content: Tensor, max_history: int) -> None:
        super().__init__()
        self.max_history = max_history
        # Every prompt opens with the same words; without their common mean, cosines would tell little.
        self.register_buffer("content", F.normalize(content - content.mean(dim=0), dim=-1), persistent=False)

    def states(self, items: Tensor, times: Tensor) -> Tensor:
        """The mean of the first j content embeddings; zeros before the first."""
        total = self.content[items].cumsum(dim=1)
        return F.normalize(F.pad(total, (0, 0, 1, 0)), dim=-1)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The content embedding itself."""
        return self.content[items]
