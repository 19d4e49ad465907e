"""Estimates from a study's runs, by the names of model, metric and group: what tables, plots and claims ask for.

A model that was not run gives None, and so does a group without events; nothing here raises for what is merely absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from learn.evaluation import metrics
from research.bootstrap import Bootstrap, BootstrapConfig, Estimate, Group, Runs
from research.retrieval.result_files import Run, StudyResults

# With fewer users, percentile intervals are not to be trusted, and a report prints figures without.
FEWEST_USERS = 10


class Evidence:
    """One study, opened for questions. Answers are kept, since tables and plots ask the same ones."""

    def __init__(self, results: StudyResults, config: BootstrapConfig | None = None) -> None:
        self.study = results.study
        self._results = results
        self.groups = results.study.groups()
        self._bootstrap = Bootstrap(np.array(results.study.user), config)
        self.figure = lru_cache(maxsize=None)(self._figure)
        self.difference = lru_cache(maxsize=None)(self._difference)
        self._values = lru_cache(maxsize=None)(self._event_values)

    @property
    def models(self) -> list[str]:
        """Models with at least one run, in the order of names."""
        return list(self._results.runs)

    def has(self, model: str) -> bool:
        """Whether there is a run."""
        return model in self._results.runs

    def one(self, model: str) -> Run:
        """Any run of the model, for label, family, reference, question and number of parameters."""
        return self._results.one(model)

    def runs(self, model: str) -> list[Run]:
        """All of its runs, by seed."""
        return list(self._results.runs[model].values())

    def fewest_seeds(self, *models: str) -> int | None:
        """The smallest number of seeds among those of the models that are trained; None if none is."""
        return min((len(self.runs(model)) for model in models if self.one(model).curve), default=None)

    def ablations(self) -> Iterator[Run]:
        """One run of each ablation."""
        for model in self.models:
            if self.one(model).family == "ablation":
                yield self.one(model)

    def _figure(self, model: str, metric: str, group: str = "all") -> Estimate | None:
        """The model's mean with its interval."""
        if not self._is_known(group, model):
            return None
        return self._bootstrap.mean(self._values(model, metric), self._group(metric, group))

    def _difference(self, model: str, other: str, metric: str, group: str = "all") -> Estimate | None:
        """How far `model` is ahead of `other`, paired."""
        if not self._is_known(group, model, other):
            return None
        pair = (self._values(name, metric) for name in (model, other))
        return self._bootstrap.difference(*pair, self._group(metric, group))

    def _is_known(self, group: str, *models: str) -> bool:
        return all(self.has(model) for model in models) and bool(self.groups[group].any())

    def _event_values(self, model: str, metric: str) -> Runs:
        found = {}
        for run in self.runs(model):
            found[run.seed] = metrics.event_values(np.array(run.rank), metric)
        return found

    def _group(self, metric: str, group: str) -> Group:
        return Group(self.groups[group], "users" if metrics.is_over_users(metric) else "events")


def has_interval(estimate: Estimate) -> bool:
    """Whether there are users enough for the interval to mean something."""
    return estimate.n_users >= FEWEST_USERS


def is_significant(estimate: Estimate | None) -> bool:
    """A difference from 0 with p < .05, uncorrected."""
    return estimate is not None and estimate.p is not None and has_interval(estimate) and estimate.p < 0.05
