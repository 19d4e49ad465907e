"""Content embeddings -> inputs that a first layer can learn from.

Every prompt opens with the same words, so content embeddings share most of their direction, and being of length 1
their entries are near C ** -0.5. Both starve the first layer of signal. What is done about it is one affine map, fitted
on the catalogue without looking at any behaviour, applied to the table before training and folded into the first
layer's weights after it: serving pays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Method = Literal["none", "scale", "whiten"]
# Directions with less than this share of the mean variance are noise of the encoder; whitening would blow them up.
SMALLEST_VARIANCE = 1e-3


@dataclass(frozen=True)
class Standardisation:
    """x -> (x - mean) @ matrix, for mean [C] and matrix [C,C]."""

    mean: Tensor
    matrix: Tensor

    def apply(self, content: Tensor) -> Tensor:
        """[n,C] -> [n,C]."""
        return (content - self.mean) @ self.matrix

    @torch.no_grad()
    def fold_into(self, layer: nn.Linear) -> None:
        """Makes a layer that was trained behind this map take raw content: W M^T (x - mean) + b, exactly."""
        layer.weight.copy_(layer.weight @ self.matrix.T)
        layer.bias.sub_(layer.weight @ self.mean)

    @torch.no_grad()
    def unfold_from(self, layer: nn.Linear) -> None:
        """Undoes `fold_into`: a layer that takes raw content will give the same behind this map."""
        layer.bias.add_(layer.weight @ self.mean)
        layer.weight.copy_(torch.linalg.solve(self.matrix, layer.weight.T).T)


def fit(content: Tensor, method: Method) -> Standardisation:
    """From a catalogue [n,C]: nothing, mean 0 and variance 1 an entry, or (whiten) covariance 1, rotated back (ZCA)."""
    dim = content.shape[1]
    if method == "none":
        return Standardisation(torch.zeros(dim), torch.eye(dim))
    mean = content.mean(dim=0)
    if method == "scale":
        return Standardisation(mean, torch.diag(1.0 / content.std(dim=0).clamp_min(1e-6)))
    covariance = torch.cov(content.T.double())
    variance, direction = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(SMALLEST_VARIANCE * variance.mean())
    return Standardisation(mean, (direction @ torch.diag(variance.rsqrt()) @ direction.T).float())
