"""What the ranking models of a study have in common: what they read, and what a trained one offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """user [n] and item [n] rows of the id tables, numeric [n,F], extra [n,X], label [n]."""

    user: Tensor
    item: Tensor
    numeric: Tensor
    extra: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: Tensor) -> Inputs:
        """The inputs of these rows."""
        return Inputs(self.user[rows], self.item[rows], self.numeric[rows], self.extra[rows], self.label[rows])


@dataclass(frozen=True)
class Widths:
    """Sizes that depend on the data."""

    users: int
    items: int
    numeric: int
    extra: int = 0


@dataclass(frozen=True)
class Fitted:
    """The best of an arm's trials: its hyperparameters, with what they reached on validation, and how it scores [n]."""

    chosen: dict[str, float]
    scores: Callable[[Inputs], np.ndarray]


class RankingModel(Protocol):
    """A kind of ranking model, with its sizes and its grid of trials; a dataclass, so that a record can hold them."""

    # Part of the names of results.
    name: ClassVar[str]

    def start(self, train: Inputs, validation: Inputs, widths: Widths, seed: int) -> Any:
        """Trains the model without extra features that every arm starts from."""

    def fit(self, start: Any, train: Inputs, validation: Inputs, seed: int) -> Fitted:
        """Trains one arm further from the starting point: every trial, of which the best on validation is returned."""
