"""Two baselines that are computed and not trained: EASE and ItemKNN. Both are a matrix between items.

    score of item j for a user = sum over the user's items i of weight[i,j]

A history counts as a set: neither order nor repetitions matter, and all events before the one to be predicted are read,
however many. `weight` comes from training events alone.

- EASE (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019): the regression of each item on all
  others. With the Gram matrix G = X^T X of the users' training sets, P = (G + l2 I)^-1 and B_ij = -P_ij / P_jj off the
  diagonal. The diagonal of B is 0, so an item does not predict itself.
- ItemKNN: cosine of two items' users, for the k most similar items of each target. `shrink` is added to the
  denominator, so that a cosine of few users counts less (as in Ferrari Dacrema et al., RecSys 2019).

Each has a grid in place of sizes. `fit_best` tries all of it on validation and returns what it saw.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from learn.data import Dataset, Event, Split
from learn.evaluation.full_ranking import full_ranking, metrics
from learn.evaluation.metrics import Ranking
from learn.training.run_length import FIGURE


@dataclass(frozen=True)
class EaseConfig:
    """The values of the regularisation `l2` that are tried, in this order."""

    l2: tuple[float, ...] = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)

    def __post_init__(self) -> None:
        _check_grid("l2", self.l2, 1e-3)


@dataclass(frozen=True)
class ItemKnnConfig:
    """The values that are tried: each number of `neighbours` with each `shrink`, the latter changing faster."""

    neighbours: tuple[int, ...] = (100, 300, 1000)
    shrink: tuple[float, ...] = (10.0, 100.0, 1000.0)

    def __post_init__(self) -> None:
        _check_grid("neighbours", self.neighbours, 1)
        _check_grid("shrink", self.shrink, 0)


def _check_grid(name: str, values: tuple[float, ...], least: float) -> None:
    if not values or min(values) < least:
        raise ValueError(f"{name} is {list(values)}; expected at least one value, and none below {least}")


@dataclass(frozen=True)
class Trial:
    """One point of a grid: its settings, the metrics on validation, and the seconds for both."""

    settings: dict[str, float]
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """The weights [I,I] that are best on validation, the trials that led to them, and the index of the best one."""

    weight: Tensor
    trials: list[Trial]
    best: int

    def rank(self, dataset: Dataset, events: list[Event]) -> Ranking:
        """Ranks the whole catalogue for each event."""
        return rank(self.weight, dataset, events)


def fit_best(config: EaseConfig | ItemKnnConfig, dataset: Dataset, split: Split) -> Fitted:
    """Fits every point of the grid and keeps the one with the best NDCG@10 on validation; of equal ones, the first.

    Up to five matrices of I x I numbers of 4 bytes are in memory: 1.9 GB for 9,742 items. Without validation events
    there is nothing to choose by, and a grid of more than one point is a ValueError.
    """
    points = _points(config)
    if not split.validation and len(points) > 1:
        raise ValueError(f"no validation event to choose one of {len(points)} settings by; hold some out, or give one")
    gram = gram_matrix(dataset, split)
    trials: list[Trial] = []
    kept, best = None, 0
    for settings, weights_of in points:
        begin = time.monotonic()
        weight = weights_of(gram)
        found = metrics(rank(weight, dataset, split.validation).rank) if split.validation else {}
        trials.append(Trial(settings, found, round(time.monotonic() - begin, 1)))
        if kept is None or found[FIGURE] > trials[best].metrics[FIGURE]:
            kept, best = weight, len(trials) - 1
    assert kept is not None, "a grid is never empty"
    return Fitted(kept, trials, best)


def _points(config: EaseConfig | ItemKnnConfig) -> list[tuple[dict[str, float], Callable[[Tensor], Tensor]]]:
    if isinstance(config, EaseConfig):
        return [({"l2": l2}, lambda gram, l2=l2: ease_weights(gram, l2)) for l2 in config.l2]
    return [
        ({"neighbours": k, "shrink": shrink}, lambda gram, k=k, shrink=shrink: knn_weights(gram, k, shrink))
        for k, shrink in product(config.neighbours, config.shrink)
    ]


def gram_matrix(dataset: Dataset, split: Split) -> Tensor:
    """[I,I]: in how many users' training events both items occur; on the diagonal, the users of each item."""
    n_items = len(dataset.item_ids)
    gram = np.zeros((n_items, n_items), dtype=np.float32)
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        items = np.unique(sequence.items[:n_train])
        gram[np.ix_(items, items)] += 1.0
    return torch.from_numpy(gram)


def ease_weights(gram: Tensor, l2: float) -> Tensor:
    """B [I,I] of EASE for this Gram matrix."""
    # Items without a training event are apart from all others: their rows and columns of B are zero.
    met = torch.nonzero(gram.diagonal() > 0).squeeze(1)
    weight = gram[met[:, None], met]
    weight.diagonal().add_(l2)
    weight = torch.cholesky_inverse(torch.linalg.cholesky(weight))
    weight /= -weight.diagonal().clone()
    weight.fill_diagonal_(0.0)
    whole = torch.zeros_like(gram)
    whole[met[:, None], met] = weight
    return whole


def knn_weights(gram: Tensor, neighbours: int, shrink: float) -> Tensor:
    """[I,I]: column j has the shrunk cosines of the `neighbours` items that are most similar to j, and zeros."""
    norm = gram.diagonal().sqrt()
    cosine = gram / (norm[:, None] * norm + shrink).clamp_min(1e-9)
    cosine.fill_diagonal_(0.0)
    # The matrix is symmetric, so its rows can be searched, which are contiguous.
    value, index = cosine.topk(min(neighbours, len(cosine)), dim=1)
    return torch.zeros_like(cosine).scatter_(1, index, value).T.contiguous()


def rank(weight: Tensor, dataset: Dataset, events: list[Event]) -> Ranking:
    """Ranks by weights [I,I], some events at a time."""
    table = weight.numpy()

    def score(rows: slice) -> np.ndarray:
        found = np.empty((len(events[rows]), len(table)), dtype=np.float32)
        for row, event in enumerate(events[rows]):
            history = np.unique(dataset.sequences[event.user].items[: event.position])
            table[history].sum(axis=0, out=found[row])
        return found

    return full_ranking(dataset, events, score)
