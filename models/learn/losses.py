"""What the towers are asked to do. Both losses are means over positive pairs, in nats.

- `catalogue_softmax`: predict the item among (a sample of) the catalogue, each item standing alone as in serving.
- `alignment`: LEARN's own (arXiv 2405.03988), dense all-action as in PinnerFormer (KDD 2022): states of a user's
  history against that user's targets, targets of other users as negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inclusion_log_probability(frequency: Tensor, n_draws: int, n_uniform: int) -> Tensor:
    """[I] log of the chance that an item is a candidate, which it is by either of two ways.

    It is a target of one of `n_draws` events drawn by `frequency` [I], or one of `n_uniform` drawn uniformly:
    1 - (1 - f)^n_draws (1 - 1/I)^n_uniform. Draws are taken as independent; events of one batch are not quite.
    """
    n_items = len(frequency)
    log_absent = n_draws * torch.log1p(-frequency.double()) + n_uniform * torch.log1p(
        torch.tensor(-1.0 / n_items, dtype=torch.float64)
    )
    return torch.log(-torch.expm1(log_absent)).float()


def catalogue_softmax(query: Tensor, candidate: Tensor, target: Tensor, log_inclusion: Tensor, scale: float) -> Tensor:
    """Cross entropy over the whole catalogue, estimated from a sample of it.

    query [q,E], candidate [c,E] (distinct items), target [q] (which candidate is right), log_inclusion [c]. Each
    candidate stands for 1 / P(it was sampled) items in the sum under the softmax, so its logit grows by -log P
    (Horvitz and Thompson 1952; logQ correction in Bengio and Senecal 2008). The right one is always there: no growth.
    With every item a candidate, log_inclusion = 0 and this is the full softmax.
    """
    logits = scale * query @ candidate.T - log_inclusion  # [q,c]
    own = F.one_hot(target, candidate.shape[0]).to(logits.dtype) * log_inclusion
    return F.cross_entropy(logits + own, target)


def alignment(query: Tensor, key: Tensor, item: Tensor, log_frequency: Tensor, present: Tensor, scale: float) -> Tensor:
    """InfoNCE with negatives from the batch and logQ correction (Yi et al., RecSys 2019).

    query [b,h,E]: states of each history. key [b,t,E]: its targets, of which `item` [b,t] are the catalogue indices,
    `present` [b,t] tells real ones from padding, and `log_frequency` [b,t] is the log of how often that item is drawn
    as a target. One term for each pair (state, target) of a user; its negatives are the targets of other users, except
    those that are also targets of this user. Other positives of the same user are not negatives.
    """
    b, h, _ = query.shape
    t = key.shape[1]
    logits = scale * torch.einsum("bhe,cte->bhct", query, key) - log_frequency  # [b,h,b,t]
    same_item = (item[:, None, None, :] == item[None, :, :, None]) & present[:, None, None, :]  # [b,c,t,own t]
    clash = same_item.any(dim=-1)  # [b,c,t]: item (c,t) is among b's own targets; true for c = b where present
    negative = present[None] & ~clash
    # The log of the sum over negatives is shared by all positives of a state.
    masked = logits.masked_fill(~negative[:, None], float("-inf")).reshape(b, h, b * t)
    # A finite floor keeps the gradient defined when a batch offers no negative at all.
    log_negative = torch.logsumexp(masked.clamp_min(-1e9), dim=-1)[:, :, None]  # [b,h,1]
    index = torch.arange(b, device=query.device)
    positive = logits[index, :, index]  # [b,h,t]
    loss = torch.logaddexp(positive, log_negative) - positive
    weight = present[:, None, :].expand(b, h, t).to(loss.dtype)
    return (loss * weight).sum() / weight.sum().clamp(min=1.0)
