"""UniSRec (Hou et al., "Towards Universal Sequence Representation Learning for Recommender Systems", KDD 2022).

SASRec over text, with an adaptor made of several parametric whitenings that a gate mixes for each item:

    expert g:  W_g (x - b_g)                                   "parametric whitening": no covariance is computed
    gate:      softmax(x V + noise * (softplus(x U) + 0.01))   [G]; noise is standard normal, and only in training
    item:      sum over g of gate_g * expert_g

This is its inductive variant, without item ids, trained from scratch on one domain: there is no pre-training on other
domains here. The paper feeds the output of its encoder as it is; whether content is standardised first is the arm's
setting. The paper's sizes: 8 experts, width 300, 2 layers, 2 heads, dropout 0.2 in the adaptor and 0.5 in the encoder,
temperature 0.07, history of 50. The blocks are those of our SASRec, and one dropout mask serves all experts of an item.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.content.standardise import Method
from research.baselines.sasrec import SasRecConfig
from research.baselines.sasrec_text import SasRecText

# Keeps the noise of the gate from vanishing.
LEAST_NOISE = 0.01
# Standard deviation of the experts' weights at the start.
INITIAL_WEIGHT = 0.02


@dataclass(frozen=True)
class UniSRecConfig(SasRecConfig):
    """Sizes of SASRec, and the adaptor."""

    heads: int = 2
    experts: int = 8
    adaptor_dropout: float = 0.2


class MixtureAdaptor(nn.Module):
    """Content [...,C] -> item vectors [...,D]."""

    def __init__(self, content_dim: int, config: UniSRecConfig) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(config.experts, content_dim))
        self.weight = nn.Parameter(torch.randn(config.experts, config.width, content_dim) * INITIAL_WEIGHT)
        # Zeros: all experts count equally at first, and noise tells them apart.
        self.to_gate = nn.Parameter(torch.zeros(content_dim, config.experts))
        self.to_noise = nn.Parameter(torch.zeros(content_dim, config.experts))
        self.dropout = nn.Dropout(config.adaptor_dropout)

    def gate(self, content: Tensor) -> Tensor:
        """Content [...,C] -> the weights of the experts [...,G], which sum to 1; noisy in training mode."""
        logits = content @ self.to_gate
        if self.training:
            deviation = F.softplus(content @ self.to_noise) + LEAST_NOISE
            logits = logits + torch.randn_like(logits) * deviation
        return logits.softmax(dim=-1)

    def forward(self, content: Tensor) -> Tensor:
        """Content [...,C] -> item vectors [...,D]."""
        # W (x - b) = W x - W b, and the second term does not depend on the item.
        of_shift = torch.einsum("gdc,gc->gd", self.weight, self.shift)
        of_content = F.linear(self.dropout(content), self.weight.flatten(0, 1)).unflatten(-1, of_shift.shape)
        return (self.gate(content)[..., None] * (of_content - of_shift)).sum(dim=-2)


def unisrec(config: UniSRecConfig, content: Tensor, method: Method) -> SasRecText:
    """UniSRec with random weights, for content embeddings [I,C]."""
    return SasRecText(config, MixtureAdaptor(content.shape[1], config), content, method)
