"""AUC, UAUC and WUAUC over all test events and by group, and paired intervals for the gain of one arm over another.

- AUC: the probability that a liked event scores above one that is not liked; a tie counts as half.
- UAUC: the mean over users of each user's own AUC. Users whose events all have the same label have no AUC and are left
  out.
- WUAUC: the same mean, weighted by the user's number of events (the metrics of LEARN's online test, arXiv 2405.03988).

Within a group only the group's events count, so a user's AUC is over the user's events in the group. Only the order of
scores matters: callers may pass scores or their ranks.

Intervals come from `research.bootstrap`: users and seeds are drawn, and both arms are measured on the same draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from learn.evaluation.auc import user_aucs, weighted_auc
from research.bootstrap import BootstrapConfig, Draws, Estimate, draw_users_and_seeds, percentile_interval, two_sided_p

METRICS = ("auc", "uauc", "wuauc")
# Replicates whose weights are expanded to events at once.
CHUNK = 64
# The most replicates for the pooled AUC, each of which is a pass over all events. The other metrics use all replicates.
POOLED_DRAWS = 1000


@dataclass(frozen=True)
class HeldOut:
    """The test events that all arms of a study share: `user` [n] indices, `label` [n] 0 or 1, training counts [n]."""

    user: np.ndarray
    label: np.ndarray
    item_train_count: np.ndarray
    user_train_count: np.ndarray


@dataclass(frozen=True)
class GroupConfig:
    """Bounds of the groups: "cold-start" below the first bound, "long-tail" below the second, "other" above both."""

    # Training events of the item.
    item_counts: tuple[int, int] = (5, 20)
    # Shares of the users with test events, by number of training events, fewest first. Ties go to the lower group.
    user_shares: tuple[float, float] = (0.1, 0.3)


def groups(events: HeldOut, config: GroupConfig) -> dict[str, np.ndarray]:
    """Group name -> [n] mask of its events. "all" comes first."""
    users, first = np.unique(events.user, return_index=True)
    counts = events.user_train_count[first]
    bounds = [np.sort(counts)[max(0, int(np.ceil(share * len(users))) - 1)] for share in config.user_shares]
    user_level = (events.user_train_count[:, None] > np.array(bounds)[None]).sum(axis=1)
    item_level = (events.item_train_count[:, None] >= np.array(config.item_counts)[None]).sum(axis=1)
    named = {"all": np.ones(len(events.user), dtype=bool)}
    for kind, level in (("users", user_level), ("items", item_level)):
        named |= {f"{name} {kind}": level == place for place, name in enumerate(("cold-start", "long-tail", "other"))}
    return named


@dataclass(frozen=True)
class AucFigures:
    """The metrics of one run within a group of events; None where a metric is not defined there.

    `n_users` counts the users that have events of both labels in the group.
    """

    auc: float | None
    uauc: float | None
    wuauc: float | None
    n_events: int
    n_users: int


def measure(scores: np.ndarray, events: HeldOut, mask: np.ndarray) -> AucFigures:
    """All metrics within `mask`."""
    user, label, chosen = events.user[mask], events.label[mask], scores[mask]
    per_user, n_events = user_aucs(chosen, label, user, int(events.user.max()) + 1)
    known = ~np.isnan(per_user)
    auc = weighted_auc(chosen, label, np.ones((1, len(chosen))))[0] if len(chosen) else np.nan
    uauc = per_user[known].mean() if known.any() else np.nan
    wuauc = np.average(per_user[known], weights=n_events[known]) if known.any() else np.nan
    return AucFigures(_rounded(auc), _rounded(uauc), _rounded(wuauc), len(chosen), int(known.sum()))


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


@dataclass(frozen=True)
class ArmPair:
    """Scores [seeds,n] of an arm and of the control, row by row of the same seeds."""

    arm: np.ndarray
    control: np.ndarray

    def __post_init__(self) -> None:
        if self.arm.shape != self.control.shape:
            raise ValueError(
                f"arms have scores of shapes {self.arm.shape} and {self.control.shape}; pairing needs the same"
            )


def gains(pair: ArmPair, events: HeldOut, mask: np.ndarray, config: BootstrapConfig) -> dict[str, Estimate]:
    """Metric -> how far the arm is ahead of the control within `mask`.

    Metrics that are not defined there are left out.
    """
    user, label = events.user[mask], events.label[mask]
    present, user = np.unique(user, return_inverse=True)
    if not 0 < label.sum() < len(label):
        return {}
    draws = draw_users_and_seeds(len(present), len(pair.arm), config)
    within = ArmPair(pair.arm[:, mask], pair.control[:, mask])
    n_users = measure(pair.arm[0], events, mask).n_users
    estimates = {}
    for metric, replicates in _replicates(within, label, user, draws).items():
        if not np.isnan(replicates[0]):
            estimates[metric] = _estimate(replicates, len(label), n_users, len(pair.arm), config)
    return estimates


def contrast_name(group: str, other_group: str) -> str:
    """The name of a comparison of the gains in two groups."""
    return f"{group} − {other_group}"


def contrast(
    pair: ArmPair, events: HeldOut, masks: tuple[np.ndarray, np.ndarray], config: BootstrapConfig
) -> Estimate | None:
    """By how much the gain in UAUC within the first mask exceeds that within the second, from the same draws.

    None if one of the two gains is not defined. Sizes of the estimate are the smaller ones of the two groups.
    """
    present, user = np.unique(events.user, return_inverse=True)
    n_users = len(present)
    draws = draw_users_and_seeds(n_users, len(pair.arm), config)
    gains_of_mask = []
    for mask in masks:
        label, users = events.label[mask], user[mask]
        arm, control = (
            np.stack([user_aucs(run[mask], label, users, n_users)[0] for run in runs])
            for runs in (pair.arm, pair.control)
        )
        gain = arm - control  # [seeds,users]
        if np.isnan(gain[0]).all():
            return None
        gains_of_mask.append(_mean_over_users(gain, np.ones(n_users), draws))
    measured = [measure(pair.arm[0], events, mask) for mask in masks]
    n_events, n_users = min(part.n_events for part in measured), min(part.n_users for part in measured)
    return _estimate(gains_of_mask[0] - gains_of_mask[1], n_events, n_users, len(pair.arm), config)


def _replicates(pair: ArmPair, label: np.ndarray, user: np.ndarray, draws: Draws) -> dict[str, np.ndarray]:
    """Metric -> gains [r+1], the sample first; at most `POOLED_DRAWS` replicates of the pooled AUC."""
    n_users = draws.users.shape[1]
    user_gains = []
    pooled = np.zeros(min(len(draws.seeds), POOLED_DRAWS + 1))
    for row, (arm, control) in enumerate(zip(pair.arm, pair.control, strict=True)):
        arm_aucs, n_events = user_aucs(arm, label, user, n_users)
        control_aucs, _ = user_aucs(control, label, user, n_users)
        user_gains.append(arm_aucs - control_aucs)
        users = draws.users[: len(pooled)]
        change = _pooled(arm, label, user, users) - _pooled(control, label, user, users)
        # A draw of users can leave this undefined, and then it is undefined for every seed.
        pooled += draws.seeds[: len(pooled), row] * change
    gain = np.stack(user_gains)  # [seeds,users]
    uauc, wuauc = (_mean_over_users(gain, weight, draws) for weight in (np.ones(n_users), n_events))
    return {"auc": pooled, "uauc": uauc, "wuauc": wuauc}


def _mean_over_users(gain: np.ndarray, weight: np.ndarray, draws: Draws) -> np.ndarray:
    """[r+1] weighted means over users of a gain [seeds,users]; users without one (NaN) are left out."""
    known = ~np.isnan(gain[0])
    means = []
    for begin in range(0, len(draws.users), CHUNK):
        rows = slice(begin, begin + CHUNK)
        drawn = draws.users[rows, known] * weight[known]
        total_weight = drawn.sum(axis=1)
        total = ((drawn @ gain[:, known].T) * draws.seeds[rows]).sum(axis=1)
        means.append(np.where(total_weight > 0, total / np.maximum(total_weight, 1e-300), np.nan))
    return np.concatenate(means)


def _pooled(scores: np.ndarray, label: np.ndarray, user: np.ndarray, users: np.ndarray) -> np.ndarray:
    parts = [weighted_auc(scores, label, users[i : i + CHUNK][:, user]) for i in range(0, len(users), CHUNK)]
    return np.concatenate(parts)


def _estimate(replicates: np.ndarray, n_events: int, n_users: int, n_seeds: int, config: BootstrapConfig) -> Estimate:
    """The sample's own value, which is the first of `replicates`, with interval and p from the others."""
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    low, high = percentile_interval(drawn, config.level)
    return Estimate(float(replicates[0]), float(low), float(high), two_sided_p(drawn), n_events, n_users, n_seeds)
