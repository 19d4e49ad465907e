from __future__ import annotations

import itertools

import torch
from torch import nn

from learn.training.best_weights import BestWeights, train_epochs


def train_with_figures(figures: list[float], patience: int | None = None, first: float = -1.0):
    """Trains one weight that counts epochs; `figures` are the figures on validation, one per epoch.

    Returns the weight, the epoch that `train_epochs` returned, the best figure and the number of epochs not trained.
    """
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)

    def train_epoch() -> None:
        with torch.no_grad():
            module.weight += 1

    best, remaining = BestWeights([module], first), iter(figures)
    epoch = train_epochs(best, range(1, len(figures) + 1), train_epoch, lambda: next(remaining), patience)
    return module.weight.item(), epoch, best.figure, len(list(remaining))


def test_the_weights_of_the_best_epoch_are_restored_and_the_earlier_one_wins_a_tie():
    assert train_with_figures([0.1, 0.5, 0.5, 0.2]) == (2.0, 2, 0.5, 0)


def test_training_that_never_improves_restores_the_initial_weights():
    assert train_with_figures([0.1, 0.2], first=0.3) == (0.0, 0, 0.3, 0)


def test_patience_counts_epochs_since_the_best_one():
    n_left = [train_with_figures([0.1, 0.5, 0.4, 0.4, 0.6], patience)[3] for patience in (1, 2, 3)]
    assert n_left == [2, 1, 0]


def test_without_validation_the_last_weights_are_kept():
    module = nn.Linear(1, 1, bias=False)
    best = BestWeights([module])
    for value in itertools.islice(itertools.count(1.0), 3):
        nn.init.constant_(module.weight, value)
        best.take()
    nn.init.zeros_(module.weight)
    best.restore()
    assert module.weight.item() == 3.0
