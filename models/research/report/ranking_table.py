"""The report's tables of ranking studies, from the rows of `ranking.summary`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from research.bootstrap import BootstrapConfig
from research.ranking import summary
from research.ranking.arms import CONTROL
from research.ranking.auc_metrics import METRICS
from research.ranking.result_files import study_name
from research.ranking.summary import Row
from research.report.number_format import NONE, difference, multiplicity, number, probability, signed, table


def read_all(folders: Iterable[Path], config: BootstrapConfig) -> dict[str, list[Row]]:
    """The rows of every ranking study, by its name. ValueError if two folders hold studies of the same name."""
    folder_of: dict[str, Path] = {}
    for folder in folders:
        name = study_name(folder)
        if name in folder_of:
            raise ValueError(f"{folder}: {folder_of[name]} also holds a ranking study called {name!r}; remove one")
        folder_of[name] = folder
    return {name: summary.summarise(folder, config) for name, folder in folder_of.items()}


def unique(rows: Iterable[Row], name: str) -> list[str]:
    """The values of a field, in the order of rows."""
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def means_table(rows: Sequence[Row]) -> str:
    """All events: AUC, UAUC and WUAUC of every arm."""
    by_key = {(row.arm, row.metric): row for row in rows if row.group == "all"}
    lines = []
    for arm in unique(rows, "arm"):
        cells = [f"`{arm}`"]
        for metric in METRICS:
            row = by_key.get((arm, metric))
            cells.append(NONE if row is None or row.mean is None else number(row.mean))
            cells.append(NONE if row is None else difference(row.gain))
        lines.append(cells)
    against = f"minus `{CONTROL}`"
    return table(["features", *(cell for metric in METRICS for cell in (metric.upper(), against))], lines)


def groups_table(rows: Sequence[Row], metric: str) -> str:
    """Gains in one metric by group."""
    arms = [arm for arm in unique(rows, "arm") if arm != CONTROL]
    chosen = [row for row in rows if row.metric == metric]
    by_key = {(row.group, row.arm): row for row in chosen}
    lines, compared = [], []
    for group in unique(chosen, "group"):
        arm_rows = [by_key.get((group, arm)) for arm in arms]
        compared += [row.gain for row in arm_rows if row is not None]
        n_users = next((row.n_users for row in arm_rows if row is not None), 0)
        lines.append([group, str(n_users), *(NONE if row is None else difference(row.gain) for row in arm_rows)])
    header = ["events", "users", *(f"`{arm}`" for arm in arms)]
    return "\n\n".join(part for part in (table(header, lines), multiplicity(compared), corrected(rows, metric)) if part)


def corrected(rows: Sequence[Row], metric: str) -> str:
    """Which gains in one metric remain after Holm's correction over the family that `summary` defines."""
    family = [row for row in rows if row.metric == metric and row.p_holm is not None]
    if not family:
        return ""
    remain = [
        f"`{row.arm}` on {row.group} ({signed(row.gain.value)}, {probability(row.p_holm)})"
        for row in family
        if row.p_holm < 0.05
    ]
    shown = ", ".join(remain) if remain else "none"
    return f"After Holm's correction over {len(family)} gains, of all events and by popularity of the item: {shown}."
