"""The results of retrieval studies on disk: one folder per study, with one file for the study and one per run.

    results/<study>/study.npz                  data, protocol, and the test events that all runs of the study share
    results/<study>/<model>-seed<seed>.npz     one trained model: config, costs, learning curve, the rank of each event

`record_files` says what such a file looks like. Studies of ranking models lie beside them (`ranking.result_files`). In
file names, `/` of a model's name is written `--`. Whatever is wrong with a file is a `DataError` that names file and
field.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt
from pydantic import model_validator as validator

from learn.data import DataError, Dataset, Split
from learn.evaluation import metrics
from research import record_files
from research.record_files import (
    CVR_STUDY_FILE,
    RANKING_STUDY_FILE,
    RETRIEVAL_STUDY_FILE,
    Column,
    Record,
    RunRecord,
    Strict,
)

StudyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
# Such as "learn-text" or, for an ablation of it, "learn-text/variant-2".
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*(/[a-z0-9][a-z0-9._+-]*)?$")]
Text = Annotated[str, Field(min_length=1)]


class Data(Strict):
    """Sizes of the whole data set, held-out events included, and its digest (`data_digest`)."""

    n_users: PositiveInt
    n_items: PositiveInt
    n_events: PositiveInt
    digest: Text


class Protocol(Strict):
    """How many events of each user were held out; 0 if the log was split by time. `notes` are printed with it."""

    n_test: NonNegativeInt
    n_validation: NonNegativeInt
    notes: list[Text] = Field(default_factory=list)


class Study(Record):
    """What all runs of a study share. Each array has one entry per test event.

    `user` is an index into the data set, `item_count` the number of training events of the target item, `user_count`
    that of the user. The items themselves are not here: results may be published where the data may not.
    """

    kind: Literal["retrieval study"] = "retrieval study"
    study: StudyName
    data: Data
    protocol: Protocol
    user: Column
    item_count: Column
    user_count: Column

    @validator(mode="after")
    def _arrays_agree(self) -> Study:
        if not len(self.user):
            raise ValueError("a study needs test events")
        for name in ("item_count", "user_count"):
            if len(getattr(self, name)) != len(self.user):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.user)} in user")
        if self.user.max() >= self.data.n_users:
            raise ValueError(f"user holds {self.user.max()}; expected less than {self.data.n_users}")
        return self

    def groups(self) -> dict[str, np.ndarray]:
        """Group name -> mask over the test events."""
        return metrics.groups(self.item_count, self.user_count)


class Seconds(Strict):
    """Wall-clock time."""

    train: Annotated[FiniteFloat, Field(ge=0)]
    evaluate: Annotated[FiniteFloat, Field(ge=0)]


class CurvePoint(Strict):
    """One point of the learning curve, measured on validation events."""

    step: NonNegativeInt
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    loss: FiniteFloat | None = None
    ndcg_at_10: FiniteFloat | None = None
    hr_at_10: FiniteFloat | None = None


class Choice(Strict):
    """Settings that were tried on validation apart from the learning curve, such as the weight of a content skip.

    `ndcg_at_10_few` is that of the events whose item has fewer than five training events, where it decides, too.
    """

    settings: dict[str, FiniteFloat]
    ndcg_at_10: FiniteFloat
    ndcg_at_10_few: FiniteFloat | None = None
    taken: bool


class Run(RunRecord):
    """One model trained with one seed.

    `rank` has the target's rank for each test event, from 1. An ablation names the model that it is compared with
    (`reference`) and the question that it answers. `data` is the digest of the study's data and split; files of format
    2 do not have it.
    """

    kind: Literal["retrieval run"] = "retrieval run"
    study: StudyName
    model: ModelName
    label: Text
    family: Literal["baseline", "learn", "ablation"]
    reference: ModelName | None = None
    question: Text | None = None
    seed: NonNegativeInt
    data: Text | None = None
    config: dict[str, Any]
    choices: list[Choice] = Field(default_factory=list)
    n_parameters: NonNegativeInt
    machine: Text
    seconds: Seconds
    curve: list[CurvePoint]
    top: dict[str, FiniteFloat]
    rank: Column

    @validator(mode="after")
    def _is_consistent(self) -> Run:
        if self.family == "ablation" and not (self.reference and self.question):
            raise ValueError("an ablation needs the fields reference and question")
        if self.format >= record_files.FORMAT and self.data is None:
            raise ValueError(f"a run of format {self.format} needs the field data")
        if self.reference == self.model:
            raise ValueError(f"reference: {self.model} is compared with itself")
        if len(self.rank) and self.rank.min() < 1:
            raise ValueError("rank holds 0; ranks begin at 1")
        return self


@dataclass(frozen=True)
class StudyResults:
    """A study and its runs: model -> seed -> run, models and seeds in order."""

    study: Study
    runs: dict[str, dict[int, Run]]

    def any_run(self, model: str) -> Run:
        """A run of the model, for the fields that all of its seeds share."""
        return next(iter(self.runs[model].values()))


@dataclass(frozen=True)
class Results:
    """Everything in a results folder: retrieval studies by name, and the folders of ranking studies."""

    retrieval: dict[str, StudyResults] = field(default_factory=dict)
    ranking: list[Path] = field(default_factory=list)


# --- making and writing ----------------------------------------------------------------------------------------------


def describe(name: str, dataset: Dataset, split: Split, protocol: Protocol) -> Study:
    """The study record for these test events. Raises ValueError if there are none."""
    if not split.test:
        raise ValueError(f"study {name}: the split holds out no test events")
    counts = np.zeros(len(dataset.item_ids), dtype=np.int64)
    n_events = 0
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        counts += np.bincount(sequence.items[:n_train], minlength=len(counts))
        n_events += len(sequence.items)
    item = np.array([dataset.sequences[event.user].items[event.position] for event in split.test])
    digest = data_digest(dataset, split)
    return Study(
        study=name,
        data=Data(n_users=len(dataset.sequences), n_items=len(counts), n_events=n_events, digest=digest),
        protocol=protocol,
        user=np.array([event.user for event in split.test]),
        item_count=counts[item],
        user_count=np.array([split.n_train[event.user] for event in split.test]),
    )


def data_digest(dataset: Dataset, split: Split) -> str:
    """SHA-256 in hex over item ids, every user's items in order, and how many of them training reads."""
    digest = hashlib.sha256(json.dumps(dataset.item_ids).encode())
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        digest.update(np.array([len(sequence.items), n_train, *sequence.items], dtype="<i8").tobytes())
    return digest.hexdigest()


def measured(study: Study, ranking: metrics.Ranking, counts: np.ndarray) -> dict[str, Any]:
    """The fields `rank`, `top` and `data` of a run. counts [I]: training events of every item."""
    rank = np.asarray(ranking.rank)
    if len(rank) != len(study.user):
        raise ValueError(f"{len(rank)} ranks for the {len(study.user)} test events of study {study.study}")
    return {"rank": rank, "top": metrics.top_figures(ranking.top, counts), "data": study.data.digest}


def run_path(root: Path, study: str, model: str, seed: int) -> Path:
    """Where the file of a run is, whether it exists or not."""
    return record_files.run_path(root / study, model, seed)


def write_study(root: Path, study: Study) -> Path:
    """Writes study.npz. Raises ValueError if a different study has that name: its runs would not be comparable."""
    path = root / study.study / RETRIEVAL_STUDY_FILE
    if path.exists():
        if not record_files.read(path, Study).equals(study):
            raise ValueError(f"{path} describes other data, another split or another protocol; choose another name")
        return path
    return record_files.write(path, study)


def write_run(root: Path, run: Run) -> Path:
    """Writes a run, over an older one of the same model and seed. Raises `DataError` if it does not fit its study."""
    path = run_path(root, run.study, run.model, run.seed)
    study_path = root / run.study / RETRIEVAL_STUDY_FILE
    if not study_path.exists():
        raise DataError(study_path, None, None, f"missing; write the study before its run {path.name}")
    _check_run(path, run, record_files.read(study_path, Study))
    return record_files.write(path, run)


# --- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path) -> Results:
    """Everything under `root`, in the order of names. Raises FileNotFoundError without the folder, else `DataError`."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; it holds a folder for each study")
    results = Results()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (folder / RETRIEVAL_STUDY_FILE).exists():
            results.retrieval[folder.name] = read_study(folder)
        elif (folder / RANKING_STUDY_FILE).exists():
            results.ranking.append(folder)
        elif (folder / CVR_STUDY_FILE).exists():
            continue  # Studies of the head have a summary of their own, `learn cvr-study`.
        elif any(folder.glob("*.npz")):
            raise DataError(
                folder, None, None, f"holds results, but neither {RETRIEVAL_STUDY_FILE} nor {RANKING_STUDY_FILE}"
            )
    return results


def read_study(folder: Path) -> StudyResults:
    """One retrieval study with its runs, checked against each other."""
    study = record_files.read(folder / RETRIEVAL_STUDY_FILE, Study)
    if study.study != folder.name:
        raise DataError(
            folder / RETRIEVAL_STUDY_FILE, None, "study", f"is {study.study!r} in the folder {folder.name!r}"
        )
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*.npz")):
        if path.name == RETRIEVAL_STUDY_FILE:
            continue
        run = read_run(path)
        _check_run(path, run, study)
        if path.name != run_path(folder.parent, run.study, run.model, run.seed).name:
            raise DataError(path, None, "model", f"is {run.model!r} with seed {run.seed}, but the file name differs")
        seeds = runs.setdefault(run.model, {})
        if seeds:
            _check_only_seed_differs(path, run, next(iter(seeds.values())))
        seeds[run.seed] = run
    return StudyResults(study, {model: dict(sorted(runs[model].items())) for model in sorted(runs)})


def read_run(path: Path) -> Run:
    """The file of one run; `DataError` if it is not as described above."""
    return record_files.read(path, Run)


def _check_run(path: Path, run: Run, study: Study) -> None:
    if run.study != study.study:
        raise DataError(path, None, "study", f"is {run.study!r}, but the file is in the folder of {study.study!r}")
    if run.data not in (None, study.data.digest):
        reason = f"is of other data or another split than its study; run `learn study --only {run.model}` again"
        raise DataError(path, None, "data", reason)
    if len(run.rank) != len(study.user):
        raise DataError(path, None, "rank", f"has {len(run.rank)} entries for {len(study.user)} test events")
    if run.rank.max() > study.data.n_items:
        raise DataError(path, None, "rank", f"holds {run.rank.max()}, but there are {study.data.n_items} items")


def _check_only_seed_differs(path: Path, run: Run, other: Run) -> None:
    """Figures are means over the seeds of a model, so its runs may differ in nothing but the seed."""
    for name in ("label", "family", "reference", "question", "n_parameters"):
        if getattr(run, name) != getattr(other, name):
            reason = f"is {getattr(run, name)!r}, but {getattr(other, name)!r} with seed {other.seed}"
            raise DataError(path, None, name, reason)
    for name in sorted((run.config.keys() | other.config.keys()) - {"seed"}):
        if run.config.get(name) != other.config.get(name):
            reason = f"is {run.config.get(name)!r}, but {other.config.get(name)!r} with seed {other.seed}"
            raise DataError(path, None, f"config.{name}", reason)
