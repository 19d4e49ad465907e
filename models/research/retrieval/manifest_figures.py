"""The figures of one model in a study, for the manifest of a bundle that holds one seed of the model."""

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
    """The run whose bundle will carry the figures.

    `data` is the `data_digest` of its data and split, `content` the key of its content embeddings
    (`embedding_store.cache_key`), and `started_from` has the runs whose towers it started with.
    """

    settings: Settings
    data: str
    content: str
    started_from: tuple[str, ...] = ()


def subject_of(run: Run) -> Subject:
    """The facts of a run that have to agree with the study."""
    dataset = run.dataset()
    data = data_digest(dataset, run.split(dataset))
    content = embedding_store.cache_key(run.trained_source, Prompts(dataset.texts))
    return Subject(run.settings, data, content, run.started_from())


def figures_of(folder: Path, model: str, subject: Subject) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, from the study in `folder`.

    ValueError if the study does not have the model, or has it with other data, another encoder or other settings than
    the subject, or if the subject's towers were not trained from random weights without the head.
    """
    study = read_study(folder)
    if model not in study.runs:
        raise ValueError(f"{folder} has no runs of {model!r}, only of {', '.join(study.runs)}")
    if subject.started_from or subject.settings.cvr.tune_towers:
        how = f"started from {subject.started_from[-1]}'s" if subject.started_from else "tuned with the head"
        raise ValueError(f"{folder}: its figures are for towers trained from random weights; this run's were {how}")
    if study.study.data.digest != subject.data:
        raise ValueError(f"{folder}: its figures are for other data or another split than this run's")
    content = study.any_run(model).config.get("content") or ""
    if content.rpartition("-")[2] != subject.content[:32]:
        raise ValueError(f"{folder}: {model} was run with {content!r}, which is another encoder or other texts")
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
    """The settings in the form of a study's `config`, without those that differ anyway: seed and content width."""
    sizes, training = settings.pch.recorded(), settings.train.recorded()
    del sizes["content_dim"], training["seed"]
    arm = {"standardise": settings.standardise, "ids": "none", "sizes": sizes}
    return as_read({"arm": arm, "train": training, "split": asdict(settings.chosen_split())})


def _flat(table: dict[str, Any], above: str = "") -> dict[str, Any]:
    found = {}
    for key, value in table.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found
