from __future__ import annotations

import numpy as np
import pytest

from learn.data import Dataset, Sequence, TimeSplitConfig
from learn.data.item_text import ItemText
from learn.data.splits import split
from research.ranking.event_parts import (
    RANKER_PART,
    TEST,
    TOWER_PART,
    VALIDATION,
    RankSplitConfig,
    by_time,
    cut,
)


def dataset(*lengths, times=None):
    sequences = []
    for user, n in enumerate(lengths):
        when = np.arange(n) * 10 + user if times is None else np.asarray(times[user])
        sequences.append(Sequence(str(user), np.arange(n), np.where(np.arange(n) % 2, 5.0, 2.0), when))
    n_items = max(lengths)
    return Dataset([str(i) for i in range(n_items)], [ItemText(title=str(i)) for i in range(n_items)], sequences)


def test_the_per_user_split_matches_a_hand_worked_example():
    # Of 40 events, 5 are for the test (10 % are 4, but the minimum is 5) and 4 for validation. Of the 31 others, 60 %
    # are for the towers: 18.6, rounded to 19.
    events = cut(dataset(40, 6), RankSplitConfig())
    own = events.part[events.user == 0]
    assert [int((own == part).sum()) for part in (TOWER_PART, RANKER_PART, VALIDATION, TEST)] == [19, 12, 4, 5]
    assert (np.diff(own) >= 0).all()
    # Six events are too few to hold any out, so all of them are for training.
    assert set(events.part[events.user == 1]) == {TOWER_PART, RANKER_PART}
    assert events.label.tolist()[:4] == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["per_user", "global_time"])
def test_parts_follow_one_another_and_cover_every_event(kind):
    events = cut(dataset(*range(1, 60)), RankSplitConfig(kind=kind))
    assert len(events.part) == sum(range(1, 60)) and set(events.part) == {TOWER_PART, RANKER_PART, VALIDATION, TEST}
    same_user = events.user[1:] == events.user[:-1]
    assert (np.diff(events.part)[same_user] >= 0).all()
    rows = [events.rows(part) for part in (TOWER_PART, RANKER_PART, VALIDATION, TEST)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(events.part)))


def test_the_global_time_split_never_separates_events_of_one_timestamp():
    times = [[0, 1, 2, 3, 4], [5, 6, 7, 7, 7], [7, 7, 8, 9, 9]]
    config = RankSplitConfig(kind="global_time", towers=0.5, validation=0.2, test=0.2)
    events = cut(dataset(5, 5, 5, times=times), config)
    parts_at = {when: set(events.part[events.clock == when]) for when in range(10)}
    assert all(len(parts) == 1 for parts in parts_at.values())
    assert parts_at[0] == {TOWER_PART} and parts_at[9] == {TEST}
    assert (np.diff([min(parts_at[when]) for when in range(10)]) >= 0).all()
    # The third user has no event in the part of the towers.
    assert events.part[events.user == 2].min() >= RANKER_PART


@pytest.mark.parametrize("cuts", [{"fractions": (0.6, 0.8)}, {"timestamps": (7, 9)}])
def test_validation_and_test_are_those_of_the_time_split(cuts):
    times = [[0, 1, 2, 3, 4], [5, 6, 6, 7, 7], [7, 7, 8, 9, 9]]
    data = dataset(5, 5, 5, times=times)
    found = split(data.sequences, TimeSplitConfig(**cuts))
    events = cut(data, by_time(data.sequences, TimeSplitConfig(**cuts)))
    for part, expected in ((VALIDATION, found.validation), (TEST, found.test)):
        rows = events.rows(part)
        assert len(rows) and list(zip(events.user[rows], events.position[rows], strict=True)) == [
            (event.user, event.position) for event in expected
        ]
    with pytest.raises(ValueError, match="shares"):
        by_time(data.sequences, TimeSplitConfig(timestamps=(7, 10)))


@pytest.mark.parametrize("times", [np.zeros(20), np.arange(20)])
def test_without_timestamps_the_position_is_the_clock(times):
    events = cut(dataset(20, 20, times=[times, times]), RankSplitConfig())
    assert not events.has_times and events.clock.tolist() == [*range(20), *range(20)]


@pytest.mark.parametrize(
    "change", [{"kind": "random"}, {"towers": 1.0}, {"test": 0.0}, {"test": 0.6, "validation": 0.4}]
)
def test_invalid_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=r"split kind|shares"):
        RankSplitConfig(**change)
