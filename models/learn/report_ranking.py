"""The ranking model's part of the report: rows of `learn.rank_study.summarise`, taken through one small door.

The study module is optional: without it, or without its files, the report says so and goes on.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from learn.report_format import NONE, difference, multiplicity, number, table
from learn.significance import Estimate

METRICS = ("auc", "uauc", "wuauc")


@dataclass(frozen=True)
class RankRow:
    """One metric of one arm in one group: its mean over seeds, and how far it is ahead of the control arm.

    `difference`, `low`, `high` and `p` are None for the control, and where the metric is not defined.
    """

    arm: str
    group: str
    metric: str
    figure: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n_users: int
    n_events: int = 0

    def estimate(self) -> Estimate | None:
        """The difference as the rest of the report has them. Seeds are known to the study alone: 0 here."""
        if self.difference is None:
            return None
        return Estimate(self.difference, self.low, self.high, self.p, self.n_events, self.n_users, 0)


def read_rows(folders: Iterable[Path]) -> list[RankRow]:
    """Rows of the first ranking study; [] if there is none, or no module to read it."""
    for folder in folders:
        try:
            study = importlib.import_module("learn.rank_study")
        except ModuleNotFoundError as error:
            if error.name != "learn.rank_study":
                raise
            return []
        return [_row(row) for row in study.summarise(folder)]
    return []


def _row(row) -> RankRow:
    names = ("arm", "group", "metric", "figure", "difference", "low", "high", "p", "n_users")
    return RankRow(*(getattr(row, name) for name in names), getattr(row, "n_events", 0))


def unique(rows: Iterable[RankRow], name: str) -> list[str]:
    """Values of a field, in the order of rows."""
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def control(rows: list[RankRow]) -> str:
    """The arm that others are compared with: the one without differences."""
    compared = {row.arm for row in rows if row.difference is not None}
    return next((arm for arm in unique(rows, "arm") if arm not in compared), "control")


def figures_table(rows: list[RankRow]) -> str:
    """All events: AUC, UAUC and WUAUC of every arm."""
    by_key = {(row.arm, row.metric): row for row in rows if row.group == "all"}
    lines = []
    for arm in unique(rows, "arm"):
        cells = [f"`{arm}`"]
        for metric in METRICS:
            row = by_key.get((arm, metric))
            cells.append(NONE if row is None or row.figure is None else number(row.figure))
            if metric != "auc":
                cells.append(NONE if row is None else difference(row.estimate()))
        lines.append(cells)
    against = f"less `{control(rows)}`"
    return table(["features", "AUC", "UAUC", against, "WUAUC", against], lines)


def groups_table(rows: list[RankRow], metric: str = "uauc") -> str:
    """Differences of one metric by group."""
    arms = [arm for arm in unique(rows, "arm") if arm != control(rows)]
    chosen = [row for row in rows if row.metric == metric]
    by_key = {(row.group, row.arm): row for row in chosen}
    lines, compared = [], []
    for group in unique(chosen, "group"):
        found = [by_key.get((group, arm)) for arm in arms]
        compared += [row.estimate() for row in found if row is not None]
        n_users = next((row.n_users for row in found if row is not None), 0)
        lines.append([group, str(n_users), *(NONE if row is None else difference(row.estimate()) for row in found)])
    header = ["events", "users", *(f"`{arm}`" for arm in arms)]
    return f"{table(header, lines)}\n\n{multiplicity(compared)}"
