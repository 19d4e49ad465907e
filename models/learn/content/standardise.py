"""Standardises content embeddings, so that a first layer can learn from them.

Every prompt begins with the same words, so content embeddings point in nearly the same direction; and as their length
is 1, their entries are near C ** -0.5. Both leave the first layer little signal. The remedy is one affine map. It is
fitted on the catalogue alone, without any events, applied to the table before training and folded into the weights of
the first layer after it, so it costs nothing in serving.

A table that takes at most `IN_MEMORY_BYTES` in fp32 is used whole. For a larger one, the map is fitted on a sample of
rows, piece by piece, and `content_table` applies it to the rows that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Method = Literal["none", "scale", "whiten"]
# Directions with less than this share of the mean variance are noise of the encoder, which whitening would amplify.
SMALLEST_VARIANCE = 1e-3
# A table of up to this size, in fp32, is kept standardised in memory: 699,050 items of 384 numbers.
IN_MEMORY_BYTES = 1 << 30
# The rows that the map of a larger table is fitted on. The standard error of a mean is then 0.2 % of the deviation.
SAMPLE_ROWS = 200_000
# Rows handled at once.
CHUNK = 1 << 14


def fits_in_memory(content: Tensor) -> bool:
    """Whether a table of this shape may be kept in fp32, whatever its own dtype."""
    return content.numel() * 4 <= IN_MEMORY_BYTES


@dataclass(frozen=True)
class Standardisation:
    """The map x -> (x - mean) @ matrix, for mean [C] and matrix [C,C].

    `scale` [C] is the diagonal of a matrix that has nothing beside it, so that a row costs C products and not C * C.
    """

    mean: Tensor
    matrix: Tensor
    scale: Tensor | None = None

    def apply(self, content: Tensor) -> Tensor:
        """Maps content embeddings [n,C] -> fp32 [n,C], piece by piece, so that only the result is as large as they."""
        mapped = torch.empty(content.shape, dtype=torch.float32)
        for begin in range(0, len(content), CHUNK):
            rows = slice(begin, begin + CHUNK)
            mapped[rows] = self.map_rows(content[rows])
        return mapped

    def map_rows(self, rows: Tensor) -> Tensor:
        """Maps a few content embeddings [...,C], of any dtype, at once."""
        centred = rows.float() - self.mean
        return centred @ self.matrix if self.scale is None else centred * self.scale

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
    as covariance, rotated back to the original axes (ZCA). A table that is too large for memory is sampled.
    """
    if method == "none":
        return _diagonal(torch.zeros(content.shape[1]), torch.ones(content.shape[1]))
    if not fits_in_memory(content):
        return _fit_on_sample(content, method)
    content = content.float()
    mean = content.mean(dim=0)
    if method == "scale":
        return _diagonal(mean, 1.0 / content.std(dim=0).clamp_min(1e-6))
    return _whitening(mean, torch.cov(content.T.double()))


def _diagonal(mean: Tensor, scale: Tensor) -> Standardisation:
    return Standardisation(mean, torch.diag(scale), scale)


def _whitening(mean: Tensor, covariance: Tensor) -> Standardisation:
    variance, direction = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(SMALLEST_VARIANCE * variance.mean())
    return Standardisation(mean, (direction @ torch.diag(variance.rsqrt()) @ direction.T).float())


def _fit_on_sample(content: Tensor, method: Method) -> Standardisation:
    """Two passes over the sample, with sums in fp64: the mean, and then squares around it, which lose no digits."""
    sample = sample_rows(len(content))
    mean = sampled_mean(content)
    squares = torch.zeros(content.shape[1] if method == "scale" else (content.shape[1],) * 2, dtype=torch.float64)
    for index in sample.split(CHUNK):
        centred = content[index].double() - mean
        squares += centred.square().sum(dim=0) if method == "scale" else centred.T @ centred
    covariance = squares / (len(sample) - 1)
    if method == "scale":
        return _diagonal(mean.float(), 1.0 / covariance.sqrt().float().clamp_min(1e-6))
    return _whitening(mean.float(), covariance)


def sample_rows(n_rows: int) -> Tensor:
    """The rows that stand for a large table: at most `SAMPLE_ROWS`, always the same ones, in rising order."""
    if n_rows <= SAMPLE_ROWS:
        return torch.arange(n_rows)
    return torch.from_numpy(np.sort(np.random.default_rng(0).choice(n_rows, SAMPLE_ROWS, replace=False)))


def sampled_mean(content: Tensor) -> Tensor:
    """[C] fp64: the mean of `sample_rows`."""
    sample, total = sample_rows(len(content)), torch.zeros(content.shape[1], dtype=torch.float64)
    for index in sample.split(CHUNK):
        total += content[index].double().sum(dim=0)
    return total / len(sample)
