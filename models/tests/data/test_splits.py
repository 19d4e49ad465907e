"""Splits against hand-worked examples, and the properties that every split must have."""

from __future__ import annotations

import numpy as np
import pytest

from learn import data
from learn.data import Event, Events, Sequence, SplitConfig, TimeSplitConfig, sample_events, splits


def sequences(*lengths):
    return [Sequence(str(user), np.arange(n), np.ones(n)) for user, n in enumerate(lengths)]


def timed_sequences(*runs):
    return [Sequence(str(user), np.arange(len(run)), np.ones(len(run)), np.array(run)) for user, run in enumerate(runs)]


def pairs(events):
    return [(event.user, event.position) for event in events]


def test_leave_last_out_matches_a_hand_worked_example():
    split = data.split(sequences(6, 3, 2), SplitConfig(n_test=1, n_validation=2))
    assert split.n_train == [3, 3, 2]
    assert pairs(split.validation) == [(0, 3), (0, 4)]
    assert pairs(split.test) == [(0, 5)]


def test_the_time_split_matches_a_hand_worked_example():
    # Events at the time of a cut are held out. User 1 is new in the validation part and user 2 in the test part.
    runs = timed_sequences([1, 5, 10, 20, 20, 30], [10, 11], [25], [1, 2])
    split = data.split(runs, TimeSplitConfig(timestamps=(10, 20)))
    assert split.n_train == [2, 0, 0, 2]
    assert pairs(split.validation) == [(0, 2), (1, 0), (1, 1)]
    assert pairs(split.test) == [(0, 3), (0, 4), (0, 5), (2, 0)]


def test_fractions_cut_at_the_timestamp_of_the_event_with_that_index():
    # Of the 10 events, the one with index floor(0.5 * 10) = 5 is at time 6, and the one with floor(0.8 * 10) = 8 at 9.
    runs = timed_sequences([1, 3, 5, 7, 9], [2, 4, 6, 8, 10])
    assert splits.time_cuts(runs, TimeSplitConfig(fractions=(0.5, 0.8))) == (6, 9)
    split = data.split(runs, TimeSplitConfig(fractions=(0.5, 0.8)))
    assert (sum(split.n_train), len(split.validation), len(split.test)) == (5, 3, 2)
    # 0.29 * 100 is 28.999999999999996 in floating point.
    assert splits.time_cuts(timed_sequences(range(100)), TimeSplitConfig(fractions=(0.29, 1.0))) == (29, 100)
    assert data.split(runs, TimeSplitConfig(fractions=(0.7, 1.0))).test == []


def test_events_with_equal_timestamps_stay_in_one_part():
    split = data.split(timed_sequences([1, 2, 2, 2, 3], [2, 2, 3, 4]), TimeSplitConfig(fractions=(0.4, 0.8)))
    assert split.n_train == [1, 0]
    assert pairs(split.validation) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert len(split.test) == 3


def test_the_nth_smallest_timestamp_is_that_of_a_sort(monkeypatch):
    monkeypatch.setattr(splits, "CHUNK", 7)
    rng = np.random.default_rng(0)
    timestamps = rng.integers(-(2**40), 2**40, size=50).repeat(2)
    rng.shuffle(timestamps)
    for n in range(100):
        assert splits._nth_smallest(timestamps, n) == np.sort(timestamps)[n]


@pytest.mark.parametrize(
    "config",
    [
        *(SplitConfig(1, 1), SplitConfig(5, 1), SplitConfig(1, 0), SplitConfig(0, 0)),
        *(
            TimeSplitConfig(fractions=(0.6, 0.9)),
            TimeSplitConfig(timestamps=(3, 3)),
            TimeSplitConfig(timestamps=(-9, 99)),
        ),
    ],
)
def test_every_event_is_in_one_part_and_the_parts_follow_one_another(config):
    runs = sequences(*range(1, 30))
    split = data.split(runs, config)
    for user, run in enumerate(runs):
        validation = [e.position for e in split.validation if e.user == user]
        test = [e.position for e in split.test if e.user == user]
        assert [*range(split.n_train[user]), *validation, *test] == list(range(len(run.items)))
        if isinstance(config, SplitConfig):
            assert split.n_train[user] >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitConfig(n_test=-1), "n_test is -1; expected 0 or more"),
        (lambda: TimeSplitConfig(), "either fractions or timestamps"),
        (lambda: TimeSplitConfig(fractions=(0.5, 0.6), timestamps=(1, 2)), "either fractions or timestamps"),
        (lambda: TimeSplitConfig(timestamps=(2, 1)), "the first not after the second"),
        (lambda: TimeSplitConfig(fractions=(0.0, 0.5)), "above 0 and at most 1"),
        (lambda: TimeSplitConfig(fractions=(0.5, 1.5)), "above 0 and at most 1"),
    ],
)
def test_an_invalid_split_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_events_are_a_list_in_little_memory():
    events = Events(np.array([0, 0, 2]), np.array([3, 4, 1]))
    listed = [Event(0, 3), Event(0, 4), Event(2, 1)]
    assert list(events) == listed and events == listed and events != listed[:2] and len(events) == 3
    assert events[1] == events[-2] == Event(0, 4) and isinstance(events[1].user, int)
    assert isinstance(events[1:], Events) and events[1:] == listed[1:]
    assert not events[:0] and Event(2, 1) in events


def test_a_sample_of_events_is_fixed_by_its_seed_and_in_order():
    events = Events(np.arange(1000) // 3, np.arange(1000) % 3)
    one, same, other = (sample_events(events, 50, seed) for seed in (1, 1, 2))
    assert len(one) == 50 and one == same and one != other
    order = [(event.user, event.position) for event in one]
    assert order == sorted(set(order)) and set(one) <= set(events)
    # A plain list gives the same sample, and few events are not sampled.
    assert sample_events(list(events), 50, 1) == one
    assert sample_events(events, 1000, 1) is events
