"""Negatives for the click task: a log of events does not say which other items a user was shown.

They are drawn in proportion to how often items occur in training. So an item's popularity says nothing of the label,
and a head has to learn which items go with which user.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from learn.data import Dataset, Split
from learn.evaluation.full_ranking import popularity
from learn.training.cvr_events import Window

# Items that the user has met are drawn again, this often; then the rest is drawn from the items that are left.
TRIES = 4


@dataclass(frozen=True)
class Catalogue:
    """The items that may be drawn, those with training events, and the probability of each."""

    item: np.ndarray
    probability: np.ndarray


def catalogue(dataset: Dataset, split: Split) -> Catalogue:
    """What negatives are drawn from."""
    counts = popularity(dataset, split).astype(np.float64)
    item = np.flatnonzero(counts)
    return Catalogue(item, counts[item] / counts.sum())


def with_negatives(
    found: list[Window], met: list[np.ndarray], items: Catalogue, n_negatives: int, rng: np.random.Generator
) -> list[Window]:
    """The same windows with `n_negatives` more events after each of theirs, of items that the user has not met.

    `met` has the catalogue indices of the items that the window's user has met, one array per window. Rows are numbered
    anew: those of an event and its negatives follow each other.
    """
    extended = []
    for window, known in zip(found, met, strict=True):
        drawn = _draw(rng, items, known, len(window.item) * n_negatives).reshape(-1, n_negatives)
        item = np.concatenate([window.item[:, None], drawn], axis=1)
        label = np.zeros(item.shape, np.float32)
        label[:, 0] = 1.0
        row = window.row[:, None] * (1 + n_negatives) + np.arange(1 + n_negatives)
        state = np.repeat(window.state, 1 + n_negatives)
        label, item, row = label.ravel(), item.ravel(), row.ravel()
        extended.append(replace(window, state=state, item=item, label=label, value=label, click=label, row=row))
    return extended


def _draw(rng: np.random.Generator, items: Catalogue, known: np.ndarray, n: int) -> np.ndarray:
    drawn = rng.choice(items.item, size=n, p=items.probability)
    for _ in range(TRIES):
        again = np.flatnonzero(np.isin(drawn, known))
        if not len(again):
            return drawn
        drawn[again] = rng.choice(items.item, size=len(again), p=items.probability)
    is_left = ~np.isin(items.item, known)
    again = np.flatnonzero(np.isin(drawn, known))
    # A user who has met every item keeps what was drawn.
    if len(again) and is_left.any():
        probability = items.probability[is_left] / items.probability[is_left].sum()
        drawn[again] = rng.choice(items.item[is_left], size=len(again), p=probability)
    return drawn
