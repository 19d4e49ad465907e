"""AUC: the probability that a positive scores above a negative, over all pairs; ties count half."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The AUC of scores [n] and labels [n] (positive above 0.5). Raises ValueError if one of the labels is missing."""
    found = weighted_auc(scores, labels, np.ones((1, len(scores))))[0] if len(scores) else np.nan
    if np.isnan(found):
        raise ValueError("AUC needs both labels")
    return float(found)


def weighted_auc(scores: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[r] AUCs of events that count `weight` [r,n] times; NaN if one label has no weight."""
    order = np.argsort(scores, kind="stable")
    ranked, liked = scores[order], label[order] > 0.5
    first = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    ordered = weight[:, order].astype(np.float64)
    # Per distinct score: weight of positives and of negatives there.
    positive = np.add.reduceat(ordered * liked, first, axis=1)
    negative = np.add.reduceat(ordered * ~liked, first, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    return np.where(pairs > 0, wins / np.maximum(pairs, 1e-300), np.nan)


def user_aucs(scores: np.ndarray, label: np.ndarray, user: np.ndarray, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """[n_users] the AUC of each user (NaN if a label is missing) and [n_users] the number of events.

    By ranks within the user (Mann and Whitney 1947): AUC = (R - p (p + 1) / 2) / (p q), where R is the sum of the ranks
    of the p positives, ties at their mean rank, and q is the number of negatives.
    """
    n_events = np.bincount(user, minlength=n_users)
    positives = np.bincount(user, weights=label, minlength=n_users)
    # Ranks of (user, score), with scores as dense ranks; less the events of earlier users, they are ranks per user.
    dense = np.unique(scores, return_inverse=True)[1]
    rank = rankdata(user.astype(np.int64) * (dense.max(initial=0) + 1) + dense)
    rank -= (np.cumsum(n_events) - n_events)[user]
    rank_sum = np.bincount(user, weights=rank * label, minlength=n_users)
    pairs = positives * (n_events - positives)
    wins = rank_sum - positives * (positives + 1) / 2
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan), n_events


def uauc(scores: np.ndarray, labels: np.ndarray, user: np.ndarray) -> float:
    """The mean over users of each user's own AUC, without those who lack a label; NaN if that is every user."""
    found = user_aucs(scores, labels, user, int(user.max(initial=-1)) + 1)[0]
    known = found[~np.isnan(found)]
    return float(known.mean()) if len(known) else float("nan")
