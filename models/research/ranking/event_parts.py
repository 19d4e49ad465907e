"""Cuts a log into the four parts of the ranking study and flattens it into one table of events.

    TOWER_PART    trains the towers, the CVR head and the ranker's starting point
    RANKER_PART   trains the ranker, with mid-embs from towers and a head that never saw these events
    VALIDATION    for early stopping and the choice of a trial
    TEST          measured once

Mid-embs of the events that trained the towers would be better than any that serving will see, and the ranker would
learn to trust them too much. So the ranker is trained on mid-embs of unseen events, as it is in production.

"per_user" splits every user's own events by number, newest last. "global_time" splits the whole log at moments in time:
then most users of the test part have no earlier events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from learn.data import Dataset, TimeSplitConfig
from learn.data.dataset import Sequences
from learn.data.prepared_folder import KeywordBoundary
from learn.data.splits import check_keywords, time_cuts
from learn.training.cvr_config import LIKED_FROM
from learn.training.cvr_events import label

TOWER_PART, RANKER_PART, VALIDATION, TEST = range(4)


@dataclass(frozen=True)
class RankSplitConfig:
    """How a log is cut. Shares are of a user's events ("per_user") or of all events ("global_time")."""

    kind: Literal["per_user", "global_time"] = "per_user"
    # The share of the training events that belongs to the towers' part.
    towers: float = 0.6
    validation: float = 0.1
    test: float = 0.1
    # "per_user" only: at least this many events per user, however short the sequence is.
    least_validation: int = 2
    least_test: int = 5
    # An event of this value or more is a conversion.
    liked_from: float = LIKED_FROM

    def __post_init__(self) -> None:
        if self.kind not in ("per_user", "global_time"):
            raise ValueError(f"split kind is {self.kind!r}, expected 'per_user' or 'global_time'")
        if not 0 < self.towers < 1 or self.validation <= 0 or self.test <= 0 or self.validation + self.test >= 1:
            raise ValueError(f"shares have to lie within (0, 1) and leave some events for training: {self}")


def by_time(sequences: Sequences, config: TimeSplitConfig) -> RankSplitConfig:
    """The split whose validation and test begin at the same moments as those of `config`.

    ValueError if training, validation or test would be empty.
    """
    first, second = time_cuts(sequences, config)
    n_train = n_before = n_events = 0
    for sequence in sequences:
        n_train += int(np.count_nonzero(sequence.timestamps < first))
        n_before += int(np.count_nonzero(sequence.timestamps < second))
        n_events += len(sequence.timestamps)
    shares = {"validation": (n_before - n_train) / n_events, "test": (n_events - n_before) / n_events}
    return RankSplitConfig("global_time", **shares)


@dataclass(frozen=True)
class Events:
    """All events, users in the order of the data set and each user's oldest event first; every array has N entries.

    `clock` orders events across users: the time in seconds or, if the data set has no times (`has_times`), the position
    in the user's own sequence. `part` is one of the four parts and never decreases along a user's sequence.
    """

    user: np.ndarray
    position: np.ndarray
    item: np.ndarray
    value: np.ndarray
    label: np.ndarray
    clock: np.ndarray
    part: np.ndarray
    has_times: bool

    def rows(self, *parts: int) -> np.ndarray:
        """Ascending indices of the events of these parts."""
        return np.flatnonzero(np.isin(self.part, parts))

    def is_training(self) -> np.ndarray:
        """[N] whether the event trains towers or ranker."""
        return self.part <= RANKER_PART


def cut(dataset: Dataset, config: RankSplitConfig) -> Events:
    """Flattens the data set and assigns each event to a part.

    ValueError if the items' keywords were counted from events that come after the towers' part.
    """
    n_events = np.array([len(sequence.items) for sequence in dataset.sequences])
    if not n_events.sum():
        raise ValueError("the data set has no events")
    columns = {name: _flat(dataset, name) for name in ("items", "values", "timestamps")}
    user = np.repeat(np.arange(len(n_events)), n_events)
    position = np.concatenate([np.arange(n) for n in n_events])
    # A log without times comes with equal timestamps, or with each event's position as its timestamp.
    has_times = bool(np.ptp(columns["timestamps"]) > 0 and (columns["timestamps"] != position).any())
    clock = columns["timestamps"] if has_times else position
    if config.kind == "per_user":
        bounds = _user_bounds(n_events, config)  # [U,3]
        check_keywords(dataset.sequences, KeywordBoundary(held_out=int((n_events - bounds[:, 0]).max())))
        part = (position[:, None] >= np.repeat(bounds, n_events, axis=0)).sum(axis=1)
    else:
        part = _clock_parts(clock, config)
        check_keywords(dataset.sequences, KeywordBoundary(cut=int(clock[part == TOWER_PART].max()) + 1))
    values = columns["values"]
    return Events(user, position, columns["items"], values, label(values, config.liked_from), clock, part, has_times)


def _user_bounds(n_events: np.ndarray, config: RankSplitConfig) -> np.ndarray:
    """[U,3] the positions at which the ranker's part, validation and test begin.

    Users with too few events for all four parts are in the training parts only.
    """
    n_test = np.maximum(config.least_test, np.round(config.test * n_events).astype(int))
    n_validation = np.maximum(config.least_validation, np.round(config.validation * n_events).astype(int))
    n_train = n_events - n_test - n_validation
    is_short = n_train < 2
    n_train = np.where(is_short, n_events, n_train)
    n_towers = np.maximum(1, np.round(config.towers * n_train).astype(int))
    begin_test = np.where(is_short, n_events, n_events - n_test)
    return np.stack([n_towers, n_train, begin_test], axis=1)


def _clock_parts(clock: np.ndarray, config: RankSplitConfig) -> np.ndarray:
    """[N] the part of each event. Events of the same instant are in the same part."""
    training = 1.0 - config.validation - config.test
    shares = [config.towers * training, training, 1.0 - config.test]
    bounds = np.quantile(clock, shares, method="lower")
    return (clock[:, None] > bounds[None]).sum(axis=1)


def _flat(dataset: Dataset, name: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(sequence, name)) for sequence in dataset.sequences])
