"""Samples the events of a long sequence that one training step uses.

LEARN (arXiv 2405.03988) samples in two stages: first uniformly at random down to a working size, then with weights
that favour recent events, w_i = log(a + i (b - a) / (N - 1)) / max w, where i counts from the oldest event, a = 10 and
b = 10000.
"""

from __future__ import annotations

import numpy as np

RECENCY_A, RECENCY_B = 10.0, 10000.0


def recency_weights(n_events: int, a: float = RECENCY_A, b: float = RECENCY_B) -> np.ndarray:
    """[n] weights from the oldest to the newest event; the newest has weight 1."""
    steps = np.arange(n_events) / max(n_events - 1, 1) if n_events > 1 else np.ones(n_events)
    weights = np.log(a + steps * (b - a))
    return weights / weights.max() if n_events else weights


def two_stage(rng: np.random.Generator, n_events: int, first: int, second: int) -> np.ndarray:
    """Sorted positions [min(n, second)] out of `n_events`: `first` drawn uniformly, then `second` by recency."""
    kept = np.sort(rng.choice(n_events, size=min(first, n_events), replace=False))
    if len(kept) <= second:
        return kept
    weights = recency_weights(len(kept))
    return np.sort(rng.choice(kept, size=second, replace=False, p=weights / weights.sum()))


def window(rng: np.random.Generator, n_events: int, size: int) -> tuple[int, int]:
    """A random range [begin, end) of at most `size` events. `target_shares` gives how often each event is a target."""
    end = int(_inside(rng.integers(1, n_events + size), n_events, size))
    return max(0, end - size), end


def target_shares(n_events: int, size: int, has_start: bool) -> np.ndarray:
    """[n] the probability that an event is a target in a window that `window` draws.

    All events of a window are targets except the first, which has no state before it. The first event of a sequence is
    a target too if the model has a start token.
    """
    ends = _inside(np.arange(1, n_events + size), n_events, size)
    begins = np.maximum(0, ends - size)
    first = begins + ((begins > 0) | (not has_start))
    change = np.bincount(first, minlength=n_events + 1) - np.bincount(ends, minlength=n_events + 1)
    return np.cumsum(change)[:n_events] / len(ends)


def _inside(end: np.ndarray | int, n_events: int, size: int) -> np.ndarray:
    """Moves the end of a window that would reach beyond the sequence back into it.

    Ends are drawn uniformly from 1 .. n + size - 1. So windows are as full as possible, and still contain states of
    short histories, and the newest events, which are most like the requests in serving, are targets at least as often
    as others.
    """
    return np.clip(end, min(size, n_events), n_events)


def uniform(rng: np.random.Generator, n_events: int, _first: int, second: int) -> np.ndarray:
    """The first stage alone, the paper's ablation: sorted positions [min(n, second)], all events equally likely."""
    return np.sort(rng.choice(n_events, size=min(second, n_events), replace=False))


def recent(_rng: np.random.Generator, n_events: int, _first: int, second: int) -> np.ndarray:
    """The newest `second` positions, without sampling."""
    return np.arange(max(0, n_events - second), n_events)


SAMPLERS = {"two-stage": two_stage, "uniform": uniform, "recent": recent}
