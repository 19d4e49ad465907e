"""Bootstrap intervals against simulations with a known difference, against scipy, and in edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from research.bootstrap import Bootstrap, BootstrapConfig, Group, two_sided_p

USER = np.repeat(np.arange(60), 3)


def simulate(rng, difference: float, spread_of_seeds: float):
    """Simulates two models on the same events with 5 seeds each; gains differ by user, event and run."""
    event_level = rng.normal(0, 1, len(USER))
    user_gain = rng.normal(difference, 0.5, 60)[USER]
    runs = []
    for gain in (user_gain, 0.0):
        level = rng.normal(0, spread_of_seeds, 5)
        runs.append({s: event_level + gain + level[s] + rng.normal(0, 0.5, len(USER)) for s in range(5)})
    return runs


def coverage(spread_of_seeds: float, seeds: str) -> float:
    rng = np.random.default_rng(7)
    bootstrap = Bootstrap(USER, BootstrapConfig(n_resamples=400, seeds=seeds))
    n_hits = 0
    for _ in range(400):
        found = bootstrap.difference(*simulate(rng, 0.3, spread_of_seeds))
        n_hits += found.low <= 0.3 <= found.high
    return n_hits / 400


def test_intervals_cover_the_known_difference_about_as_often_as_their_level():
    assert 0.92 <= coverage(0.0, "drawn") <= 0.98
    # Five seeds are few when training noise is as large as that of users, but coverage is still close to the level.
    assert 0.88 <= coverage(0.1, "drawn") <= 0.98


def test_averaging_over_seeds_gives_too_narrow_intervals_when_training_is_noisy():
    assert 0.91 <= coverage(0.0, "averaged") <= 0.98
    assert coverage(0.15, "averaged") < 0.82


def test_p_is_about_uniform_without_a_difference():
    rng = np.random.default_rng(3)
    bootstrap = Bootstrap(USER, BootstrapConfig(n_resamples=400))
    p = np.array([bootstrap.difference(*simulate(rng, 0.0, 0.05)).p for _ in range(300)])
    assert 0.02 <= (p < 0.05).mean() <= 0.09
    assert 0.4 <= (p < 0.5).mean() <= 0.6


def test_identical_models_have_a_difference_of_zero():
    runs = {seed: np.random.default_rng(seed).random(len(USER)) for seed in range(4)}
    found = Bootstrap(USER).difference(runs, dict(runs))
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_with_one_event_per_user_and_one_seed_intervals_match_the_paired_bootstrap_of_scipy():
    rng = np.random.default_rng(5)
    a, b = rng.random(80), rng.random(80) * 0.8
    ours = Bootstrap(np.arange(80), BootstrapConfig(n_resamples=20_000)).difference({1: a}, {1: b})
    theirs = stats.bootstrap((a - b,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert ours.value == pytest.approx((a - b).mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_repeating_the_events_of_users_does_not_narrow_the_interval():
    gain = np.random.default_rng(1).random(60)
    once = Bootstrap(np.arange(60)).mean({1: gain})
    thrice = Bootstrap(USER).mean({1: gain[USER]})
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    assert (thrice.n_events, thrice.n_users, once.n_events) == (180, 60, 60)


def test_either_events_or_users_have_equal_weights():
    user = np.array([0, 0, 0, 1])
    values = {1: np.array([1.0, 0.0, 1.0, 0.0])}
    bootstrap = Bootstrap(user)
    assert bootstrap.mean(values).value == pytest.approx(2 / 4)
    assert bootstrap.mean(values, Group(weight="users")).value == pytest.approx((2 / 3 + 0) / 2)
    masked = bootstrap.mean(values, Group(np.array([True, True, False, True])))
    assert masked.value == pytest.approx(1 / 3)
    assert masked.n_events == 3


def test_resamples_without_users_of_a_rare_group_are_left_out():
    mask = USER < 2
    found = Bootstrap(USER).mean({1: USER.astype(float)}, Group(mask))
    assert (found.value, found.low, found.high, found.n_users) == (0.5, 0.0, 1.0, 2)


def test_seeds_of_models_with_different_seeds_are_drawn_separately():
    rng = np.random.default_rng(2)
    level = {seed: np.full(len(USER), float(seed)) for seed in range(4)}
    noise = rng.random(len(USER))
    bootstrap = Bootstrap(USER)
    together = bootstrap.difference(level, {seed: values + noise for seed, values in level.items()})
    apart = bootstrap.difference(level, {seed + 1: level[seed] + noise for seed in range(4)})
    assert together.value == pytest.approx(apart.value)
    # The level of a seed cancels in a pair, but not between unrelated seeds.
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_estimates_do_not_depend_on_earlier_comparisons():
    runs = {1: np.random.default_rng(1).random(len(USER))}
    fresh = Bootstrap(USER).mean(runs)
    used = Bootstrap(USER)
    used.mean({1: runs[1] * 2, 2: runs[1]})
    assert used.mean(runs) == fresh


def test_p_matches_hand_computed_values():
    assert two_sided_p(np.array([1.0] * 9)) == pytest.approx(2 * 1 / 10)
    assert two_sided_p(np.array([1.0] * 8 + [-1.0])) == pytest.approx(2 * 2 / 10)
    assert two_sided_p(np.zeros(9)) == 1.0


def test_invalid_input_is_refused_with_the_reason():
    bootstrap = Bootstrap(USER)
    with pytest.raises(ValueError, match=r"seed 3 has values of shape \(2,\)"):
        bootstrap.mean({3: np.zeros(2)})
    with pytest.raises(ValueError, match="the group has no events"):
        bootstrap.mean({3: np.zeros(180)}, Group(np.zeros(180, dtype=bool)))
    with pytest.raises(ValueError, match="without a single seed"):
        bootstrap.mean({})
    with pytest.raises(ValueError, match="level is 95"):
        BootstrapConfig(level=95)
    with pytest.raises(ValueError, match="no events to compare"):
        Bootstrap(np.array([]))
