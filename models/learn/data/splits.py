"""Which events are held out from training: the last ones of each user, or all events after a point in time.

Both rely on one order of events, (user, timestamp, item id), in which numeric ids compare as numbers. Many data sets
have ties in time (15.8 % of neighbouring events in ml-latest-small), so without a fixed rule the held-out event would
depend on the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from learn.data.dataset import Event, Events, Sequences
from learn.data.prepared_folder import KeywordBoundary, PreparedSequences

# Timestamps counted at once: 8 MB.
CHUNK = 1 << 20


@dataclass(frozen=True)
class SplitConfig:
    """How many of each user's last events are held out: the newest for test, those before them for validation."""

    n_test: int = 1
    n_validation: int = 1

    def __post_init__(self) -> None:
        for name in ("n_test", "n_validation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")

    @property
    def held_out(self) -> int:
        """The number of held-out events per user."""
        return self.n_test + self.n_validation


@dataclass(frozen=True)
class TimeSplitConfig:
    """Two cuts in time for all users: events from the first cut on are for validation, from the second on for test.

    Give either the `fractions` of events before each cut, such as (0.8, 0.9), or the `timestamps` of the cuts.
    Events with the same timestamp stay together, so with ties the fractions are approximate.
    """

    fractions: tuple[float, float] | None = None
    timestamps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.fractions is None) == (self.timestamps is None):
            raise ValueError("expected either fractions or timestamps for the two cuts, not both or neither")
        cuts = self.timestamps if self.fractions is None else self.fractions
        if len(cuts) != 2 or not cuts[0] <= cuts[1]:
            raise ValueError(f"expected two cuts, the first not after the second, got {cuts}")
        if self.fractions and not 0 < cuts[0] <= cuts[1] <= 1:
            raise ValueError(f"fractions are {cuts}; expected both to be above 0 and at most 1")


class SplitSettings:
    """Base of settings that choose between the two kinds of split; `time_split` wins if it is given."""

    split: SplitConfig
    time_split: TimeSplitConfig | None

    def chosen_split(self) -> SplitConfig | TimeSplitConfig:
        """The split to use."""
        return self.time_split or self.split


@dataclass(frozen=True)
class Split:
    """Training may read the first `n_train[u]` events of user u and nothing after them.

    In a split by time a user may be new, that is, have no event for training.
    """

    n_train: list[int]
    validation: AnySequence[Event]
    test: AnySequence[Event]


def sample_events(events: AnySequence[Event], n_events: int, seed: int) -> AnySequence[Event]:
    """At most `n_events` of the events, in their order; the same ones for the same seed and the same events.

    Training validates on such a sample where ranking the whole catalogue for every held-out event would take longer
    than the steps between two checks. Of n events, a hit rate has a standard error of at most .5 / sqrt(n).
    """
    if len(events) <= n_events:
        return events
    chosen = np.sort(np.random.default_rng(seed).choice(len(events), n_events, replace=False))
    found = [events[index] for index in chosen.tolist()]
    return Events(np.array([event.user for event in found]), np.array([event.position for event in found]))


def split(sequences: Sequences, config: SplitConfig | TimeSplitConfig) -> Split:
    """Splits the events as `config` says.

    Raises ValueError if a split by time needs timestamps that the log does not have, or if keywords of the catalogue
    were counted in events that this split would hold out.
    """
    if isinstance(config, TimeSplitConfig):
        cuts = time_cuts(sequences, config)
        check_keywords(sequences, KeywordBoundary(cut=cuts[0]))
        return _split_by_time(sequences, cuts)
    check_keywords(sequences, KeywordBoundary(held_out=config.held_out))
    return _leave_last_out(sequences, config)


def _leave_last_out(sequences: Sequences, config: SplitConfig) -> Split:
    """Holds nothing out from users with no more than `config.held_out` events: none would be left for training."""
    n_events = _user_lengths(sequences)
    is_split = n_events > config.held_out
    n_train = np.where(is_split, n_events - config.held_out, n_events)
    first_test = np.where(is_split, n_events - config.n_test, n_events)
    return Split(n_train.tolist(), _spans(n_train, first_test), _spans(first_test, n_events))


def _spans(begin: np.ndarray, end: np.ndarray) -> Events:
    """The events from `begin` [U] to before `end` [U] of every user, user by user."""
    n_events = end - begin
    before = np.cumsum(n_events) - n_events
    users = np.repeat(np.arange(len(n_events)), n_events)
    return Events(users, np.arange(n_events.sum()) - before[users] + begin[users])


def _split_by_time(sequences: Sequences, cuts: tuple[int, int]) -> Split:
    n_events = _user_lengths(sequences)
    found = np.empty((len(n_events), 2), np.int64)
    for user, timestamps in enumerate(_user_timestamps(sequences)):
        # "left": an event at the cut itself is held out.
        found[user] = np.searchsorted(timestamps, cuts, side="left")
    first, second = found.T
    return Split(first.tolist(), _spans(first, second), _spans(second, n_events))


def time_cuts(sequences: Sequences, config: TimeSplitConfig) -> tuple[int, int]:
    """The timestamps of the two cuts for this log."""
    if not isinstance(sequences, PreparedSequences):
        parts = list(_user_timestamps(sequences))
        return cut_timestamps(np.concatenate(parts) if parts else np.empty(0, np.int64), config)
    if not sequences.meta.has_timestamps:
        raise ValueError(f"{sequences.folder} has no timestamps, so it cannot be split in time; use the split by user")
    return cut_timestamps(sequences.arrays["timestamps"], config)


def cut_timestamps(timestamps: np.ndarray, config: TimeSplitConfig) -> tuple[int, int]:
    """The timestamps of the two cuts, given all timestamps [n] in any order; a memory-mapped array is not copied.

    A fraction f of n events cuts at the timestamp of event floor(f n), where the oldest event is 0. At f = 1 nothing
    is held out.
    """
    if config.timestamps is not None:
        return config.timestamps
    # In floating point, a product such as 0.29 * 100 is just below the intended whole number.
    first, second = (_nth_smallest(timestamps, int(f * len(timestamps) + 1e-9)) for f in config.fractions)
    return first, second


def _nth_smallest(timestamps: np.ndarray, n: int) -> int:
    """Bisects over the values: about 31 passes for timestamps in seconds. If n is too large: the maximum + 1."""
    parts = [timestamps[begin : begin + CHUNK] for begin in range(0, len(timestamps), CHUNK)]
    low = min((int(part.min()) for part in parts), default=0)
    high = max((int(part.max()) for part in parts), default=-1) + 1
    while low < high:
        middle = (low + high) // 2
        if sum(int(np.count_nonzero(part <= middle)) for part in parts) > n:
            high = middle
        else:
            low = middle + 1
    return low


def check_keywords(sequences: Sequences, boundary: KeywordBoundary) -> None:
    """Raises ValueError if a split begins before the one that the keywords of the catalogue were counted for.

    Keywords from held-out events would tell training what it has to predict. Only a prepared folder whose keywords
    come from tags has such a boundary.
    """
    counted = sequences.meta.keywords if isinstance(sequences, PreparedSequences) else None
    if counted is None:
        return
    if counted.cut is not None and boundary.cut is not None:
        fits = boundary.cut >= counted.cut
    else:
        fits = None not in (counted.held_out, boundary.held_out) and boundary.held_out <= counted.held_out
    if not fits:
        raise ValueError(
            f"the keywords in {sequences.folder} were counted before {counted}, but this split holds out {boundary}: "
            "they would leak what it tests; prepare again with this split"
        )


def _user_timestamps(sequences: Sequences) -> Iterator[np.ndarray]:
    """The timestamps of each user; from a prepared folder, nothing else is read."""
    if not isinstance(sequences, PreparedSequences):
        return (sequence.timestamps for sequence in sequences)
    whole, offsets = sequences.arrays["timestamps"], sequences.arrays["offsets"].tolist()
    return (whole[begin:end] for begin, end in pairwise(offsets))


def _user_lengths(sequences: Sequences) -> np.ndarray:
    if isinstance(sequences, PreparedSequences):
        return sequences.lengths
    return np.array([len(sequence.items) for sequence in sequences], np.int64)
