from __future__ import annotations

import math

import numpy as np
import pytest

from learn.training.sampling import recency_weights, recent, target_shares, two_stage, uniform, window


def test_recency_weights_are_those_of_the_paper():
    a, b, n = 10.0, 10000.0, 5
    raw = [math.log(a + i * (b - a) / (n - 1)) for i in range(n)]
    assert recency_weights(n) == pytest.approx([w / raw[-1] for w in raw])
    assert recency_weights(n)[0] == pytest.approx(0.25)  # log 10 / log 10000
    assert recency_weights(1) == pytest.approx([1.0])


def test_two_stage_sampling_keeps_order_and_prefers_recent_events():
    rng = np.random.default_rng(0)
    drawn = [two_stage(rng, 100, 40, 10) for _ in range(500)]
    assert all(len(set(d)) == 10 and list(d) == sorted(d) for d in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=100)
    # The first event has a quarter of the weight of the last; a uniform sampler would fail this.
    assert counts[90:].mean() > 1.1 * counts[:10].mean()


def test_two_stage_sampling_takes_all_of_a_short_sequence():
    assert list(two_stage(np.random.default_rng(0), 7, 40, 10)) == list(range(7))
    assert list(two_stage(np.random.default_rng(0), 10, 40, 10)) == list(range(10))


@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize(("n_events", "size"), [(1, 8), (2, 8), (5, 8), (8, 8), (9, 8), (30, 8), (200, 8)])
def test_windows_predict_each_event_as_often_as_target_shares_says(n_events, size, has_start):
    rng, n_draws = np.random.default_rng(0), 4000
    n_predicted = np.zeros(n_events)
    for _ in range(n_draws):
        begin, end = window(rng, n_events, size)
        assert 0 <= begin < end <= n_events and end - begin == min(size, n_events)
        n_predicted[begin + (0 if begin == 0 and has_start else 1) : end] += 1
    shares = target_shares(n_events, size, has_start)
    np.testing.assert_allclose(n_predicted / n_draws, shares, atol=5 * np.sqrt(0.25 / n_draws))
    if 1 < n_events <= size:
        assert (shares[1:] == 1).all()
    if n_events > 2 * size:
        # The newest event is predicted at least as often as one in the middle, with which some windows only start.
        assert shares[-1] >= shares[n_events // 2] >= shares[1:].max() / 2 - 1 / n_events


def test_uniform_prefers_no_event_and_recent_takes_the_newest():
    rng = np.random.default_rng(0)
    drawn = [uniform(rng, 100, 40, 10) for _ in range(500)]
    assert all(len(set(d)) == 10 and list(d) == sorted(d) for d in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=100)
    assert counts[:50].mean() == pytest.approx(counts[50:].mean(), rel=0.1)
    assert list(uniform(rng, 4, 40, 10)) == list(recent(rng, 4, 40, 10)) == [0, 1, 2, 3]
    assert list(recent(rng, 12, 40, 3)) == [9, 10, 11]
