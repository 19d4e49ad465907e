"""Standardises content embeddings, so that a first layer can learn from them.

Every prompt begins with the same words, so content embeddings point in nearly the same direction; and as their length
is 1, their entries are near C ** -0.5. Both leave the first layer little signal. The remedy is one affine map. It is
fitted on the catalogue alone, without any events, applied to the table before training and folded into the weights of
the first layer after it, so it costs nothing in serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Method = Literal["none", "scale", "whiten"]
# Directions with less than this share of the mean variance are noise of the encoder, which whitening would amplify.
SMALLEST_VARIANCE = 1e-3


@dataclass(frozen=True)
class Standardisation:
    """The map x -> (x - mean) @ matrix, for mean [C] and matrix [C,C]."""

    mean: Tensor
    matrix: Tensor

    def apply(self, content: Tensor) -> Tensor:
        """Maps content embeddings [n,C] -> [n,C]."""
        return (content - self.mean) @ self.matrix

    @torch.no_grad()
    def fold_into(self, layer: nn.Linear) -> None:
        """Changes a layer that was trained on mapped content, in place, to take raw content: W M^T (x - mean) + b."""
        layer.weight.copy_(layer.weight @ self.matrix.T)
        layer.bias.sub_(layer.weight @ self.mean)

    @torch.no_grad()
    def unfold_from(self, layer: nn.Linear) -> None:
        """Undoes `fold_into`: changes a layer that takes raw content, in place, to take mapped content."""
        layer.bias.add_(layer.weight @ self.mean)
        layer.weight.copy_(torch.linalg.solve(self.matrix, layer.weight.T).T)


def fit(content: Tensor, method: Method) -> Standardisation:
    """Fits the map on the content embeddings of a catalogue, [n,C].

    "none" changes nothing, "scale" gives every entry mean 0 and variance 1, and "whiten" gives mean 0 and the identity
    as covariance, rotated back to the original axes (ZCA).
    """
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
