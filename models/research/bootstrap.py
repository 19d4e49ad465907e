"""Paired comparison of two recommenders over seeds and several test events a user: a bootstrap over users and seeds.

What is drawn, and why:
- Users, with all their events: events of one user are alike, so drawing events would give intervals that are too
  narrow (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Both models meet the same users (paired).
- Seeds too, by default. A claim such as "LEARN is ahead of SASRec" is about training them, not about five files of
  weights; averaging over seeds first and drawing users only would call a lucky seed a better model. Users and seeds are
  drawn independently of each other (the pigeonhole bootstrap of Owen 2007, which errs to the wide side). `seeds =
  "averaged"` leaves the draw out, for whoever asks about the very weights at hand. Reports use "drawn".
- Two models with the same seeds draw pairs of runs: nothing is lost where runs of one seed are unrelated, and something
  won where they share batches and negatives. Otherwise each draws its own. A model with a single seed contributes no
  variance of training, so its interval is too narrow; whoever prints it should say so.
- Few draws from few seeds understate their variance by (S - 1) / S; deviations from the mean over seeds are stretched
  by sqrt(S / (S - 1)) to mend that.

Estimates are means over events: the usual definition of HR and NDCG in a group of events, so that figures here are
those in the JSON files. In a replicate that is a ratio, sum over drawn users of their gains / of their events.
`weight = "users"` takes the mean over users of each one's mean instead (recall). Where all users have equally many
events, as overall in leave-last-n-out, the two are the same.

Intervals are percentile intervals. BCa in `scipy.stats.bootstrap` resamples one list of units at a time; it knows no
second level and no ratio by clusters. p is two-sided: twice the smaller share of replicates on one side of 0, one
added to count and total so that it is never 0 (Davison and Hinkley 1997, section 4.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Seed of training -> a value for each test event [e].
Runs = dict[int, np.ndarray]
Weight = Literal["events", "users"]
# Replicates at once, and the bytes of drawn counts that are kept for the next comparison.
CHUNK = 1000
KEPT = 1 << 28


@dataclass(frozen=True)
class BootstrapConfig:
    """With 10,000 replicates, a limit of the interval has a standard error of about 1 % of the interval's width."""

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
    """A mean, or a difference of means, with its interval; `p` is that of a difference of 0, so None for a mean.

    `n_seeds` is the smaller number of seeds of the two models.
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
    """Which events count (a mask [e]; None is all) and whether each of them counts the same or each user does."""

    mask: np.ndarray | None = None
    weight: Weight = "events"


class Bootstrap:
    """Draws of the users behind a study's test events, shared by all of its comparisons.

    `user` [e] names each event's user (any ids). The same events, config and values give the same estimates, whatever
    was compared before.
    """

    def __init__(self, user: np.ndarray, config: BootstrapConfig | None = None) -> None:
        if not len(user):
            raise ValueError("there are no events to compare on")
        self.config = config or BootstrapConfig()
        names, self.user = np.unique(user, return_inverse=True)
        self.n_users = len(names)
        self._kept: list[np.ndarray] | None = None
        self._kept_seeds: dict[tuple[int, int], np.ndarray] = {}

    def mean(self, runs: Runs, group: Group | None = None) -> Estimate:
        """The mean over events and seeds. Raises ValueError if the group has no events, or shapes differ."""
        return self._estimate([(1.0, runs)], group or Group())

    def difference(self, runs: Runs, other: Runs, group: Group | None = None) -> Estimate:
        """The mean of `runs` less that of `other`, on the same events. Raises ValueError as `mean` does."""
        return self._estimate([(1.0, runs), (-1.0, other)], group or Group())

    def _estimate(self, terms: list[tuple[float, Runs]], group: Group) -> Estimate:
        sums = [(sign, self._sums(runs, group)) for sign, runs in terms]
        size = self._size(group)
        value = sum(sign * gains.sum(axis=0).mean() / size.sum() for sign, gains in sums)
        replicates = self._replicates(sums, size, self._seed_weights([runs for _, runs in terms]))
        tail = (1.0 - self.config.level) / 2.0
        low, high = np.quantile(replicates, [tail, 1.0 - tail])
        p = two_sided_p(replicates) if len(terms) == 2 else None
        if len(terms) == 1:
            # Stretched seeds may lead outside the values themselves, where no mean can lie.
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
        """[U] how much each user counts in the denominator."""
        n_of_user = np.bincount(self.user[self._mask(group)], minlength=self.n_users)
        return (n_of_user > 0).astype(np.float64) if group.weight == "users" else n_of_user.astype(np.float64)

    def _sums(self, runs: Runs, group: Group) -> np.ndarray:
        """[U,S] each user's part of the numerator, a column a seed in the order of seeds."""
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

    def _seed_weights(self, models: list[Runs]) -> list[np.ndarray]:
        """A matrix [r,S] a model; each row sums to 1."""
        found = []
        for place, runs in enumerate(models):
            is_paired = place > 0 and sorted(runs) == sorted(models[0])
            key = (len(runs), place)
            if not is_paired and key not in self._kept_seeds:
                self._kept_seeds[key] = self._draw_seeds(*key)
            found.append(found[0] if is_paired else self._kept_seeds[key])
        return found

    def _draw_seeds(self, n_seeds: int, place: int) -> np.ndarray:
        even = np.full((self.config.n_resamples, n_seeds), 1.0 / n_seeds)
        if n_seeds == 1 or self.config.seeds == "averaged":
            return even
        rng = np.random.default_rng([self.config.seed, 1, place])
        drawn = rng.multinomial(n_seeds, even[0], size=self.config.n_resamples) / n_seeds
        return even + np.sqrt(n_seeds / (n_seeds - 1.0)) * (drawn - even)

    def _replicates(self, sums, size: np.ndarray, seed_weights: list[np.ndarray]) -> np.ndarray:
        """Up to [r]: a replicate that draws none of the group's users has no mean, and is left out."""
        found, begin = [], 0
        for counts in self._draws():
            drawn = counts.astype(np.float64)
            rows = slice(begin, begin + len(drawn))
            total = sum(
                sign * ((drawn @ gains) * weights[rows]).sum(axis=1)
                for (sign, gains), weights in zip(sums, seed_weights, strict=True)
            )
            n_drawn = drawn @ size
            found.append(total[n_drawn > 0] / n_drawn[n_drawn > 0])
            begin += len(drawn)
        replicates = np.concatenate(found)
        if not len(replicates):
            raise ValueError("no replicate drew a user of the group; raise n_resamples")
        return replicates

    def _draws(self) -> Iterator[np.ndarray]:
        """Chunks [c,U] of how often each user is drawn, as bytes: counts have mean 1, so 255 is out of reach."""
        if self._kept is not None:
            yield from self._kept
            return
        rng = np.random.default_rng([self.config.seed, 0])
        kept = []
        for begin in range(0, self.config.n_resamples, CHUNK):
            n = min(CHUNK, self.config.n_resamples - begin)
            drawn = rng.integers(0, self.n_users, size=(n, self.n_users))
            drawn += np.arange(n)[:, None] * self.n_users
            counts = np.bincount(drawn.ravel(), minlength=n * self.n_users).reshape(n, self.n_users).astype(np.uint8)
            kept.append(counts)
            yield counts
        if self.config.n_resamples * self.n_users <= KEPT:
            self._kept = kept


def two_sided_p(replicates: np.ndarray) -> float:
    """Of replicates of a difference [r]: in (0, 1], and 1 if all of them are 0."""
    one_side = min((replicates <= 0).sum(), (replicates >= 0).sum())
    return float(min(1.0, 2.0 * (one_side + 1) / (len(replicates) + 1)))
