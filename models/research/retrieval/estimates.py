"""Estimates from the runs of a study, by the names of model, metric and group.

Tables, plots and claims take their figures from here. A model that was not run gives None, and so does a group without
events: nothing here raises because something is absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from learn.evaluation import metrics
from learn.training.run_length import STILL_RISING
from research.bootstrap import Bootstrap, BootstrapConfig, Estimate, Group, ValuesBySeed
from research.retrieval.result_files import CurvePoint, Run, StudyResults

# With fewer users, percentile intervals cannot be trusted, and a report prints figures without them.
FEWEST_USERS = 10


class StudyEstimates:
    """The estimates of one study. They are kept, because tables and plots need the same ones."""

    def __init__(self, results: StudyResults, config: BootstrapConfig | None = None) -> None:
        self.study = results.study
        self._results = results
        self.groups = results.study.groups()
        self._bootstrap = Bootstrap(results.study.user, config)
        self.mean = lru_cache(maxsize=None)(self._mean)
        self.difference = lru_cache(maxsize=None)(self._difference)
        self.ratio = lru_cache(maxsize=None)(self._ratio)
        self._values = lru_cache(maxsize=None)(self._event_values)

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study.study

    @property
    def is_by_time(self) -> bool:
        """Whether the log was split at a moment, so that users have unequally many test events."""
        return not self.study.protocol.n_test

    def share_of_largest_users(self, n_users: int) -> float:
        """The share of the test events that the `n_users` users with the most of them have."""
        sizes = np.sort(np.unique(self.study.user, return_counts=True)[1])
        return float(sizes[-n_users:].sum() / sizes.sum())

    @property
    def models(self) -> list[str]:
        """Models with at least one run, in the order of names."""
        return list(self._results.runs)

    def has(self, model: str) -> bool:
        """Whether the model was run."""
        return model in self._results.runs

    def any_run(self, model: str) -> Run:
        """A run of the model, for the fields that all of its seeds share."""
        return self._results.any_run(model)

    def runs(self, model: str) -> list[Run]:
        """All runs of the model, by seed."""
        return list(self._results.runs[model].values())

    def fewest_seeds(self, *models: str) -> int | None:
        """The smallest number of seeds among those of the models that are trained; None if none of them is."""
        return min((len(self.runs(model)) for model in models if self.any_run(model).curve), default=None)

    def n_still_improving(self, model: str) -> int:
        """In how many runs validation was still improving at the last check, so that more steps may have given more."""
        return sum(is_still_improving(run.curve) for run in self.runs(model))

    def ablations(self) -> Iterator[Run]:
        """One run of each ablation."""
        for model in self.models:
            if self.any_run(model).family == "ablation":
                yield self.any_run(model)

    def _mean(self, model: str, metric: str, group: str = "all") -> Estimate | None:
        """The model's mean over events (or users) and seeds."""
        if not self._is_known(group, model):
            return None
        return self._bootstrap.mean(self._values(model, metric), self._group(metric, group))

    def _difference(self, model: str, other: str, metric: str, group: str = "all") -> Estimate | None:
        """The mean of `model` minus that of `other`, paired."""
        if not self._is_known(group, model, other):
            return None
        values, other_values = self._values(model, metric), self._values(other, metric)
        return self._bootstrap.difference(values, other_values, self._group(metric, group))

    def _ratio(self, model: str, other: str, metric: str, group: str = "all", null: float = 1.0) -> Estimate | None:
        """The mean of `model` divided by that of `other`, paired; p tests it against `null`."""
        if not self._is_known(group, model, other):
            return None
        values, other_values = self._values(model, metric), self._values(other, metric)
        return self._bootstrap.ratio(values, other_values, self._group(metric, group), null)

    def _is_known(self, group: str, *models: str) -> bool:
        return all(self.has(model) for model in models) and bool(self.groups[group].any())

    def _event_values(self, model: str, metric: str) -> ValuesBySeed:
        return {run.seed: metrics.event_values(run.rank.astype(np.int64), metric) for run in self.runs(model)}

    def _group(self, metric: str, group: str) -> Group:
        return Group(self.groups[group], "users" if metrics.is_over_users(metric) else "events")


def is_still_improving(curve: Sequence[CurvePoint]) -> bool:
    """Whether the last check was the best, and by more than noise better than all in the first three quarters.

    So is the only check of a run, because nothing is known of its course.
    """
    figures = [(point.step, point.ndcg_at_10) for point in curve if point.ndcg_at_10 is not None]
    if not figures:
        return False
    last_step, last = figures[-1]
    before = max((value for step, value in figures if step <= 0.75 * last_step), default=0.0)
    return last == max(value for _, value in figures) and last > (1.0 + STILL_RISING) * before


def has_interval(estimate: Estimate) -> bool:
    """Whether there are enough users for the interval to be trusted."""
    return estimate.n_users >= FEWEST_USERS


def is_significant(estimate: Estimate | None) -> bool:
    """Whether a difference has p < .05, without a correction for the number of comparisons."""
    return estimate is not None and estimate.p is not None and has_interval(estimate) and estimate.p < 0.05
