"""A finished ranking study in rows: every metric of every arm in every group, with its gain over the control arm.

p is corrected by Holm's method for the comparisons that a study is made for. A family is one metric of one ranking
model: the gains of all arms over all events and over the three groups of item popularity. Gains by group of users, and
comparisons of two groups, belong to no family and have no corrected p.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from research.bootstrap import BootstrapConfig, Estimate
from research.ranking import auc_metrics
from research.ranking.arms import ARMS, CONTROL
from research.ranking.auc_metrics import ArmPair, GroupConfig, HeldOut
from research.ranking.result_files import RankingStudy, read_ranking

# Groups whose gains are compared: the paper's gains are largest where ids know least.
CONTRASTS = (("cold-start items", "other items"), ("cold-start users", "other users"))

# The groups in a family of comparisons.
FAMILY = ("all", "cold-start items", "long-tail items", "other items")


@dataclass(frozen=True)
class Row:
    """One metric of one arm in one group: its mean over seeds, and its gain over the control.

    `gain` is None for the control and where the metric is not defined. A group "X − Y" compares two groups: `gain` is
    the gain in X minus the gain in Y, and `mean` is None. `n_users` counts users with events of both labels. `p_holm`
    is the corrected p of the gain, None where the row is in no family.
    """

    arm: str
    group: str
    metric: str
    mean: float | None
    gain: Estimate | None
    n_users: int
    p_holm: float | None = None


def summarise(folder: Path, config: BootstrapConfig | None = None) -> list[Row]:
    """All rows of the study in `folder`, from its files alone."""
    return _Summary(folder, config or BootstrapConfig()).rows()


class _Summary:
    def __init__(self, folder: Path, config: BootstrapConfig) -> None:
        results = read_ranking(folder)
        if CONTROL not in results.runs:
            raise ValueError(f"{folder}: no run of the arm {CONTROL!r}")
        study = results.study
        self.config = config
        self.events = _held_out(study)
        bounds = {name: tuple(value) for name, value in study.groups.items()}
        self.masks = auc_metrics.groups(self.events, GroupConfig(**bounds))
        self.scores = {
            arm: {seed: run.score_rank.astype(np.int64) for seed, run in sorted(runs.items())}
            for arm, runs in results.runs.items()
        }

    def rows(self) -> list[Row]:
        rows = []
        for arm in [name for name in ARMS if name in self.scores]:
            for group in self.masks:
                rows += self._arm_rows(arm, group)
            if arm != CONTROL:
                rows += self._contrast_rows(arm)
        return corrected(rows)

    def _pair(self, arm: str) -> ArmPair | None:
        """The arm and the control on the seeds that both have; None if they share no seed."""
        seeds = sorted(self.scores[arm].keys() & self.scores[CONTROL].keys())
        if not seeds:
            return None
        scores, control = (np.array([self.scores[name][seed] for seed in seeds]) for name in (arm, CONTROL))
        return ArmPair(scores, control)

    def _arm_rows(self, arm: str, group: str) -> list[Row]:
        mask = self.masks[group]
        measured = [auc_metrics.measure(scores, self.events, mask) for scores in self.scores[arm].values()]
        gains = {}
        if arm != CONTROL and (pair := self._pair(arm)) is not None:
            gains = auc_metrics.gains(pair, self.events, mask, self.config)
        rows = []
        for metric in auc_metrics.METRICS:
            values = [getattr(figures, metric) for figures in measured]
            mean = None if None in values else float(np.mean(values))
            rows.append(Row(arm, group, metric, mean, gains.get(metric), measured[0].n_users))
        return rows

    def _contrast_rows(self, arm: str) -> list[Row]:
        pair = self._pair(arm)
        if pair is None:
            return []
        rows = []
        for group, other in CONTRASTS:
            gain = auc_metrics.contrast(pair, self.events, (self.masks[group], self.masks[other]), self.config)
            if gain is not None:
                name = auc_metrics.contrast_name(group, other)
                rows.append(Row(arm, name, "uauc", None, gain, gain.n_users))
        return rows


def corrected(rows: list[Row]) -> list[Row]:
    """The rows with `p_holm`, where they belong to a family."""
    found = list(rows)
    for metric in auc_metrics.METRICS:
        family = [
            place
            for place, row in enumerate(rows)
            if row.metric == metric and row.group in FAMILY and row.gain is not None and row.gain.p is not None
        ]
        values = holm([rows[place].gain.p for place in family])
        for place, p in zip(family, values, strict=True):
            found[place] = replace(rows[place], p_holm=p)
    return found


def holm(values: list[float]) -> list[float]:
    """Corrected p of each comparison: the error of the whole family stays below it (Holm 1979)."""
    order = np.argsort(values, kind="stable")
    scaled = np.array(values)[order] * np.arange(len(values), 0, -1)
    result = np.empty(len(values))
    result[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return result.tolist()


def choices(folder: Path) -> str:
    """Which hyperparameters the runs chose, one line each; a value at the end of a grid may be an end too early."""
    runs = [run for by_seed in read_ranking(folder).runs.values() for run in by_seed.values()]
    trials = runs[0].config["ranker"]["trials"]
    lines = []
    for name in trials[0]:
        chosen = Counter(run.chosen[name] for run in runs)
        grid = sorted({trial[name] for trial in trials})
        counts = ", ".join(f"{value:g} in {chosen[value]}" for value in grid)
        lines.append(f"{name} chosen by {len(runs)} runs: {counts}")
    return "\n".join(lines)


def _held_out(study: RankingStudy) -> HeldOut:
    return HeldOut(
        study.user.astype(np.int64),
        study.label.astype(np.int64),
        study.item_train_count.astype(np.int64),
        study.user_train_count.astype(np.int64),
    )


def text(rows: list[Row]) -> str:
    """The rows as a plain table for a terminal."""
    lines = [f"{'group':24} {'metric':6} {'arm':20} {'mean':>7}  gain over {CONTROL} [95 % interval], p, corrected p"]
    group_order = {name: place for place, name in enumerate(dict.fromkeys(row.group for row in rows))}
    for row in sorted(rows, key=lambda row: (group_order[row.group], auc_metrics.METRICS.index(row.metric))):
        if row.mean is None and row.gain is None:
            continue
        gain = ""
        if row.gain is not None:
            gain = f"  {row.gain.value:+.4f} [{row.gain.low:+.4f}, {row.gain.high:+.4f}], p {row.gain.p:.4f}"
            if row.p_holm is not None:
                gain += f", {row.p_holm:.4f}"
        group = f"{row.group} ({row.n_users})"
        mean = "" if row.mean is None else f"{row.mean:.4f}"
        lines.append(f"{group:24} {row.metric:6} {row.arm:20} {mean:>7}{gain}")
    return "\n".join(lines)
