"""Metrics of a full ranking, computed from the ranks with numpy alone.

Each prediction has one correct item; `rank` counts from 1:

    hr_at_k       1 if rank <= k                     hit rate; the mean over events
    ndcg_at_k     1 / log2(1 + rank) if rank <= k    Jarvelin and Kekalainen 2002; the ideal ranking earns 1
    mrr_at_k      1 / rank if rank <= k              `mrr` without a cut-off
    recall_at_k   hits as in hr_at_k              the mean over users of each user's share of hits

Recall over events would equal the hit rate. Over users it differs as soon as some users have more test events than
others, for example within a group of events. LEARN (arXiv 2405.03988) reports both H@100 and R@100 without a definition
in the sources at hand, so this reading is ours.

`_by_user` behind the name of a metric, as in `ndcg_at_10_by_user`, makes it a mean over users, too: of each user's own
mean. Where a few users have most of the events, the mean over events is mostly about these users.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

CUTOFFS = (10, 50, 100, 200)
BY_USER = "_by_user"
NAMES = ("mrr", *(f"{kind}_at_{k}" for kind in ("hr", "ndcg", "mrr", "recall") for k in CUTOFFS))
# The number of items of each user's list that count for head share and coverage.
TOP = 10
# Buckets by the number of training events of the target, bounds included. 0 is a new item.
ITEM_BUCKETS = {"0": (0, 0), "1-4": (1, 4), "5-19": (5, 19), "20-99": (20, 99), "100+": (100, np.inf)}
# Buckets by the number of training events of the user.
USER_BUCKETS = {"0-19": (0, 19), "20-49": (20, 49), "50-199": (50, 199), "200+": (200, np.inf)}
FEW = "item 0-4"
NEW = "item 0"


@dataclass(frozen=True)
class Ranking:
    """The result for each event: `rank` int64 [e], from 1; `top` int64 [e,k], the k best items in no particular order.

    A row with fewer than k ranked items is filled up with -1.
    """

    rank: np.ndarray
    top: np.ndarray


def rank_scores(scores: np.ndarray, target: np.ndarray, seen: list[np.ndarray], k: int = TOP) -> Ranking:
    """Ranks scores [e,I] for target [e]. `seen` has the indices that are not ranked, one array per row.

    The rank is 1 + the number of other items whose score is at least as high: ties count against the model.
    Raises ValueError if a score is not a number, or a target is not ranked.
    """
    scores = scores.copy()
    for row, indices in enumerate(seen):
        scores[row, indices] = -np.inf
    own = scores[np.arange(len(target)), target][:, None]
    if not np.isfinite(own).all():
        raise ValueError("a target is among the items that are not ranked, or its score is not finite")
    if np.isnan(scores).any():
        # NaN compares false with everything, so such an item would count as ranked below the target.
        raise ValueError("the score of an item is not finite: NaN")
    k = min(k, scores.shape[1])
    top = np.argpartition(scores, -k, axis=1)[:, -k:]
    top = np.where(np.isneginf(np.take_along_axis(scores, top, axis=1)), -1, top)
    # The target counts itself, so no 1 is added.
    return Ranking((scores >= own).sum(axis=1), top)


def event_values(rank: np.ndarray, metric: str) -> np.ndarray:
    """[e] the contribution of each event. Recall has the same values as the hit rate; only its mean differs.

    The same holds for a metric by user.
    """
    name = metric.removesuffix(BY_USER)
    if name == "mrr":
        return 1.0 / rank
    parts = re.fullmatch(r"(hr|recall|ndcg|mrr)_at_([1-9]\d*)", name)
    if not parts:
        raise ValueError(f"unknown metric {metric!r}; known are {', '.join(NAMES)} and the same at other cut-offs")
    kind, k = parts[1], int(parts[2])
    gain = {"hr": np.ones(len(rank)), "ndcg": 1.0 / np.log2(1.0 + rank), "mrr": 1.0 / rank}
    return np.where(rank <= k, gain["hr" if kind == "recall" else kind], 0.0)


def is_over_users(metric: str) -> bool:
    """Whether the metric is a mean over users with equal weights, and not over events."""
    return metric.startswith("recall_at_") or metric.endswith(BY_USER)


def figures(rank: np.ndarray, user: np.ndarray) -> dict[str, float]:
    """All metrics of `NAMES` for events with these ranks [e] and users [e] (any ids), with the counts of both.

    Empty if there are no events.
    """
    if not len(rank):
        return {}
    index = np.unique(user, return_inverse=True)[1]
    n_of_user = np.bincount(index)
    found = {}
    for name in NAMES:
        values = event_values(rank, name)
        if is_over_users(name):
            values = np.bincount(index, weights=values) / n_of_user
        found[name] = float(values.mean())
    return found | {"n_events": len(rank), "n_users": len(n_of_user)}


def groups(item_count: np.ndarray, user_count: np.ndarray) -> dict[str, np.ndarray]:
    """Masks [e] by name: all events, the buckets by the target's training events [e], and those by the user's [e].

    Each event is in one item bucket and in one user bucket. "item 0-4" is the union of the first two item buckets.
    """
    found = {"all": np.ones(len(item_count), dtype=bool)}
    found |= {f"item {name}": _within(item_count, bounds) for name, bounds in ITEM_BUCKETS.items()}
    found[FEW] = item_count < 5
    return found | {f"user {name}": _within(user_count, bounds) for name, bounds in USER_BUCKETS.items()}


def _within(count: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    return (count >= bounds[0]) & (count <= bounds[1])


def grouped(rank: np.ndarray, user: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The `figures` of each group that has events."""
    return {name: figures(rank[mask], user[mask]) for name, mask in masks.items() if mask.any()}


def top_figures(top: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Head share and coverage of the lists top [e,k] (-1 = no item), given training counts [I].

    Head share is the share of all recommendations that go to the most popular 1 % (5 %) of the catalogue, at least one
    item; equally popular items are ordered by index. Coverage is the share of the catalogue that is in at least one
    list.
    """
    k, given = top.shape[1], top[top >= 0]
    if not len(given):
        raise ValueError(f"no item is recommended in {len(top)} lists")
    by_count = np.argsort(-counts, kind="stable")
    found = {}
    for name, share in (("head_share", 0.01), ("head_5_percent_share", 0.05)):
        head = by_count[: max(1, int(np.ceil(share * len(counts))))]
        found[f"{name}_at_{k}"] = float(np.isin(given, head).mean())
    found[f"coverage_at_{k}"] = len(np.unique(given)) / len(counts)
    return found
