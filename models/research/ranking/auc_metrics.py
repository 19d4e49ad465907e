"""AUC, UAUC and WUAUC, over all test events and by group, and paired intervals for their differences.

- AUC: the chance that a liked event scores above one that is not, over all pairs, ties half.
- UAUC: the mean over users of each user's own AUC; users whose events all have one label have none and are left out.
- WUAUC: the same mean, weighted by the user's number of events (the metrics of LEARN's online test, arXiv 2405.03988).

Within a group, only its events count, so a user's AUC there is over the user's events in the group.

Intervals: a bootstrap over users, because events of one user are not independent, with the same draw for both arms
(paired) and for all seeds; seeds are drawn anew too, so that a difference that hangs on one lucky seed shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learn.evaluation.auc import user_aucs, weighted_auc

METRICS = ("auc", "uauc", "wuauc")
# Bootstrap replicates whose weights are expanded to events at once.
CHUNK = 64
# Replicates for the pooled AUC, each of which is a pass over all events; metrics by user take as many as are asked for.
POOLED_DRAWS = 1000


@dataclass(frozen=True)
class HeldOut:
    """The test events, which all arms of a study share: `user` [n] indices, `label` [n] 0 or 1, training counts [n]."""

    user: np.ndarray
    label: np.ndarray
    item_train_count: np.ndarray
    user_train_count: np.ndarray


@dataclass(frozen=True)
class GroupConfig:
    """Bounds of the groups. "cold-start" lies below the first bound, "long-tail" below the second, "other" above."""

    # Training events of the item.
    item_counts: tuple[int, int] = (5, 20)
    # Shares of the users with test events, least active (by training events) first; a tie at a bound goes below it.
    user_shares: tuple[float, float] = (0.1, 0.3)


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval and two-sided p value (of the bootstrap)."""

    difference: float
    low: float
    high: float
    p: float


def groups(events: HeldOut, config: GroupConfig) -> dict[str, np.ndarray]:
    """Name -> [n] mask of the events in the group. "all" comes first."""
    users, first = np.unique(events.user, return_index=True)
    counts = events.user_train_count[first]
    bounds = [np.sort(counts)[max(0, int(np.ceil(share * len(users))) - 1)] for share in config.user_shares]
    user_level = (events.user_train_count[:, None] > np.array(bounds)[None]).sum(axis=1)
    item_level = (events.item_train_count[:, None] >= np.array(config.item_counts)[None]).sum(axis=1)
    named = {"all": np.ones(len(events.user), dtype=bool)}
    for kind, level in (("users", user_level), ("items", item_level)):
        named |= {f"{name} {kind}": level == place for place, name in enumerate(("cold-start", "long-tail", "other"))}
    return named


def measure(scores: np.ndarray, events: HeldOut, mask: np.ndarray) -> dict[str, float | int | None]:
    """All metrics within `mask`; a metric that is not defined there is None."""
    user, label, chosen = events.user[mask], events.label[mask], scores[mask]
    per_user, n_events = user_aucs(chosen, label, user, int(events.user.max()) + 1)
    known = ~np.isnan(per_user)
    auc = weighted_auc(chosen, label, np.ones((1, len(chosen))))[0] if len(chosen) else np.nan
    figures = {
        "auc": auc,
        "uauc": per_user[known].mean() if known.any() else np.nan,
        "wuauc": np.average(per_user[known], weights=n_events[known]) if known.any() else np.nan,
    }
    sizes = {"n_events": len(chosen), "n_users": int(known.sum()), "n_liked": int(label.sum())}
    return {name: None if np.isnan(value) else round(float(value), 6) for name, value in figures.items()} | sizes


def paired(
    treated: np.ndarray, control: np.ndarray, events: HeldOut, mask: np.ndarray, draws: tuple[int, int]
) -> dict[str, Interval]:
    """Intervals of treated - control, scores [seeds,n] each; `draws` = (replicates, seed of the bootstrap).

    Metrics that are not defined within `mask` are left out.
    """
    if treated.shape != control.shape:
        raise ValueError(f"arms have scores of shapes {treated.shape} and {control.shape}; pairing needs the same")
    user, label = events.user[mask], events.label[mask]
    present, user = np.unique(user, return_inverse=True)
    if not 0 < label.sum() < len(label):
        return {}
    users, seeds = _weights(len(present), len(treated), draws)
    found = {}
    for name, replicates in _replicates((treated[:, mask], control[:, mask]), label, user, users, seeds).items():
        if not np.isnan(replicates[0]):
            found[name] = _interval(replicates)
    return found


def contrast_name(group: str, other: str) -> str:
    """What a comparison of the gains in two groups is called."""
    return f"{group} − {other}"


def contrast(
    treated: np.ndarray,
    control: np.ndarray,
    events: HeldOut,
    masks: tuple[np.ndarray, np.ndarray],
    draws: tuple[int, int],
) -> Interval | None:
    """How much larger the gain in UAUC is within the first mask than within the second; arguments as in `paired`.

    Both gains meet the same draws of users and of seeds. None where one of them is not defined.
    """
    present, user = np.unique(events.user, return_inverse=True)
    n_users = len(present)
    users, seeds = _weights(n_users, len(treated), draws)
    gains = []
    for mask in masks:
        label, whose = events.label[mask], user[mask]
        auc = [np.stack([user_aucs(run[mask], label, whose, n_users)[0] for run in arm]) for arm in (treated, control)]
        gap = auc[0] - auc[1]  # [seeds,users]
        if np.isnan(gap[0]).all():
            return None
        gains.append(_over_users(gap, np.ones(n_users), users, seeds))
    return _interval(gains[0] - gains[1])


def _weights(n_users: int, n_seeds: int, draws: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw has each user [draws + 1, users], and weights of the seeds that sum to 1 [draws + 1, seeds].

    The first row is the sample itself. Weights of seeds are stretched about their mean: a draw of S out of S spreads
    by (S - 1) / S of the variance that new seeds would have, which matters for five of them.
    """
    n_draws, seed = draws
    rng = np.random.default_rng(seed)
    users = np.ones((n_draws + 1, n_users), dtype=np.uint16)
    for begin in range(1, n_draws + 1, CHUNK):
        rows = users[begin : begin + CHUNK]
        rows[:] = rng.multinomial(n_users, np.full(n_users, 1 / n_users), size=len(rows))
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_draws) / n_seeds
    stretched = 1 / n_seeds + np.sqrt(n_seeds / max(n_seeds - 1, 1)) * (seeds - 1 / n_seeds)
    return users, np.vstack([np.full(n_seeds, 1 / n_seeds), stretched])


def _replicates(arms, label, user, users, seeds) -> dict[str, np.ndarray]:
    """Differences [draws + 1] of each metric, the plain sample first; of the pooled AUC no more than `POOLED_DRAWS`."""
    n_users = users.shape[1]
    gaps = []
    pooled = np.zeros(min(len(seeds), POOLED_DRAWS + 1))
    for place, (treated, control) in enumerate(zip(*arms, strict=True)):
        with_it, n_events = user_aucs(treated, label, user, n_users)
        without, _ = user_aucs(control, label, user, n_users)
        gaps.append(with_it - without)
        drawn = users[: len(pooled)]
        change = _pooled(treated, label, user, drawn) - _pooled(control, label, user, drawn)
        # A draw of users may leave this undefined, and then no other seed is defined either.
        pooled += seeds[: len(pooled), place] * change
    gap = np.stack(gaps)  # [seeds,users]
    weights = {"uauc": np.ones(n_users), "wuauc": n_events}
    return {"auc": pooled} | {name: _over_users(gap, weight, users, seeds) for name, weight in weights.items()}


def _over_users(gap: np.ndarray, weight: np.ndarray, users: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """[draws + 1] weighted means over users of a difference [seeds,users]; users without one (NaN) are left out."""
    known = ~np.isnan(gap[0])
    found = []
    for begin in range(0, len(users), CHUNK):
        rows = slice(begin, begin + CHUNK)
        drawn = users[rows, known] * weight[known]
        mass = drawn.sum(axis=1)
        total = ((drawn @ gap[:, known].T) * seeds[rows]).sum(axis=1)
        found.append(np.where(mass > 0, total / np.maximum(mass, 1e-300), np.nan))
    return np.concatenate(found)


def _pooled(scores: np.ndarray, label: np.ndarray, user: np.ndarray, users: np.ndarray) -> np.ndarray:
    parts = [weighted_auc(scores, label, users[i : i + CHUNK][:, user]) for i in range(0, len(users), CHUNK)]
    return np.concatenate(parts)


def _interval(replicates: np.ndarray) -> Interval:
    """Percentile interval; p is twice the smaller tail, each with one added so that it is never 0."""
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Interval(float(replicates[0]), float(low), float(high), float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1))))
