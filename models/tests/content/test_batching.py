"""Batches contain every row once, respect their limits and have little padding."""

from __future__ import annotations

import numpy as np
import pytest

from learn.content.batching import BatchConfig, batches


def test_batches_match_a_hand_worked_example():
    config = BatchConfig(max_tokens=12, max_items=3, max_padding=0.25)
    # Lengths in order, each with the index of its row: 1 (3), 2 (1), 2 (4), 2 (5), 2 (6), 6 (0), 6 (2), 20 (7).
    lengths = [6, 2, 6, 1, 2, 2, 2, 20]
    # In a batch of lengths 1 and 2, 1 of 4 tokens is padding, which is the limit; with another 2, it is 1 of 6. A
    # fourth row would exceed max_items. In a batch of 2, 2 and 6, 8 of 18 tokens would be padding. The two rows of
    # length 6 use all of max_tokens, and the row of length 20 exceeds it alone.
    assert list(batches(lengths, config)) == [[3, 1, 4], [5, 6], [0, 2], [7]]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_batch_and_every_limit_is_respected(seed):
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


def test_no_rows_give_no_batches():
    assert list(batches([], BatchConfig())) == []


@pytest.mark.parametrize("invalid", [{"max_tokens": 0}, {"max_items": 0}, {"max_padding": 1.0}, {"max_padding": -0.1}])
def test_an_invalid_limit_is_refused_by_name(invalid):
    (name,) = invalid
    with pytest.raises(ValueError, match=f"{name} is "):
        BatchConfig(**invalid)
