"""Adds a content skip to trained towers, with the weight that is best on validation (`models.content_skip`).

How strongly a score follows content trades popular items for rare ones, so the choice is a rule, fixed before any test
figure was seen: among the weights that cost at most a hundredth of the towers' own NDCG@10 over all validation events,
which is less than two checks of one run differ by, the one with the highest NDCG@10 on events whose item has fewer than
five training events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from learn.data import Dataset, Split, sample_events
from learn.evaluation.full_ranking import popularity, ranks_by_weight
from learn.evaluation.metrics import event_values
from learn.evaluation.retrieval import item_table, user_states
from learn.models import content_skip
from learn.models.recommender import Learn, Recommender
from learn.training.run_length import FIGURE

WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)
HARMLESS = 0.99
# An item with fewer training events is rare.
FEW = 5
# The most validation events that are ranked for each weight; of more, always the same sample.
MOST_EVENTS = 50_000


@dataclass(frozen=True)
class Tried:
    """A weight and its NDCG@10 on validation: over all events, and on those of rare items (None if there are none)."""

    weight: float
    all: float
    few: float | None


def check(dim: int, content_dim: int, split: Split) -> None:
    """Raises ValueError for a skip that cannot be attached, so that a run can fail before it trains; `dim` may be 0."""
    if not dim:
        return
    content_skip.check_dim(dim, content_dim)
    if not split.validation:
        raise ValueError(
            f"pch.skip_dim is {dim}, but no events are held out for validation, on which the weight of the skip is "
            "chosen: hold some out (split.n_validation, or time_split), or set pch.skip_dim = 0"
        )


def attach(model: Learn, content: Tensor, dim: int, dataset: Dataset, split: Split) -> list[Tried]:
    """Attaches a skip of `dim` components of raw content [I,C] to trained towers; returns what was tried.

    Raises ValueError without validation events, as nothing could choose the weight, and for a wrong `dim`.
    """
    check(dim, content.shape[1], split)
    skip = content_skip.fit(content, dim)
    # With the weight 1, the last `dim` numbers of each embedding are the directions themselves.
    skip.weight.fill_(1.0)
    model.attach(skip)
    tried = try_weights(model, dim, WEIGHTS, dataset, split)
    skip.weight.fill_(chosen(tried).weight)
    return tried


def try_weights(model: Recommender, dim: int, weights: Sequence[float], dataset: Dataset, split: Split) -> list[Tried]:
    """Ranks validation with each weight of the last `dim` numbers of the model's embeddings, which has them with 1."""
    validation = sample_events(split.validation, MOST_EVENTS, seed=0)
    users, items = user_states(model, dataset, validation), item_table(model, len(dataset.item_ids))
    target = np.array([dataset.sequences[event.user].items[event.position] for event in validation])
    is_few = popularity(dataset, split)[target] < FEW
    towers, others = (
        (users[:, part].numpy(), items[:, part].numpy()) for part in (slice(None, -dim), slice(-dim, None))
    )
    tried = []
    for weight, rank in zip(weights, ranks_by_weight(towers, others, weights, dataset, validation), strict=True):
        values = event_values(rank, FIGURE)
        tried.append(Tried(weight, float(values.mean()), float(values[is_few].mean()) if is_few.any() else None))
    return tried


def table(tried: list[Tried]) -> str:
    """What was tried, one line for each weight, and which one was taken."""
    lines = ["weight of the content skip    NDCG@10 on validation    on items with fewer than five events"]
    for one in tried:
        few = "-" if one.few is None else f"{one.few:.4f}"
        lines.append(f"{one.weight:26.2f}    {one.all:21.4f}    {few}{'  <- taken' if one is chosen(tried) else ''}")
    return "\n".join(lines)


def chosen(tried: list[Tried]) -> Tried:
    """The weight of the rule at the head of this file; `tried` begins with the weight 0."""
    harmless = [one for one in tried if one.all >= HARMLESS * tried[0].all]
    return max(harmless, key=lambda one: one.all if one.few is None else one.few)
