"""What a study says of one model, for the manifest of a bundle that is one of its seeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from learn.evidence import Evidence
from learn.results import read_study
from learn.settings import Settings

METRICS = ("hr_at_10", "ndcg_at_10", "hr_at_50", "mrr")


def figures_of(folder: Path, model: str, settings: Settings) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, from the JSONs in `folder`.

    ValueError if the study has no such model, or has it with other settings than the run that is to carry its figures.
    """
    study = read_study(folder)
    if model not in study.runs:
        raise ValueError(f"{folder} has no runs of {model!r}, only of {', '.join(study.runs)}")
    theirs, ours = _flat(study.one(model).config), _flat(_as_config(settings))
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            raise ValueError(f"{folder}: {model} was run with {key} = {theirs[key]!r}, this run with {ours[key]!r}")
    evidence, found = Evidence(study), {}
    for metric in METRICS:
        estimate = evidence.figure(model, metric)
        found[metric] = [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]
    facts = {"name": study.study.study, "model": model, "seeds": sorted(study.runs[model])}
    protocol = study.study.protocol
    return facts | {"n_test": protocol.n_test, "n_validation": protocol.n_validation, "mean_low_high": found}


def _as_config(settings: Settings) -> dict[str, Any]:
    """In the words of a study's runs; what the two cannot share, seed and width of the content, is left out."""
    sizes, training = asdict(settings.pch), asdict(settings.train)
    del sizes["content_dim"], training["seed"]
    arm = {"standardise": settings.standardise, "ids": "none", "sizes": sizes}
    return {"arm": arm, "train": training, "split": asdict(settings.held_out())}


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
