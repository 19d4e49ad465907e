"""Content that goes past the transformer: whitened content embeddings beside the towers' own vectors.

Towers learn which items go together from events, and lose what content says of items with few of them: on items with
fewer than five ratings, the mean of the history's whitened content, which nobody trained, finds more (REPORT.md). So
both towers can append it to their output, with a weight w, and a score is then

    user . item = tower part + w cos(mean of the history's content, content of the item)

The map is fitted on the catalogue alone, and w is chosen on validation after training (`training.content_skip`), so the
transformer is trained as without it. In serving this is one more product for an item and a mean for a user.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.content.standardise import CHUNK, SMALLEST_VARIANCE, sample_rows, sampled_mean


class ContentSkip(nn.Module):
    """content [...,C] -> direction [...,S] of length 1. Nothing in it is trained by gradients."""

    def __init__(self, content_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(content_dim, dim).requires_grad_(False)
        # w; each side's direction is multiplied by its square root.
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, content: Tensor) -> Tensor:
        """The direction of each item's whitened content."""
        return F.normalize(self.linear(content), dim=-1)

    def joined(self, tower: Tensor, directions: Tensor) -> Tensor:
        """tower [...,E] and a sum of directions [...,S] -> [...,E+S]. A sum of none, 0, stays 0."""
        return torch.cat([tower, self.weight.sqrt() * F.normalize(directions, dim=-1)], dim=-1)


def check_dim(dim: int, content_dim: int) -> None:
    """Raises ValueError if content embeddings of `content_dim` numbers do not have `dim` components."""
    if not 0 < dim <= content_dim:
        raise ValueError(
            f"skip_dim is {dim}, but content embeddings have {content_dim} numbers: set 1 to {content_dim}, or 0"
        )


@torch.no_grad()
def fit(content: Tensor, dim: int) -> ContentSkip:
    """The skip of raw content [n,C], by principal components: the first `dim` ones, each with variance 1.

    ValueError if `dim` is larger than C. Directions of hardly any variance, which are noise of the encoder, are not
    amplified beyond `standardise.SMALLEST_VARIANCE`.
    """
    width = content.shape[1]
    check_dim(dim, width)
    sample, mean = sample_rows(len(content)), sampled_mean(content)
    squares = torch.zeros(width, width, dtype=torch.float64)
    for index in sample.split(CHUNK):
        rows = F.normalize(content[index].double() - mean, dim=-1)
        squares += rows.T @ rows
    variance, direction = torch.linalg.eigh(squares / len(sample))
    variance = variance.clamp_min(SMALLEST_VARIANCE * variance.mean())
    matrix = direction[:, -dim:] / variance[-dim:].sqrt()  # [C,S]
    skip = ContentSkip(width, dim)
    skip.linear.weight.copy_(matrix.T)
    skip.linear.bias.copy_(-mean @ matrix)
    return skip
