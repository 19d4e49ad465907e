"""Paired comparison of two models by a bootstrap over users and seeds; the one place where replicates are drawn.

What is drawn, and why:
- Users, each with all of their events. The events of one user are alike, so drawing single events would give intervals
  that are too narrow (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Both models are measured on the same
  draw of users (paired).
- Seeds too, by default. A claim such as "LEARN is ahead of SASRec" is about training the two models, not about five
  files of weights; a bootstrap over users alone would call a lucky seed a better model. Users and seeds are drawn
  independently (the pigeonhole bootstrap of Owen 2007, whose intervals are rather too wide than too narrow).
  `seeds = "averaged"` turns this off, for questions about the trained weights themselves.
- Two models with the same seeds are drawn as pairs of runs, which narrows the interval where runs of one seed share
  batches and negatives and costs nothing where they do not. Models with different seeds are drawn separately. A model
  with one seed adds no variance of training, so its interval is too narrow, and a report has to say so.
- A draw of S seeds out of S has only (S - 1) / S of the variance that new seeds would have, so deviations from the
  mean over seeds are stretched by sqrt(S / (S - 1)) (`draw_seed_weights`).

`Bootstrap` compares means over events, the usual definition of HR and NDCG within a group of events. In a replicate the
mean is a ratio: the summed values of the drawn users over their number of events. `weight = "users"` takes the mean
over users of each user's own mean instead (recall). Where all users have equally many events, the two are the same.
Statistics that are no such means (AUC) take the same draws from `draw_users_and_seeds`.

Intervals are percentile intervals. BCa in `scipy.stats.bootstrap` resamples one list of units; it supports neither a
second level nor a ratio by clusters. p is two-sided: twice the smaller share of replicates on one side of 0, with one
added to count and total so that it is never 0 (Davison and Hinkley 1997, section 4.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Seed of training -> the value of each test event [e].
ValuesBySeed = dict[int, np.ndarray]
Weight = Literal["events", "users"]
# Replicates that are computed at once.
CHUNK = 1000
# Drawn counts are kept for the next comparison if they take no more bytes than this.
MOST_BYTES_KEPT = 1 << 28


@dataclass(frozen=True)
class BootstrapConfig:
    """With 10,000 replicates, an end of the interval has a standard error of about 1 % of the interval's width."""

    n_resamples: int = 10_000
    seed: int = 0
    level: float = 0.95
    seeds: Literal["drawn", "averaged"] = "drawn"

    def __post_init__(self) -> None:
        if self.n_resamples < 1:
            raise ValueError(f"n_resamples is {self.n_resamples}; expected 1 or more")
        if not 0 < self.level < 1:
            raise ValueError(f"level is {self.level}; expected it between 0 and 1")


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference or ratio of two means, with its interval.

    `p` tests a difference against 0 and is None for a mean. `n_seeds` is the smaller number of seeds of the two.
    """

    value: float
    low: float
    high: float
    p: float | None
    n_events: int
    n_users: int
    n_seeds: int


@dataclass(frozen=True)
class Group:
    """The events that count (a mask [e]; None for all), and whether events or users have equal weight."""

    mask: np.ndarray | None = None
    weight: Weight = "events"


class Bootstrap:
    """Estimates for one list of test events; all comparisons share the draws of its users.

    `user` [e] has the user of each event, as any kind of id. The same events, config and values give the same
    estimates, whatever was compared before.
    """

    def __init__(self, user: np.ndarray, config: BootstrapConfig | None = None) -> None:
        if not len(user):
            raise ValueError("there are no events to compare on")
        self.config = config or BootstrapConfig()
        names, self.user = np.unique(user, return_inverse=True)
        self.n_users = len(names)
        self._drawn_users: list[np.ndarray] | None = None
        self._seed_weights_by_key: dict[tuple[int, int], np.ndarray] = {}

    def mean(self, runs: ValuesBySeed, group: Group | None = None) -> Estimate:
        """The mean over events and seeds. Raises ValueError if the group has no events or shapes differ."""
        return self._estimate([(1.0, runs)], group or Group())

    def difference(self, runs: ValuesBySeed, other: ValuesBySeed, group: Group | None = None) -> Estimate:
        """The mean of `runs` minus that of `other`, on the same events. Raises ValueError as `mean` does."""
        return self._estimate([(1.0, runs), (-1.0, other)], group or Group())

    def ratio(
        self, runs: ValuesBySeed, other: ValuesBySeed, group: Group | None = None, null: float = 1.0
    ) -> Estimate | None:
        """The mean of `runs` divided by that of `other`, on the same events; `p` tests it against `null`.

        None if the mean of `other` is 0. The interval leaves out replicates where it is 0 or less, which have no ratio;
        `p` is that of the difference to `null` times the other mean, which all replicates have. The draws are those of
        `difference`, and against 1 the p is the same. Raises ValueError as `mean` does.
        """
        group = group or Group()
        size, seed_weights = self._size(group), self._seed_weights([runs, other])
        sums = [self._sums(values, group) for values in (runs, other)]
        mean, other_mean = (gains.sum(axis=0).mean() / size.sum() for gains in sums)
        if not other_mean > 0:
            return None
        above, below = (
            self._replicates([(1.0, gains)], size, [weights]) for gains, weights in zip(sums, seed_weights, strict=True)
        )
        replicates = above[below > 0] / below[below > 0]
        if not len(replicates):
            return None
        low, high = percentile_interval(replicates, self.config.level)
        n_seeds, p = min(len(runs), len(other)), two_sided_p(above - null * below)
        return Estimate(float(mean / other_mean), float(low), float(high), p, *self._count(group), n_seeds)

    def _estimate(self, terms: list[tuple[float, ValuesBySeed]], group: Group) -> Estimate:
        sums = [(sign, self._sums(runs, group)) for sign, runs in terms]
        size = self._size(group)
        value = sum(sign * gains.sum(axis=0).mean() / size.sum() for sign, gains in sums)
        replicates = self._replicates(sums, size, self._seed_weights([runs for _, runs in terms]))
        low, high = percentile_interval(replicates, self.config.level)
        p = two_sided_p(replicates) if len(terms) == 2 else None
        if len(terms) == 1:
            # Stretched seed weights can lead beyond the smallest and largest value, where no mean can be.
            values = np.concatenate([run[self._mask(group)] for run in terms[0][1].values()])
            low, high = max(low, values.min()), min(high, values.max())
        n_seeds = min(len(runs) for _, runs in terms)
        return Estimate(float(value), float(low), float(high), p, *self._count(group), n_seeds)

    def _count(self, group: Group) -> tuple[int, int]:
        n_of_user = np.bincount(self.user[self._mask(group)], minlength=self.n_users)
        return int(n_of_user.sum()), int((n_of_user > 0).sum())

    def _mask(self, group: Group) -> np.ndarray:
        mask = np.ones(len(self.user), dtype=bool) if group.mask is None else group.mask
        if mask.shape != self.user.shape:
            raise ValueError(f"the group's mask has shape {mask.shape}, the events have {self.user.shape}")
        if not mask.any():
            raise ValueError("the group has no events")
        return mask

    def _size(self, group: Group) -> np.ndarray:
        """[U] what each user adds to the denominator."""
        n_of_user = np.bincount(self.user[self._mask(group)], minlength=self.n_users)
        return (n_of_user > 0).astype(np.float64) if group.weight == "users" else n_of_user.astype(np.float64)

    def _sums(self, runs: ValuesBySeed, group: Group) -> np.ndarray:
        """[U,S] what each user adds to the numerator, one column per seed in ascending order."""
        mask = self._mask(group)
        if not runs:
            raise ValueError("a model without a single seed cannot be compared")
        columns = []
        for seed in sorted(runs):
            if runs[seed].shape != self.user.shape:
                raise ValueError(f"seed {seed} has values of shape {runs[seed].shape} for {self.user.shape} events")
            columns.append(np.bincount(self.user[mask], weights=runs[seed][mask], minlength=self.n_users))
        sums = np.stack(columns, axis=1)
        if group.weight == "users":
            sums /= np.maximum(np.bincount(self.user[mask], minlength=self.n_users), 1)[:, None]
        return sums

    def _seed_weights(self, models: list[ValuesBySeed]) -> list[np.ndarray]:
        """One matrix [r,S] per model; each row sums to 1."""
        weights = []
        for place, runs in enumerate(models):
            is_paired = place > 0 and sorted(runs) == sorted(models[0])
            key = (len(runs), place)
            if not is_paired and key not in self._seed_weights_by_key:
                self._seed_weights_by_key[key] = self._draw_seeds(*key)
            weights.append(weights[0] if is_paired else self._seed_weights_by_key[key])
        return weights

    def _draw_seeds(self, n_seeds: int, place: int) -> np.ndarray:
        if n_seeds == 1 or self.config.seeds == "averaged":
            return np.full((self.config.n_resamples, n_seeds), 1.0 / n_seeds)
        rng = np.random.default_rng([self.config.seed, 1, place])
        return draw_seed_weights(rng, n_seeds, self.config.n_resamples)

    def _replicates(self, sums, size: np.ndarray, seed_weights: list[np.ndarray]) -> np.ndarray:
        """At most [r]: a replicate without any user of the group has no mean and is left out."""
        # One product for all sums and the size, in one piece of memory: a chunk is as large as many models' sums.
        columns = np.column_stack([*(gains for _, gains in sums), size])
        ends = np.cumsum([gains.shape[1] for _, gains in sums])
        buffer = np.empty((min(CHUNK, self.config.n_resamples), self.n_users))
        chunks, begin = [], 0
        for counts in self._draws():
            drawn = buffer[: len(counts)]
            drawn[:] = counts
            rows = slice(begin, begin + len(drawn))
            *parts, n_drawn = np.split(drawn @ columns, ends, axis=1)
            total = sum(
                sign * (part * weights[rows]).sum(axis=1)
                for (sign, _), part, weights in zip(sums, parts, seed_weights, strict=True)
            )
            n_drawn = n_drawn[:, 0]
            chunks.append(total[n_drawn > 0] / n_drawn[n_drawn > 0])
            begin += len(drawn)
        replicates = np.concatenate(chunks)
        if not len(replicates):
            raise ValueError("no replicate drew a user of the group; raise n_resamples")
        return replicates

    def _draws(self) -> Iterator[np.ndarray]:
        """Chunks [c,U] of how often each user is drawn, as bytes: the mean is 1, so no count comes near 255."""
        if self._drawn_users is not None:
            yield from self._drawn_users
            return
        rng = np.random.default_rng([self.config.seed, 0])
        chunks = []
        for begin in range(0, self.config.n_resamples, CHUNK):
            n = min(CHUNK, self.config.n_resamples - begin)
            drawn = rng.integers(0, self.n_users, size=(n, self.n_users))
            drawn += np.arange(n)[:, None] * self.n_users
            counts = np.bincount(drawn.ravel(), minlength=n * self.n_users).reshape(n, self.n_users).astype(np.uint8)
            chunks.append(counts)
            yield counts
        if self.config.n_resamples * self.n_users <= MOST_BYTES_KEPT:
            self._drawn_users = chunks


@dataclass(frozen=True)
class Draws:
    """Replicates for a statistic that is no mean over events; row 0 is the sample itself.

    `users` [r+1,U] is how often each user was drawn, `seeds` [r+1,S] the weights of the seeds, which sum to 1.
    """

    users: np.ndarray
    seeds: np.ndarray


def draw_users_and_seeds(n_users: int, n_seeds: int, config: BootstrapConfig) -> Draws:
    """Draws for `n_users` users and `n_seeds` seeds.

    `Bootstrap` draws users in another way from the same distribution. Both ways are kept because the published
    intervals hang on them.
    """
    rng = np.random.default_rng(config.seed)
    users = np.ones((config.n_resamples + 1, n_users), dtype=np.uint16)
    for begin in range(1, config.n_resamples + 1, CHUNK):
        rows = users[begin : begin + CHUNK]
        rows[:] = rng.multinomial(n_users, np.full(n_users, 1 / n_users), size=len(rows))
    seeds = draw_seed_weights(rng, n_seeds, config.n_resamples)
    return Draws(users, np.vstack([np.full(n_seeds, 1 / n_seeds), seeds]))


def draw_seed_weights(rng: np.random.Generator, n_seeds: int, n_draws: int) -> np.ndarray:
    """[n_draws,n_seeds] weights that sum to 1 and spread as those of new seeds would."""
    even = np.full(n_seeds, 1.0 / n_seeds)
    drawn = rng.multinomial(n_seeds, even, size=n_draws) / n_seeds
    return even + np.sqrt(n_seeds / max(n_seeds - 1.0, 1.0)) * (drawn - even)


def percentile_interval(replicates: np.ndarray, level: float) -> tuple[float, float]:
    """The ends of the middle `level` of the replicates [r]."""
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(replicates, [tail, 1.0 - tail])
    return low, high


def two_sided_p(replicates: np.ndarray) -> float:
    """p of a difference with these replicates [r]: in (0, 1], and 1 if all of them are 0."""
    one_side = min((replicates <= 0).sum(), (replicates >= 0).sum())
    return float(min(1.0, 2.0 * (one_side + 1) / (len(replicates) + 1)))
