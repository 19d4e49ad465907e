"""What runs leave for the report: a folder a study, in it one JSON for the shared test events and one for each run.

    results/<study>/study.json                 data, protocol, and the test events that all runs of the study share
    results/<study>/<model>-seed<seed>.json    one trained model: config, costs, learning curve, the rank of each event
    results/<study>/test_events.json           instead of study.json where the study is one of ranking (ranking.study)
    results/notes.toml                         what a person has to say to claims and questions (report.notes)

In file names, `/` of a model's name is written `--`. Files are written whole or not at all. Whatever is wrong with one
is a `DataError` that names file and field. Reading also computes the run's figures anew from its ranks: files whose
figures and ranks tell different stories are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from pydantic import model_validator as validator

from learn.data import DataError, Dataset, Split
from learn.evaluation import metrics

FORMAT = 1
STUDY, RANKING = "study.json", "test_events.json"
StudyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
# Such as "learn-text" or, for an ablation of it, "learn-text/variant-2".
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*(/[a-z0-9][a-z0-9._+-]*)?$")]
Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    """A mistyped field is an error, and so is a number in quotes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(_Strict):
    """The whole data set, held-out events included. `digest`: see `digest`."""

    n_users: PositiveInt
    n_items: PositiveInt
    n_events: PositiveInt
    digest: Text


class Protocol(_Strict):
    """How many events of each user were held out, 0 if the log was cut in time. `notes` are further words on it."""

    n_test: NonNegativeInt
    n_validation: NonNegativeInt
    notes: list[Text] = []


class Study(_Strict):
    """What all runs of a study share. The lists have an entry for each test event.

    `user` and `item` are indices into the data set, `position` the event's place in the user's sequence, `item_count`
    how often training meets the target, `user_count` how many events of the user training reads.
    """

    format: Literal[1]
    kind: Literal["study"] = "study"
    study: StudyName
    data: Data
    protocol: Protocol
    user: list[NonNegativeInt] = Field(min_length=1)
    item: list[NonNegativeInt]
    position: list[NonNegativeInt]
    item_count: list[NonNegativeInt]
    user_count: list[NonNegativeInt]

    @validator(mode="after")
    def _lists_agree(self) -> Study:
        for name in ("item", "position", "item_count", "user_count"):
            if len(getattr(self, name)) != len(self.user):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.user)} in user")
        for name, bound in (("user", self.data.n_users), ("item", self.data.n_items)):
            if max(getattr(self, name)) >= bound:
                raise ValueError(f"{name} holds {max(getattr(self, name))}; expected less than {bound}")
        return self

    def groups(self) -> dict[str, np.ndarray]:
        """Masks over the test events, by name."""
        return metrics.groups(np.array(self.item_count), np.array(self.user_count))


class Seconds(_Strict):
    """Wall-clock time."""

    train: Annotated[FiniteFloat, Field(ge=0)]
    evaluate: Annotated[FiniteFloat, Field(ge=0)]


class Check(_Strict):
    """A point of the learning curve, on validation events."""

    step: NonNegativeInt
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    loss: FiniteFloat | None = None
    ndcg_at_10: FiniteFloat | None = None
    hr_at_10: FiniteFloat | None = None


class Run(_Strict):
    """One model trained with one seed. An ablation says what it is compared with, and which question it answers."""

    format: Literal[1]
    kind: Literal["retrieval"] = "retrieval"
    study: StudyName
    model: ModelName
    label: Text
    family: Literal["baseline", "learn", "ablation"]
    reference: ModelName | None = None
    question: Text | None = None
    seed: NonNegativeInt
    config: dict[str, Any]
    n_parameters: NonNegativeInt
    machine: Text
    seconds: Seconds
    curve: list[Check]
    rank: list[PositiveInt]
    top: dict[str, FiniteFloat]
    metrics: dict[str, dict[str, int | FiniteFloat]]

    @validator(mode="after")
    def _ablations_say_of_what(self) -> Run:
        if self.family == "ablation" and not (self.reference and self.question):
            raise ValueError("an ablation needs the fields reference and question")
        if self.reference == self.model:
            raise ValueError(f"reference: {self.model} is compared with itself")
        return self


@dataclass(frozen=True)
class StudyResults:
    """A study and its runs: model -> seed -> run, models and seeds in order."""

    study: Study
    runs: dict[str, dict[int, Run]]

    def one(self, model: str) -> Run:
        """Any run of the model, for what its seeds have in common."""
        return next(iter(self.runs[model].values()))


@dataclass(frozen=True)
class Results:
    """All that lies in a results folder: studies of retrieval by name, and the folders of ranking studies."""

    retrieval: dict[str, StudyResults] = field(default_factory=dict)
    ranking: list[Path] = field(default_factory=list)


# --- making and writing ----------------------------------------------------------------------------------------------


def describe(name: str, dataset: Dataset, split: Split, protocol: Protocol) -> Study:
    """The study that these test events make up. Raises ValueError if there are none."""
    if not split.test:
        raise ValueError(f"study {name}: the split holds out no test events")
    counts = np.zeros(len(dataset.item_ids), dtype=np.int64)
    n_events = 0
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        counts += np.bincount(sequence.items[:n_train], minlength=len(counts))
        n_events += len(sequence.items)
    item = [int(dataset.sequences[event.user].items[event.position]) for event in split.test]
    return Study(
        format=FORMAT,
        kind="study",
        study=name,
        data=Data(
            n_users=len(dataset.sequences), n_items=len(counts), n_events=n_events, digest=digest(dataset, split)
        ),
        protocol=protocol,
        user=[int(event.user) for event in split.test],
        item=item,
        position=[int(event.position) for event in split.test],
        item_count=counts[item].tolist(),
        user_count=[int(split.n_train[event.user]) for event in split.test],
    )


def digest(dataset: Dataset, split: Split) -> str:
    """SHA-256 in hex over item ids, every user's items in order, and how many of them training reads."""
    found = hashlib.sha256(json.dumps(dataset.item_ids).encode())
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        found.update(np.array([len(sequence.items), n_train, *sequence.items], dtype="<i8").tobytes())
    return found.hexdigest()


def measured(study: Study, ranking: metrics.Ranking, counts: np.ndarray) -> dict[str, Any]:
    """The fields `rank`, `top` and `metrics` of a run. counts [I]: training events of every item."""
    rank = np.asarray(ranking.rank)
    if len(rank) != len(study.user):
        raise ValueError(f"{len(rank)} ranks for the {len(study.user)} test events of study {study.study}")
    return {
        "rank": rank.tolist(),
        "top": metrics.top_figures(ranking.top, counts),
        "metrics": metrics.grouped(rank, np.array(study.user), study.groups()),
    }


def run_path(root: Path, study: str, model: str, seed: int) -> Path:
    """Where a run's JSON lies, there or not."""
    return root / study / f"{model.replace('/', '--')}-seed{seed}.json"


def write_study(root: Path, study: Study) -> Path:
    """Writes study.json. Raises ValueError if another study of that name is there: its runs would not be comparable."""
    path = root / study.study / STUDY
    if path.exists():
        if _parse(Study, path) != study:
            raise ValueError(f"{path} describes other data, another split or another protocol; choose another name")
        return path
    return _write(path, study)


def write_run(root: Path, run: Run) -> Path:
    """Writes a run, over an older one of the same model and seed. Raises `DataError` if it does not fit its study."""
    path = run_path(root, run.study, run.model, run.seed)
    study_path = root / run.study / STUDY
    if not study_path.exists():
        raise DataError(study_path, None, None, f"missing; write the study before its run {path.name}")
    _check_run(path, run, _parse(Study, study_path))
    return _write(path, run)


def _write(path: Path, record: BaseModel) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers from sharing a partial file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(record.model_dump_json(exclude_none=True) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path) -> Results:
    """Everything under `root`, in the order of names. Raises FileNotFoundError without the folder, else `DataError`."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; it holds a folder for each study")
    results = Results()
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (folder / STUDY).exists():
            results.retrieval[folder.name] = read_study(folder)
        elif (folder / RANKING).exists():
            results.ranking.append(folder)
        elif any(folder.glob("*.json")):
            raise DataError(folder, None, None, f"holds JSON files, but neither {STUDY} nor {RANKING}")
    return results


def read_study(folder: Path) -> StudyResults:
    """One study of retrieval with its runs, checked against each other."""
    study = _parse(Study, folder / STUDY)
    if study.study != folder.name:
        raise DataError(folder / STUDY, None, "study", f"is {study.study!r} in the folder {folder.name!r}")
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == STUDY:
            continue
        run = _parse(Run, path)
        _check_run(path, run, study)
        if path.name != run_path(folder.parent, run.study, run.model, run.seed).name:
            raise DataError(path, None, "model", f"holds {run.model!r} with seed {run.seed}, which the name denies")
        of_model = runs.setdefault(run.model, {})
        _check_alike(path, run, next(iter(of_model.values()), run))
        of_model[run.seed] = run
    return StudyResults(study, {model: dict(sorted(runs[model].items())) for model in sorted(runs)})


Record = TypeVar("Record", bound=BaseModel)


def read_run(path: Path) -> Run:
    """One run's JSON; `DataError` if it is not as described above."""
    return _parse(Run, path)


def _parse(kind: type[Record], path: Path) -> Record:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        given = f", got {first['input']!r}" if isinstance(first["input"], str | int | float) and where else ""
        raise DataError(path, None, where, first["msg"] + given) from error


def _check_run(path: Path, run: Run, study: Study) -> None:
    if run.study != study.study:
        raise DataError(path, None, "study", f"is {run.study!r}, but lies in that of {study.study!r}")
    if len(run.rank) != len(study.user):
        raise DataError(path, None, "rank", f"has {len(run.rank)} entries for {len(study.user)} test events")
    if max(run.rank) > study.data.n_items:
        raise DataError(path, None, "rank", f"holds {max(run.rank)}, but there are {study.data.n_items} items")
    again = metrics.grouped(np.array(run.rank), np.array(study.user), study.groups())
    for group, figures in run.metrics.items():
        for name, value in figures.items():
            expected = again.get(group, {}).get(name)
            if expected is not None and abs(value - expected) > 1e-4:
                where = f"metrics.{group}.{name}"
                raise DataError(path, None, where, f"is {value}, but the ranks give {round(expected, 6)}")


def _check_alike(path: Path, run: Run, other: Run) -> None:
    """Seeds of one model are averaged, so nothing but the seed may tell them apart."""
    for name in ("label", "family", "reference", "question", "n_parameters"):
        if getattr(run, name) != getattr(other, name):
            reason = f"is {getattr(run, name)!r}, but {getattr(other, name)!r} with seed {other.seed}"
            raise DataError(path, None, name, reason)
    for name in sorted((run.config.keys() | other.config.keys()) - {"seed"}):
        if run.config.get(name) != other.config.get(name):
            reason = f"is {run.config.get(name)!r}, but {other.config.get(name)!r} with seed {other.seed}"
            raise DataError(path, None, f"config.{name}", reason)
