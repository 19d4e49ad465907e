"""What a study says of one model, for the manifest of a bundle that is one of its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learn.evidence import Evidence
from learn.results import read_study

METRICS = ("hr_at_10", "ndcg_at_10", "hr_at_50", "mrr")


def figures_of(folder: Path, model: str) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, from the JSONs in `folder`. ValueError if the study has no such model."""
    study = read_study(folder)
    if model not in study.runs:
        raise ValueError(f"{folder} has no runs of {model!r}, only of {', '.join(study.runs)}")
    evidence, found = Evidence(study), {}
    for metric in METRICS:
        estimate = evidence.figure(model, metric)
        found[metric] = [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]
    facts = {"name": study.study.study, "model": model, "seeds": sorted(study.runs[model])}
    protocol = study.study.protocol
    return facts | {"n_test": protocol.n_test, "n_validation": protocol.n_validation, "mean_low_high": found}
