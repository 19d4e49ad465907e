"""Batches: every row once, in bounds, and little padding."""

from __future__ import annotations

import numpy as np
import pytest

from learn.content.batching import BatchConfig, batches


def test_by_hand():
    config = BatchConfig(max_tokens=12, max_items=3, max_padding=0.25)
    # Lengths in order: 1 (at 3), 2 (at 1), 2 (at 4), 2 (at 5), 2 (at 6), 6 (at 0), 6 (at 2), 20 (at 7).
    lengths = [6, 2, 6, 1, 2, 2, 2, 20]
    # [1,2]: 1 of 4 is padding, as much as may be. A third row of 2: 1 of 6. A fourth would be one too many.
    # [2,2]: with a 6, 8 of 18 would be padding. [6,6] is the whole budget, and the 20 is over any budget alone.
    assert list(batches(lengths, config)) == [[3, 1, 4], [5, 6], [0, 2], [7]]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_once_and_every_bound_kept(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 200, size=random.integers(1, 400)).tolist()
    config = BatchConfig(int(random.integers(1, 3000)), int(random.integers(1, 60)), float(random.random() * 0.5))
    found = list(batches(lengths, config))
    assert sorted(position for batch in found for position in batch) == list(range(len(lengths)))
    for batch in found:
        longest, n_real = max(lengths[p] for p in batch), sum(lengths[p] for p in batch)
        n_padded = len(batch) * longest
        assert len(batch) <= config.max_items
        assert len(batch) == 1 or (n_padded <= config.max_tokens and n_padded - n_real <= config.max_padding * n_padded)


def test_no_row_no_batch():
    assert list(batches([], BatchConfig())) == []


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"max_items": 0}, {"max_padding": 1.0}, {"max_padding": -0.1}])
def test_bounds_that_make_no_sense_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is "):
        BatchConfig(**wrong)
