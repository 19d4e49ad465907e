"""The losses of towers and head. All are means over positive pairs, in nats.

- `catalogue_softmax` predicts an item among the catalogue or a sample of it, each item embedded alone as in serving.
- `within_user` puts the better events of a user above the others, for the CVR head.
- `alignment` is LEARN's loss (arXiv 2405.03988), dense all-action as in PinnerFormer (KDD 2022). It compares states of
  a user's history with that user's targets; the targets of other users are the negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def inclusion_log_probability(frequency: Tensor, n_draws: Tensor, n_uniform: int, n_pool: int) -> Tensor:
    """[b,n] log of the probability that an item is a candidate.

    An item is a candidate if it is the target of one of `n_draws` [b] events, drawn by `frequency` [n], or one of
    `n_uniform` items drawn uniformly from a pool of `n_pool`. So the probability is
    1 - (1 - f)^n_draws (1 - 1/n_pool)^n_uniform, for items of the pool. The formula takes all draws as independent,
    which is not quite true of the events of one batch.
    """
    by_draws = n_draws[:, None] * torch.log1p(-frequency.double())
    log_absent = by_draws + torch.special.xlog1py(n_uniform, torch.tensor(-1.0 / n_pool).to(by_draws))
    return torch.log(-torch.expm1(log_absent)).float()


@dataclass(frozen=True)
class Questions:
    """What a batch asks: states [q,E], the user of each (a row of `Candidates.log_inclusion`) and its target [q].

    A target is the index of the correct candidate.
    """

    state: Tensor
    user: Tensor
    target: Tensor


@dataclass(frozen=True)
class Candidates:
    """Distinct items: embeddings [c,E], and [b,c] the log of the probability that each is in the sample of a user.

    The probability is that of a batch in which the user is known to be. inf: the item is no negative of this user.
    """

    embedding: Tensor
    log_inclusion: Tensor


def catalogue_softmax(asked: Questions, candidates: Candidates, scale: float, *, reduction: str = "mean") -> Tensor:
    """Cross entropy over the whole catalogue, estimated from a sample.

    Each candidate represents 1 / P(it is in the sample) items in the denominator of the softmax, so -log P is added to
    its logit (Horvitz and Thompson 1952; logQ correction in Bengio and Senecal 2008). The correct candidate is always
    in the sample, so nothing is added to its logit, whatever log_inclusion says. If all items are candidates and
    log_inclusion is 0, this is the full softmax.
    """
    # In fp32, whatever the precision of the towers: in bf16 a cosine times 20 would be off by up to .08.
    with torch.autocast(asked.state.device.type, enabled=False):
        logits = (-candidates.log_inclusion)[asked.user]  # [q,c]
        logits.scatter_(1, asked.target[:, None], 0.0)
        # In place, because these logits are the largest tensor of a step.
        logits.addmm_(asked.state.float(), candidates.embedding.float().T, alpha=scale)
        return F.cross_entropy(logits, asked.target, reduction=reduction)


@dataclass(frozen=True)
class Targets:
    """The targets of each user in the batch.

    key [b,t,E]: their embeddings. item [b,t]: their catalogue indices. log_frequency [b,t]: the log of how often each
    item is drawn as a target; zeros switch the logQ correction off. present [b,t]: False for padding.
    """

    key: Tensor
    item: Tensor
    log_frequency: Tensor
    present: Tensor


def alignment(query: Tensor, targets: Targets, scale: float, own: slice | None = None) -> Tensor:
    """InfoNCE with negatives from the batch and logQ correction (Yi et al., RecSys 2019).

    query [q,h,E] has the states of the histories of the users in `own`, a range of the batch's b users (by default all
    of them). There is one term per pair of a state and a target of the same user. Its negatives are the targets of
    other users, except items that are also targets of this user. Returns the sum of these users' terms divided by the
    number of terms of the whole batch, so that the results for several ranges add up to the mean.
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
    clash = same_item.any(dim=-1)  # [q,b,t]: item (c,t) is one of the user's own targets
    negative = present[None] & ~clash
    # The log of the sum over negatives is shared by all positives of a state.
    masked = logits.masked_fill(~negative[:, None], float("-inf")).reshape(q, h, n_users * t)
    # A finite floor keeps the gradient defined if the batch has no negative at all.
    log_negative = torch.logsumexp(masked.clamp_min(-1e9), dim=-1)[:, :, None]  # [q,h,1]
    row = torch.arange(q, device=query.device)
    positive = logits[row, :, row + own.start]  # [q,h,t]
    loss = torch.logaddexp(positive, log_negative) - positive
    weight = present[own][:, None, :].expand(q, h, t).to(loss.dtype)
    return (loss * weight).sum() / (present.sum() * h).clamp(min=1)


def within_user(logit: Tensor, preference: Tensor, owner: Tensor) -> Tensor:
    """Mean of softplus(logit_j - logit_i) over pairs of one user's events where i is preferred to j; 0 without pairs.

    All inputs are [n]: `preference` is a label or a value, the higher the better, and `owner` the event's user. This is
    the pairwise logistic loss (RankNet, Burges et al. 2005), taken within users and added to the pointwise loss
    ("combined-pair", Li et al., KDD 2015). Knowing how much a user likes in general does not lower it, so the head must
    learn which items go with which user.
    """
    pair = (owner[:, None] == owner[None]) & (preference[:, None] > preference[None])  # [n,n]
    gap = (logit[None] - logit[:, None])[pair]
    return F.softplus(gap).mean() if len(gap) else logit.sum() * 0.0
