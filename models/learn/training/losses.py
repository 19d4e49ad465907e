"""What the towers are asked to do. Both losses are means over positive pairs, in nats.

- `catalogue_softmax`: predict the item among (a sample of) the catalogue, each item standing alone as in serving.
- `alignment`: LEARN's own (arXiv 2405.03988), dense all-action as in PinnerFormer (KDD 2022): states of a user's
  history against that user's targets, targets of other users as negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def inclusion_log_probability(frequency: Tensor, n_draws: int, n_uniform: int, n_pool: int) -> Tensor:
    """[n] log of the chance that an item is a candidate, which it is by either of two ways.

    It is a target of one of `n_draws` events drawn by `frequency` [n], or one of `n_uniform` drawn uniformly from a
    pool of `n_pool` items: 1 - (1 - f)^n_draws (1 - 1/n_pool)^n_uniform. Only for items of the pool. Draws are taken as
    independent; events of one batch are not quite.
    """
    by_draws = torch.special.xlog1py(n_draws, -frequency.double())
    log_absent = by_draws + torch.special.xlog1py(n_uniform, torch.tensor(-1.0 / n_pool).to(by_draws))
    return torch.log(-torch.expm1(log_absent)).float()


def catalogue_softmax(
    query: Tensor, candidate: Tensor, target: Tensor, log_inclusion: Tensor, scale: float, *, reduction: str = "mean"
) -> Tensor:
    """Cross entropy over the whole catalogue, estimated from a sample of it.

    query [q,E], candidate [c,E] (distinct items), target [q] (which candidate is right), log_inclusion [c]. Each
    candidate stands for 1 / P(it was sampled) items in the sum under the softmax, so its logit grows by -log P
    (Horvitz and Thompson 1952; logQ correction in Bengio and Senecal 2008). The right one is always there: no growth.
    With every item a candidate, log_inclusion = 0 and this is the full softmax.
    """
    # In fp32 whatever the towers run in: a cosine times 20 in bf16 would be off by up to .08.
    with torch.autocast(query.device.type, enabled=False):
        logits = torch.addmm(-log_inclusion, query.float(), candidate.float().T, alpha=scale)  # [q,c]
        own = torch.zeros_like(logits).scatter_(1, target[:, None], log_inclusion[target][:, None])
        return F.cross_entropy(logits + own, target, reduction=reduction)


@dataclass(frozen=True)
class Targets:
    """What histories are aligned with.

    key [b,t,E] of items [b,t] (catalogue indices), the log of how often each is drawn as a target [b,t] (zeros: no logQ
    correction), and which entries are `present` [b,t] and no padding.
    """

    key: Tensor
    item: Tensor
    log_frequency: Tensor
    present: Tensor


def alignment(query: Tensor, targets: Targets, scale: float, own: slice | None = None) -> Tensor:
    """InfoNCE with negatives from the batch and logQ correction (Yi et al., RecSys 2019).

    query [q,h,E]: states of the histories of users `own`, a range of the batch's b users (all of them by default). One
    term for each pair (state, target) of a user; its negatives are the targets of other users, except those that are
    also targets of this user. Other positives of the same user are not negatives. Returns the sum of these users' terms
    over the number of terms of the whole batch, so that the parts of several ranges add up to the mean.
    """
    n_users, t = targets.item.shape
    own = slice(0, n_users) if own is None else own
    q, h, _ = query.shape
    item, present = targets.item, targets.present
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("qhe,cte->qhct", query.float(), targets.key.float())
    logits = scale * scores - targets.log_frequency  # [q,h,b,t]
    mine = item[own][:, None, None, :]
    same_item = (mine == item[None, :, :, None]) & present[own][:, None, None, :]  # [q,b,t,own t]
    clash = same_item.any(dim=-1)  # [q,b,t]: item (c,t) is among the user's own targets; true for themselves
    negative = present[None] & ~clash
    # The log of the sum over negatives is shared by all positives of a state.
    masked = logits.masked_fill(~negative[:, None], float("-inf")).reshape(q, h, n_users * t)
    # A finite floor keeps the gradient defined when a batch offers no negative at all.
    log_negative = torch.logsumexp(masked.clamp_min(-1e9), dim=-1)[:, :, None]  # [q,h,1]
    row = torch.arange(q, device=query.device)
    positive = logits[row, :, row + own.start]  # [q,h,t]
    loss = torch.logaddexp(positive, log_negative) - positive
    weight = present[own][:, None, :].expand(q, h, t).to(loss.dtype)
    return (loss * weight).sum() / (present.sum() * h).clamp(min=1)
