"""Keeps the weights with the best validation result, so that training ends with them and not with the last ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import nn


class BestWeights:
    """The weights of `modules` at the highest figure so far; before the first figure, their current weights."""

    def __init__(self, modules: Sequence[nn.Module], figure: float = -1.0) -> None:
        self.modules = modules
        # Weights are kept only if their figure is above this.
        self.figure = figure
        self.weights = self._current()

    def offer(self, figure: float) -> bool:
        """Keeps the current weights if `figure` is the highest so far; returns whether it is."""
        is_better = figure > self.figure
        if is_better:
            self.figure = figure
            self.weights = self._current()
        return is_better

    def take(self) -> None:
        """Keeps the current weights; for training without validation."""
        self.weights = self._current()

    def restore(self) -> None:
        """Loads the kept weights into the modules."""
        for module, weights in zip(self.modules, self.weights, strict=True):
            module.load_state_dict(weights)

    def _current(self) -> list[dict]:
        return [copy.deepcopy(module.state_dict()) for module in self.modules]


def train_epochs(
    best: BestWeights,
    epochs: Iterable[int],
    train_epoch: Callable[[], None],
    validate: Callable[[], float],
    patience: int | None = None,
) -> int:
    """Trains for `epochs`, validates after each one, and restores the best weights. Returns their epoch.

    `epochs` counts from 1; 0 is returned if no epoch was better than the initial figure of `best`. With `patience`,
    training stops after that many epochs in a row without a better figure.
    """
    best_epoch = 0
    for epoch in epochs:
        train_epoch()
        if best.offer(validate()):
            best_epoch = epoch
        elif patience is not None and epoch - best_epoch >= patience:
            break
    best.restore()
    return best_epoch
