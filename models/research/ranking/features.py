"""The features of a ranking model without LEARN: ids, simple statistics, times and, for a control arm, categories.

Every statistic of an event is computed from earlier events:

- a statistic of the user from the user's own events at a strictly earlier time, which are also the history that
  `learn features` reads;
- a statistic of the item from training events (of towers and ranker) of any user at a strictly earlier time.

So no label enters its own features, neither directly nor through a mean over all events (the leak of naive target
encoding; Prokhorenkova et al. 2018, CatBoost, section 3, order events in the same way).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from learn.data import Dataset
from research.ranking.event_parts import TOWER_PART, Events

# A mean is shrunk towards that of the towers' part, as if this many more values had that mean.
SHRINKAGE = 5.0
DAY = 86400
NAMES = (
    "log_user_count",
    "user_mean_value",
    "user_liked_rate",
    "log_item_count",
    "item_mean_value",
    "item_liked_rate",
    "log_seconds_since_last",
    "is_first",
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
)


@dataclass(frozen=True)
class Statistics:
    """For each event, over the events before it: their number, summed value, and number of liked ones. Each [N]."""

    count: np.ndarray
    value: np.ndarray
    liked: np.ndarray


def numeric(events: Events) -> np.ndarray:
    """[N, len(NAMES)] float32, standardised by mean and deviation over the towers' part."""
    user, item = user_statistics(events), item_statistics(events)
    towers = events.part == TOWER_PART
    mean, rate = float(events.value[towers].mean()), float(events.label[towers].mean())
    columns = [
        *(np.log1p(user.count), _shrunk(user.value, user.count, mean), _shrunk(user.liked, user.count, rate)),
        *(np.log1p(item.count), _shrunk(item.value, item.count, mean), _shrunk(item.liked, item.count, rate)),
        *_times(events),
    ]
    table = np.stack(columns, axis=1)
    spread = table[towers].std(axis=0)
    # A constant column (without times, for example) becomes 0 and not a division by 0.
    scaled = (table - table[towers].mean(axis=0)) / np.where(spread > 1e-9, spread, np.inf)
    return scaled.astype(np.float32)


def user_statistics(events: Events) -> Statistics:
    """From the user's own events at a strictly earlier time, in any part: they are known when the next is predicted."""
    start = np.flatnonzero(events.position == 0)
    owner = np.cumsum(events.position == 0) - 1
    new_instant = (events.position == 0) | np.r_[True, events.clock[1:] != events.clock[:-1]]
    instant = np.flatnonzero(new_instant)[np.cumsum(new_instant) - 1]

    def before(amount: np.ndarray) -> np.ndarray:
        running = np.cumsum(amount, dtype=np.float64) - amount
        return running[instant] - running[start][owner]

    return Statistics(before(np.ones(len(owner))), before(events.value), before(events.label))


def item_statistics(events: Events) -> Statistics:
    """From training events of the same item at a strictly earlier time; events of the same time are left out."""
    order = np.lexsort((events.clock, events.item))
    item, clock = events.item[order], events.clock[order]
    new_item = np.r_[True, item[1:] != item[:-1]]
    new_instant = new_item | np.r_[True, clock[1:] != clock[:-1]]
    training = events.is_training()[order].astype(np.float64)

    def before(amount: np.ndarray) -> np.ndarray:
        running = np.cumsum(amount * training) - amount * training
        at_instant = running[np.flatnonzero(new_instant)][np.cumsum(new_instant) - 1]
        at_item = running[np.flatnonzero(new_item)][np.cumsum(new_item) - 1]
        result = np.empty(len(order))
        result[order] = at_instant - at_item
        return result

    ones = np.ones(len(order))
    return Statistics(before(ones), before(events.value[order].astype(np.float64)), before(events.label[order]))


def training_counts(events: Events, key: np.ndarray, n_keys: int) -> np.ndarray:
    """[n_keys] the number of training events of each user (or item); `key` is `events.user` or `events.item`."""
    return np.bincount(key[events.is_training()], minlength=n_keys)


def hashed_rows(counts: np.ndarray, n_rows: int) -> np.ndarray:
    """[n] the row of each id in an embedding table of `n_rows` rows. Row 0 is for ids without training events.

    If there are enough rows, every id has its own; otherwise ids share rows by a multiplicative hash
    (Knuth, TAOCP 6.4).
    """
    if n_rows < 2:
        raise ValueError(f"an id table has {n_rows} rows, at least 2 are needed")
    index = np.arange(len(counts), dtype=np.uint64)
    own = index if len(counts) < n_rows else (index * np.uint64(2654435761) % np.uint64(2**32)) % np.uint64(n_rows - 1)
    return np.where(counts > 0, own.astype(np.int64) + 1, 0)


def categories(dataset: Dataset, most: int) -> np.ndarray:
    """[I,G] float32: 1 where the item has the category, for the `most` most frequent ones (ties by name)."""
    lists = [[name.strip() for name in (text.category or "").split(",") if name.strip()] for text in dataset.texts]
    counts = Counter(name for names in lists for name in set(names))
    index = {name: place for place, name in enumerate(sorted(counts, key=lambda name: (-counts[name], name))[:most])}
    table = np.zeros((len(lists), len(index)), dtype=np.float32)
    for row, names in enumerate(lists):
        table[row, [index[name] for name in names if name in index]] = 1.0
    return table


def _shrunk(total: np.ndarray, count: np.ndarray, prior: float) -> np.ndarray:
    return (total + SHRINKAGE * prior) / (count + SHRINKAGE)


def _times(events: Events) -> list[np.ndarray]:
    is_first = (events.position == 0).astype(np.float64)
    if not events.has_times:
        return [np.zeros(len(is_first)), is_first, *(np.zeros(len(is_first)) for _ in range(4))]
    since = np.r_[0, np.diff(events.clock)] * (1 - is_first)
    hour = 2 * np.pi * (events.clock % DAY) / DAY
    weekday = 2 * np.pi * (events.clock // DAY % 7) / 7
    return [np.log1p(since), is_first, np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)]
