"""The figures of a CVR study: each arm's UAUC against that of the item means, paired over users."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from learn.evaluation.auc import user_aucs
from research.cvr.result_files import CvrResults, read_cvr


@dataclass(frozen=True)
class Row:
    """One arm: means over seeds, of its users' AUCs among others.

    `gain` is how far the UAUC is above that of the item means, `error` its standard error over users and `p` that of a
    paired t test. `validation` is the UAUC that epochs are chosen by. `retrieval` and `retrieval_before` are NDCG@10
    after and before the head's stage.
    """

    arm: str
    n_seeds: int
    n_users: int
    validation: float
    uauc: float
    gain: float
    error: float
    p: float
    retrieval: float
    retrieval_before: float


def summarise(folder: Path) -> list[Row]:
    """A row per arm of the study in `folder`, in the order of their names, after one for the item means."""
    results = read_cvr(folder)
    study = results.study
    baseline = _user_aucs(results, study.item_mean_rank)
    known = ~np.isnan(baseline)
    n_users = int(known.sum())
    nan = math.nan
    rows = [Row("item means", 1, n_users, nan, float(baseline[known].mean()), 0.0, 0.0, nan, nan, nan)]
    for arm, runs in sorted(results.runs.items()):
        # A user's AUC is the mean over seeds: seeds are not further users.
        of_user = np.mean([_user_aucs(results, run.score_rank)[known] for run in runs.values()], axis=0)
        difference = of_user - baseline[known]
        error = float(difference.std(ddof=1) / math.sqrt(n_users)) if n_users > 1 else nan
        p = float(ttest_1samp(difference, 0.0).pvalue) if n_users > 1 else nan
        means = {name: _mean(runs, name) for name in ("cvr_validation_uauc", "ndcg_at_10", "ndcg_at_10_before_cvr")}
        validation, after, before = means.values()
        gain = float(difference.mean())
        rows.append(Row(arm, len(runs), n_users, validation, float(of_user.mean()), gain, error, p, after, before))
    return rows


def text(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| arm | seeds | validation UAUC | UAUC | gain over item means | s.e. | p | NDCG@10 | before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (row.validation, row.uauc, row.gain, row.error, row.p, row.retrieval, row.retrieval_before)
        cells = ["" if math.isnan(figure) else f"{figure:.4f}" for figure in figures]
        lines.append(f"| {row.arm} | {row.n_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _user_aucs(results: CvrResults, scores: np.ndarray) -> np.ndarray:
    study = results.study
    user, label = study.user.astype(np.int64), study.label.astype(np.float64)
    return user_aucs(scores.astype(np.float64), label, user, int(user.max()) + 1)[0]


def _mean(runs: dict, name: str) -> float:
    found = [run.figures[name] for run in runs.values() if name in run.figures]
    return float(np.mean(found)) if found else math.nan
