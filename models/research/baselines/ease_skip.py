"""EASE's weights past the transformer: factors of items that go together, beside the vectors of a trained model.

Towers of a few hundred numbers do not keep which pairs of items go together. EASE does, in a matrix between all items
(`item_to_item`), and two factors of it of S numbers an item are vectors like any other. So a model can append them to
its own, with a weight w, as the content skip does, and a score is then

    user . item = score of the model + w cos(sum of the history's first factors, second factor of the item)

Both factors have the square root of each singular value. Nothing is trained; w is the one of `WEIGHTS` with the highest
NDCG@10 over all validation events. Histories are those of the model, so of a longer one EASE reads the newest events.

For studies only: an item without training events has no factors, and what is served is LEARN over text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from learn.data import Dataset, Split
from learn.models.recommender import Recommender
from learn.training.content_skip import Tried, try_weights
from research.baselines.item_to_item import EaseConfig, fit_best

WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
# The middle of EASE's own grid, because every run of a model tries it again.
GRID = EaseConfig(l2=(30.0, 100.0, 300.0))


@dataclass(frozen=True)
class Attached:
    """The model with its factors, and every weight that was tried."""

    model: EaseSkip
    tried: list[Tried]

    @property
    def taken(self) -> Tried:
        """The weight that the model has."""
        return best_of(self.tried)


class EaseSkip(Recommender):
    """`inner` with factors of EASE: `first` [I,S] for histories, and `second` [I,S] for items."""

    def __init__(self, inner: Recommender, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.inner, self.max_history, self.config = inner, inner.max_history, inner.config
        device = next(inner.parameters()).device
        self.register_buffer("first", first.to(device), persistent=False)
        self.register_buffer("second", F.normalize(second, dim=-1).to(device), persistent=False)
        self.weight = 1.0

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """The states of the model, each with the direction of what it has read; 0 where it has read nothing."""
        read = F.pad(self.first[items].cumsum(dim=1), (0, 0, 1, 0))
        return self._joined(self.inner.states(items, times, actions), read)

    def last(self, items: Tensor, times: Tensor, length: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state after the last event of each user."""
        real = torch.arange(items.shape[1], device=items.device)[None] < length[:, None]
        read = (self.first[items] * real[..., None]).sum(dim=1)
        return self._joined(self.inner.last(items, times, length, actions), read)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The item embeddings of the model, each with the direction of its factor."""
        return torch.cat([self.inner.item_embeddings(items), self.second[items]], dim=-1)

    def _joined(self, states: Tensor, read: Tensor) -> Tensor:
        return torch.cat([states, self.weight * F.normalize(read, dim=-1)], dim=-1)


def attach(model: Recommender, dim: int, dataset: Dataset, split: Split) -> Attached:
    """The trained model with `dim` numbers of EASE, whose regularisation is chosen on validation, too.

    ValueError if the catalogue has fewer than `dim` items, or if no events are held out for validation.
    """
    n_items = len(dataset.item_ids)
    if not 0 < dim <= n_items:
        raise ValueError(f"ease_dim is {dim}, but the matrix of EASE has {n_items} rows: set 1 to {n_items}, or 0")
    if not split.validation:
        raise ValueError("ease_dim needs validation events, on which its weight is chosen; hold some out, or set 0")
    skip = EaseSkip(model, *factors(fit_best(GRID, dataset, split).weight, dim))
    tried = try_weights(skip, dim, WEIGHTS, dataset, split)
    skip.weight = best_of(tried).weight
    return Attached(skip, tried)


def best_of(tried: list[Tried]) -> Tried:
    """The weight with the highest NDCG@10 over all validation events; of equal ones, the smallest."""
    return max(tried, key=lambda one: (one.all, -one.weight))


@torch.no_grad()
def factors(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weights [I,I] -> `first` and `second` [I,S], whose product is the best approximation of rank S."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # The decomposition begins with random directions.
        left, values, right = torch.svd_lowrank(weight, q=min(len(weight), dim + 32), niter=4)
    root = values[:dim].sqrt()
    return left[:, :dim] * root, right[:, :dim] * root
