from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from learn.data import Dataset, Sequence
from learn.data.item_text import ItemText
from research.ranking import features
from research.ranking.event_parts import RANKER_PART, TEST, TOWER_PART, VALIDATION, Events, RankSplitConfig, cut
from research.ranking.features import (
    NAMES,
    categories,
    hashed_rows,
    item_statistics,
    numeric,
    training_counts,
    user_statistics,
)


def example_events():
    """User 0 meets items 7, 8, 9 at times 10, 20, 30; user 1 meets items 7, 9, 8 at times 10, 25, 40."""
    return Events(
        user=np.array([0, 0, 0, 1, 1, 1]),
        position=np.array([0, 1, 2, 0, 1, 2]),
        item=np.array([7, 8, 9, 7, 9, 8]),
        value=np.array([5.0, 2.0, 4.0, 1.0, 4.5, 3.0]),
        label=np.array([1, 0, 1, 0, 1, 0], dtype=np.float32),
        clock=np.array([10, 20, 30, 10, 25, 40]),
        part=np.array([TOWER_PART, TOWER_PART, TEST, TOWER_PART, RANKER_PART, TEST]),
        has_times=True,
    )


def test_user_statistics_match_hand_computed_values():
    found = user_statistics(example_events())
    assert found.count.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.value.tolist() == [0, 5, 7, 0, 1, 5.5]
    assert found.liked.tolist() == [0, 1, 1, 0, 0, 1]
    # The events of user 1 at the same time do not count for each other, and both count for the next.
    tied = user_statistics(replace(example_events(), clock=np.array([10, 20, 30, 10, 10, 40])))
    assert tied.count.tolist() == [0, 1, 2, 0, 0, 2]
    assert tied.value.tolist() == [0, 5, 7, 0, 0, 5.5]


def test_item_statistics_match_hand_computed_values():
    found = item_statistics(example_events())
    # Item 7 has two events at the same time, so neither counts for the other. The event of item 9 at 30 counts the one
    # at 25, and the event of item 8 at 40 counts the one at 20.
    assert found.count.tolist() == [0, 0, 1, 0, 0, 1]
    assert found.value.tolist() == [0, 0, 4.5, 0, 0, 2]
    assert found.liked.tolist() == [0, 0, 1, 0, 0, 0]
    # Held-out events do not count in any statistic.
    hidden = replace(example_events(), part=np.array([TOWER_PART, TOWER_PART, TEST, TOWER_PART, VALIDATION, TEST]))
    assert item_statistics(hidden).count.tolist() == [0, 0, 0, 0, 0, 1]


def log(seed=0, n_users=30, n_items=25):
    rng = np.random.default_rng(seed)
    sequences = []
    for user in range(n_users):
        n = int(rng.integers(12, 20))
        when = np.sort(rng.integers(0, 10**6, n))
        sequences.append(
            Sequence(str(user), rng.permutation(n_items)[:n], rng.integers(1, 6, n).astype(np.float32), when)
        )
    return Dataset([str(i) for i in range(n_items)], [ItemText(title=str(i)) for i in range(n_items)], sequences)


def test_a_label_affects_only_later_statistics_of_its_user_and_item():
    data = log()
    events = cut(data, RankSplitConfig())
    before = numeric(events)
    for row in [5, 100, int(events.rows(RANKER_PART)[3]), int(events.rows(TEST)[7])]:
        value, label = events.value.copy(), events.label.copy()
        value[row], label[row] = 6 - value[row], 1 - label[row]
        changed = replace(events, value=value, label=label)
        users = [user_statistics(e) for e in (events, changed)]
        items = [item_statistics(e) for e in (events, changed)]
        touched = np.flatnonzero((users[0].liked != users[1].liked) | (items[0].liked != items[1].liked))
        assert row not in touched and len(touched)
        later_of_user = (events.user[touched] == events.user[row]) & (events.position[touched] > events.position[row])
        later_of_item = (events.item[touched] == events.item[row]) & (events.clock[touched] > events.clock[row])
        assert (later_of_user | later_of_item).all()
    assert before.shape == (len(events.user), len(NAMES)) and np.isfinite(before).all()


def test_columns_are_standardised_over_the_towers_part():
    events = cut(log(), RankSplitConfig())
    table = numeric(events)[events.part == TOWER_PART]
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(table.std(axis=0), 1, atol=1e-4)
    timeless = numeric(replace(events, has_times=False))
    assert (timeless[:, NAMES.index("hour_sin")] == 0).all() and np.isfinite(timeless).all()


def test_time_features_match_hand_computed_values():
    events = replace(example_events(), clock=np.array([0, 43200, 86400, 0, 7 * 86400, 8 * 86400]))
    since, is_first, hour_sin, hour_cos, weekday_sin, weekday_cos = features._times(events)
    np.testing.assert_allclose(np.expm1(since), [0, 43200, 43200, 0, 7 * 86400, 86400])
    assert is_first.tolist() == [1, 0, 0, 1, 0, 0]
    np.testing.assert_allclose(hour_cos, [1, -1, 1, 1, 1, 1])
    np.testing.assert_allclose(hour_sin, 0, atol=1e-9)
    np.testing.assert_allclose(weekday_sin[[0, 2, 4, 5]], np.sin(2 * np.pi * np.array([0, 1, 0, 1]) / 7), atol=1e-9)
    np.testing.assert_allclose(weekday_cos[[0, 2]], np.cos(2 * np.pi * np.array([0, 1]) / 7))


def test_rows_of_id_tables_are_distinct_or_evenly_hashed():
    counts = np.array([3, 0, 1, 2])
    assert hashed_rows(counts, 100).tolist() == [1, 0, 3, 4]
    many = hashed_rows(np.ones(10_000, dtype=int), 64)
    # Every row except that of unknown ids is used about equally often.
    spread = np.bincount(many, minlength=64)
    assert spread[0] == 0 and spread[1:].min() > 0.5 * 10_000 / 63 and spread.max() < 2 * 10_000 / 63
    with pytest.raises(ValueError, match="at least 2"):
        hashed_rows(counts, 1)


def test_training_counts_and_categories_match_hand_computed_values():
    events = example_events()
    assert training_counts(events, events.item, 11).tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 1, 1, 0]
    texts = [ItemText("a", "Drama, War"), ItemText("b", "Drama"), ItemText("c"), ItemText("d", "Comedy")]
    table = categories(Dataset(list("abcd"), texts, []), most=2)
    # Drama is the most frequent one; Comedy and War tie, and Comedy is first by name.
    assert table.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]
