from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from research.bootstrap import BootstrapConfig, draw_users_and_seeds
from research.ranking import auc_metrics
from research.ranking.auc_metrics import (
    ArmPair,
    GroupConfig,
    HeldOut,
    contrast,
    gains,
    groups,
    measure,
    user_aucs,
    weighted_auc,
)


def held_out(user, label, item_count=None, user_count=None):
    n = len(user)
    counts = (np.full(n, 9) if given is None else np.array(given) for given in (item_count, user_count))
    return HeldOut(np.array(user), np.array(label), *counts)


def draws(n_resamples):
    return BootstrapConfig(n_resamples=n_resamples)


def all_events(events):
    return np.ones(len(events.user), dtype=bool)


def test_the_aucs_match_hand_computed_values():
    # User 0 has both pairs right, (.9 > .1) and (.4 > .1), so the AUC is 1. User 1 has .2 < .3, so 0. User 2 has a tie,
    # so 1/2. User 3 has one label only and does not count.
    events = held_out([0, 0, 0, 1, 1, 2, 2, 3], [1, 1, 0, 1, 0, 1, 0, 1])
    scores = np.array([0.9, 0.4, 0.1, 0.2, 0.3, 0.5, 0.5, 0.8])
    figures = measure(scores, events, all_events(events))
    assert figures.uauc == pytest.approx(0.5)
    assert figures.wuauc == pytest.approx((3 * 1 + 2 * 0 + 2 * 0.5) / 7, abs=1e-6)
    # The positives .9 .4 .2 .5 .8 win 3 + 2 + 1 + 2.5 + 3 of the 15 pairs with the negatives .1 .3 .5.
    assert figures.auc == pytest.approx(11.5 / 15, abs=1e-6)
    assert (figures.n_events, figures.n_users) == (8, 3)


@pytest.mark.parametrize("levels", [3, 10_000])
def test_aucs_agree_with_sklearn(levels):
    rng = np.random.default_rng(levels)
    user, label = rng.integers(0, 17, 400), rng.integers(0, 2, 400)
    scores = rng.integers(0, levels, 400) / levels - 0.5
    per_user, n_events = user_aucs(scores, label, user, 20)
    for one in range(17):
        assert per_user[one] == pytest.approx(roc_auc_score(label[user == one], scores[user == one]))
    assert np.isnan(per_user[17:]).all() and n_events[17:].sum() == 0
    weight = rng.integers(0, 4, (5, 400))
    found = weighted_auc(scores, label, weight)
    for row in range(5):
        assert found[row] == pytest.approx(roc_auc_score(label, scores, sample_weight=weight[row]))


def test_a_group_without_both_labels_has_no_auc():
    events = held_out([0, 0, 1], [1, 1, 1])
    figures = measure(np.zeros(3), events, all_events(events))
    assert figures.auc is None and figures.uauc is None and figures.wuauc is None and figures.n_users == 0
    assert measure(np.zeros(3), events, np.zeros(3, dtype=bool)).n_events == 0
    assert gains(ArmPair(np.zeros((1, 3)), np.zeros((1, 3))), events, all_events(events), draws(10)) == {}


def test_groups_match_a_hand_worked_example():
    # Ten users have 1 to 10 training events and one test event each, on items with these numbers of training events.
    item_count = [0, 4, 5, 19, 20, 500, 500, 500, 500, 500]
    events = held_out(range(10), [0, 1] * 5, item_count, range(1, 11))
    found = {name: np.flatnonzero(mask).tolist() for name, mask in groups(events, GroupConfig()).items()}
    assert found["cold-start users"] == [0] and found["long-tail users"] == [1, 2]
    assert found["other users"] == list(range(3, 10))
    assert found["cold-start items"] == [0, 1] and found["long-tail items"] == [2, 3]
    assert found["other items"] == [4, 5, 6, 7, 8, 9]
    assert next(iter(found)) == "all" and len(found["all"]) == 10


def test_users_without_training_events_are_all_cold_start():
    events = held_out([0, 0, 1, 2, 3], [0, 1, 0, 1, 0], user_count=[0, 0, 0, 0, 7])
    found = groups(events, GroupConfig())
    assert found["cold-start users"].tolist() == [True, True, True, True, False]
    assert not found["long-tail users"].any()


def noisy_arms(n_users, gain, n_seeds=3):
    rng = np.random.default_rng(5)
    user, label = np.repeat(np.arange(n_users), 8), np.tile([0, 1], 4 * n_users)
    control = rng.normal(size=(n_seeds, 8 * n_users)) + 0.5 * label
    return held_out(user, label), control, control + gain * label


def test_the_gain_is_the_difference_of_the_metrics_and_lies_in_its_interval():
    events, control, treated = noisy_arms(60, 0.5)
    found = gains(ArmPair(treated, control), events, all_events(events), draws(400))
    for name in ("auc", "uauc", "wuauc"):
        means = [
            np.mean([getattr(measure(s, events, all_events(events)), name) for s in arm]) for arm in (treated, control)
        ]
        assert found[name].value == pytest.approx(means[0] - means[1], abs=2e-6)
        assert 0 < found[name].low < found[name].value < found[name].high
        assert found[name].p == pytest.approx(2 / 401)


def test_a_contrast_is_the_gain_in_one_group_minus_the_gain_in_the_other():
    events, control, treated = noisy_arms(120, 1.5)
    first_half = np.tile(np.arange(8) < 4, 120)
    # The arm is better than the control only in the first half of each user's events.
    treated = np.where(first_half, treated, control)
    found = contrast(ArmPair(treated, control), events, (first_half, ~first_half), draws(400))
    gains_by_mask = [
        gains(ArmPair(treated, control), events, mask, draws(50))["uauc"].value for mask in (first_half, ~first_half)
    ]
    assert found.value == pytest.approx(gains_by_mask[0] - gains_by_mask[1]) and gains_by_mask[1] == 0.0
    assert 0 < found.low < found.value < found.high and found.p < 0.01
    back = contrast(ArmPair(treated, control), events, (~first_half, first_half), draws(400))
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    same = contrast(ArmPair(treated, control), events, (first_half, first_half), draws(50))
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    # With one seed, the contrast is a difference of two means over the same users, whose standard error is known.
    one = contrast(ArmPair(treated[:1], control[:1]), events, (first_half, ~first_half), draws(2000))
    aucs = [
        [user_aucs(arm[0][mask], events.label[mask], events.user[mask], 120)[0] for arm in (treated, control)]
        for mask in (first_half, ~first_half)
    ]
    gap = [with_it - without for with_it, without in aucs]
    both = [gap[0][~np.isnan(gap[0])], gap[1][~np.isnan(gap[1])]]
    error = np.sqrt(sum(part.var() / len(part) for part in both))
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert contrast(ArmPair(treated, control), events, (first_half, events.label > 0.5), draws(10)) is None


@pytest.mark.parametrize("n_seeds", [2, 5])
def test_drawn_seeds_vary_as_much_as_new_seeds_would(n_seeds):
    drawn = draw_users_and_seeds(7, n_seeds, BootstrapConfig(n_resamples=20_000, seed=3))
    users, seeds = drawn.users, drawn.seeds
    assert (users[0] == 1).all() and (users.sum(axis=1) == 7).all()
    assert seeds[0].tolist() == [1 / n_seeds] * n_seeds
    np.testing.assert_allclose(seeds.sum(axis=1), 1.0)
    figures = np.array([0.3, 0.1, 0.2, 0.6, 0.4])[:n_seeds]
    assert (seeds[1:] @ figures).var() == pytest.approx(figures.var(ddof=1) / n_seeds, rel=0.05)


def test_equal_arms_have_no_significant_gain():
    events, control, _ = noisy_arms(60, 0.0)
    other = np.random.default_rng(6).permuted(control.reshape(3, -1, 2), axis=1).reshape(3, -1)
    found = gains(ArmPair(other, control), events, all_events(events), draws(400))
    assert found["uauc"].low < 0 < found["uauc"].high and found["uauc"].p > 0.05
    same = gains(ArmPair(control, control), events, all_events(events), draws(50))["uauc"]
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_interval_of_uauc_is_as_wide_as_theory_says(monkeypatch):
    # With one seed, the difference in UAUC is a mean over users, whose standard error is known.
    events, control, treated = noisy_arms(300, 0.5, n_seeds=1)
    gap = (
        user_aucs(treated[0], events.label, events.user, 300)[0]
        - user_aucs(control[0], events.label, events.user, 300)[0]
    )
    full = gains(ArmPair(treated, control), events, all_events(events), draws(2000))
    found = full["uauc"]
    # Only the pooled AUC is limited to POOLED_DRAWS.
    monkeypatch.setattr(auc_metrics, "POOLED_DRAWS", 300)
    limited = gains(ArmPair(treated, control), events, all_events(events), draws(2000))
    assert limited["uauc"] == found and limited["auc"] != full["auc"]
    assert limited["auc"].value == full["auc"].value
    assert limited["auc"].low == pytest.approx(full["auc"].low, rel=0.2)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * gap.std() / np.sqrt(300), rel=0.1)


def test_events_of_one_user_do_not_count_as_independent():
    # The same events are assigned to many users and then to four users: fewer users give a wider interval.
    events, control, treated = noisy_arms(120, 0.5)
    grouped = HeldOut(events.user % 4, events.label, events.item_train_count, events.user_train_count)
    rng = np.random.default_rng(0)
    per_user = rng.normal(size=4)[grouped.user] * events.label
    many = gains(ArmPair(treated + per_user, control), events, all_events(events), draws(400))["auc"]
    few = gains(ArmPair(treated + per_user, control), grouped, all_events(events), draws(400))["auc"]
    assert few.high - few.low > 2 * (many.high - many.low)


def test_arms_need_the_same_seeds():
    events, control, treated = noisy_arms(5, 0.1)
    with pytest.raises(ValueError, match="pairing needs the same"):
        gains(ArmPair(treated[:2], control), events, all_events(events), draws(10))
