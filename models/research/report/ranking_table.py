"""The ranking model's part of the report, from the rows of `ranking.study.summarise`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from research.bootstrap import Estimate
from research.ranking import study
from research.ranking.auc_metrics import METRICS
from research.ranking.study import Row
from research.report.number_format import NONE, difference, multiplicity, number, table


def read_all(folders: Iterable[Path], n_draws: int) -> dict[str, list[Row]]:
    """The rows of every ranking study, by its name. ValueError if two folders hold a study of one name."""
    by_name: dict[str, Path] = {}
    for folder in folders:
        name = study.name_of(folder)
        if name in by_name:
            raise ValueError(f"{folder}: another folder holds a ranking study called {name!r}, after its run's folder")
        by_name[name] = folder
    return {name: study.summarise(folder, n_draws) for name, folder in by_name.items()}


def gap(row: Row) -> Estimate | None:
    """How far the arm is ahead of the control, as the rest of the report has differences."""
    if row.difference is None:
        return None
    return Estimate(row.difference, row.low, row.high, row.p, row.n_events, row.n_users, row.n_seeds)


def unique(rows: Iterable[Row], name: str) -> list[str]:
    """Values of a field, in the order of rows."""
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def control(rows: Sequence[Row]) -> str:
    """The arm that others are compared with: the one without differences."""
    compared = {row.arm for row in rows if row.difference is not None}
    return next((arm for arm in unique(rows, "arm") if arm not in compared), "control")


def figures_table(rows: Sequence[Row]) -> str:
    """All events: AUC, UAUC and WUAUC of every arm."""
    by_key = {(row.arm, row.metric): row for row in rows if row.group == "all"}
    lines = []
    for arm in unique(rows, "arm"):
        cells = [f"`{arm}`"]
        for metric in METRICS:
            row = by_key.get((arm, metric))
            cells.append(NONE if row is None or row.figure is None else number(row.figure))
            cells.append(NONE if row is None else difference(gap(row)))
        lines.append(cells)
    against = f"less `{control(rows)}`"
    return table(["features", *(cell for metric in METRICS for cell in (metric.upper(), against))], lines)


def groups_table(rows: Sequence[Row], metric: str) -> str:
    """Differences of one metric by group."""
    arms = [arm for arm in unique(rows, "arm") if arm != control(rows)]
    chosen = [row for row in rows if row.metric == metric]
    by_key = {(row.group, row.arm): row for row in chosen}
    lines, compared = [], []
    for group in unique(chosen, "group"):
        found = [by_key.get((group, arm)) for arm in arms]
        compared += [gap(row) for row in found if row is not None]
        n_users = next((row.n_users for row in found if row is not None), 0)
        lines.append([group, str(n_users), *(NONE if row is None else difference(gap(row)) for row in found)])
    header = ["events", "users", *(f"`{arm}`" for arm in arms)]
    return f"{table(header, lines)}\n\n{multiplicity(compared)}"
