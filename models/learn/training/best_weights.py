"""Training that ends with the weights of its best validation, not with the last ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

from torch import nn


class BestWeights:
    """The weights of some modules at the highest figure so far; before the first, those that they have now."""

    def __init__(self, modules: Sequence[nn.Module], figure: float = -1.0) -> None:
        self.modules = modules
        # An offer has to be above this.
        self.figure = figure
        self.weights = self._current()

    def offer(self, figure: float) -> bool:
        """Takes the weights as they are now if `figure` is the highest so far; returns whether it is."""
        is_better = figure > self.figure
        if is_better:
            self.figure = figure
            self.weights = self._current()
        return is_better

    def take(self) -> None:
        """Takes the weights as they are now, for training without validation."""
        self.weights = self._current()

    def restore(self) -> None:
        """Puts the kept weights into the modules."""
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
    """Trains for these epochs, validates after each, and restores the best weights. Returns their epoch.

    `epochs` counts from 1; 0 is returned if no epoch was better than what `best` began with. With `patience`, training
    stops after so many epochs in a row without a better figure.
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
