"""What a study says of one model, for the manifest of a bundle that is one of its seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learn.content import embedding_store
from learn.run_settings import Settings
from learn.toml_config import as_read
from learn.training_run import Prompts, Run
from research.retrieval.estimates import StudyEstimates
from research.retrieval.result_files import data_digest, read_study

METRICS = ("hr_at_10", "ndcg_at_10", "hr_at_50", "mrr")


@dataclass(frozen=True)
class Subject:
    """The run that is to carry the figures."""

    settings: Settings
    # `result_files.digest` of its data and split; the key of its content embeddings (`embedding_store.cache_key`).
    data: str
    content: str
    # Runs whose towers its own began with.
    started_from: tuple[str, ...] = ()


def subject_of(run: Run) -> Subject:
    """What the figures of a study are compared with before a bundle of this run carries them."""
    dataset = run.dataset()
    data = data_digest(dataset, run.split(dataset))
    content = embedding_store.cache_key(run.source, Prompts(dataset.texts))
    return Subject(run.settings, data, content, run.started_from())


def figures_of(folder: Path, model: str, subject: Subject) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, from the JSONs in `folder`.

    ValueError if the study has no such model, or has it of other data, another encoder or other settings than the run
    that is to carry its figures, or if that run's towers are not what a study trains.
    """
    study = read_study(folder)
    if model not in study.runs:
        raise ValueError(f"{folder} has no runs of {model!r}, only of {', '.join(study.runs)}")
    if subject.started_from or subject.settings.cvr.tune_towers:
        how = "tuned with the head" if subject.settings.cvr.tune_towers else f"begun with {subject.started_from[-1]}'s"
        raise ValueError(f"{folder}: its figures are of towers trained from random weights; this run's were {how}")
    if study.study.data.digest != subject.data:
        raise ValueError(f"{folder}: its figures are of other data, or of another split, than this run")
    content = study.any_run(model).config.get("content") or ""
    if content.rpartition("-")[2] != subject.content[:32]:
        raise ValueError(f"{folder}: {model} was run with {content!r}, so with another encoder or other texts")
    theirs, ours = _flat(study.any_run(model).config), _flat(_as_config(subject.settings))
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            raise ValueError(f"{folder}: {model} was run with {key} = {theirs[key]!r}, this run with {ours[key]!r}")
    estimates, means = StudyEstimates(study), {}
    for metric in METRICS:
        estimate = estimates.mean(model, metric)
        means[metric] = [round(value, 5) for value in (estimate.value, estimate.low, estimate.high)]
    facts = {"name": study.study.study, "model": model, "seeds": sorted(study.runs[model])}
    protocol = study.study.protocol
    return facts | {"n_test": protocol.n_test, "n_validation": protocol.n_validation, "mean_low_high": means}


def _as_config(settings: Settings) -> dict[str, Any]:
    """In the words of a study's runs; what the two cannot share, seed and width of the content, is left out."""
    sizes, training = asdict(settings.pch), asdict(settings.train)
    del sizes["content_dim"], training["seed"]
    arm = {"standardise": settings.standardise, "ids": "none", "sizes": sizes}
    return as_read({"arm": arm, "train": training, "split": asdict(settings.held_out())})


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
