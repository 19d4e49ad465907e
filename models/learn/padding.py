"""Rows of unequal length -> one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int = 0, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of integers -> the rows padded on the right with `value` [b,l], and a mask [b,l] that is 1 at real entries.

    Both are int64; l is the length of the longest row, but at least `least`.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(lengths.max(initial=least))[None] < lengths[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    if len(rows):
        padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded, mask.astype(np.int64)
