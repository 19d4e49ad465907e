"""The same tuning budget for every model, recorded trial by trial.

A TOML file names a study, the number of trials, and for each model the values that its settings may take:

    study = "ml-latest-small.toml"      beside this file, or a path from it
    n_trials = 12

    [models.sasrec.sizes]
    width = [64, 128]
    dropout = [0.2, 0.35, 0.5]

    [models.sasrec.train]
    learning_rate = [5e-4, 1e-3]

Every model gets `n_trials` different points of its own grid, drawn at random (Bergstra and Bengio, JMLR 2012), and all
are trained with one seed. What a grid does not name is as in the study. Only validation is measured: the part of the
split that trials see has no test events. Neither a content skip nor EASE's factors are part of a trial: the study
attaches them after training.

The record is a file of JSON lines, one per trial. A trial that is in it is not repeated while its settings, content and
data are the same, so tuning that was stopped continues, and a larger `n_trials` adds to what is there. Code that has
changed since does not count; each line has its commit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from learn import data
from learn.toml_config import strict
from learn.training import data_parallel
from learn.training.listeners import Losses
from learn.training.run_length import FIGURE
from learn.training.train_config import TrainConfig
from learn.training.train_recommender import train
from research import provenance
from research.retrieval import result_files
from research.retrieval.arms import ITEM_TO_ITEM, WITHOUT_RANDOMNESS, Arm, Inputs, build, content_name
from research.retrieval.study import Study, only, planned_training, read_study, run_config
from research.retrieval.workers import Report, work_off

Values = Annotated[list[Any], Field(min_length=1)]


@dataclass(frozen=True)
class Grid:
    """The values that settings of one model may take, by name; of `sizes` and of `train`, as in a study's entry."""

    sizes: dict[str, Values] = field(default_factory=dict)
    train: dict[str, Values] = field(default_factory=dict)

    def axes(self) -> list[tuple[str, str, list[Any]]]:
        """(table, name, values) of each setting."""
        return [(table, name, values) for table, axis in self._tables() for name, values in axis.items()]

    def _tables(self) -> tuple[tuple[str, dict[str, list[Any]]], ...]:
        return ("sizes", self.sizes), ("train", self.train)

    def n_points(self) -> int:
        """The number of points of the grid."""
        return math.prod(len(values) for _, _, values in self.axes())


@dataclass(frozen=True)
class Budget:
    """The TOML file. `seed` decides which points are drawn, and is the seed of every trial's training."""

    study: str
    n_trials: int
    models: dict[str, Grid]
    seed: int = 1

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise ValueError(f"n_trials is {self.n_trials}; expected at least 1")
        for name, grid in self.models.items():
            for table, key, values in grid.axes():
                if any(value in values[:place] for place, value in enumerate(values)):
                    raise ValueError(f"models.{name}.{table}.{key} is {values}; name each value once")
            if grid.n_points() < self.n_trials:
                raise ValueError(
                    f"models.{name} has {grid.n_points()} points for {self.n_trials} trials; add values to its grid or "
                    "lower n_trials, so that every model gets equally many trials"
                )


@dataclass(frozen=True)
class Settings:
    """One point of a grid."""

    sizes: dict[str, Any]
    train: dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One line of the record.

    `ndcg_at_10` is the best of the checks on validation, which was after `best_step` of `steps` steps. `key` is a
    digest of everything that decides the result apart from the code, which is `commit`.
    """

    model: str
    number: int
    settings: Settings
    ndcg_at_10: float
    best_step: int
    steps: int
    seconds: float
    n_parameters: int
    seed: int
    key: str
    commit: str


@dataclass(frozen=True)
class _Job:
    """A trial that is to be run."""

    model: str
    number: int
    settings: Settings
    arm: Arm
    train: TrainConfig
    key: str


@dataclass(frozen=True)
class _Bench:
    """What all trials share: the study, its inputs, and the folder of their checkpoints."""

    study: Study
    inputs: Inputs
    folder: Path


def read_budget(path: Path) -> tuple[Study, Budget]:
    """A tuning file, and of the study that it names the models that are tuned. ValueError names every wrong key."""
    try:
        budget = strict(Budget, tomllib.loads(path.read_text(encoding="utf-8")), "")
        study = read_study(path.parent / budget.study)
        _check(study, budget)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return only(study, list(budget.models)), budget


def _check(study: Study, budget: Budget) -> None:
    for name in budget.models:
        if name not in study.models:
            raise ValueError(f"models.{name}: study {study.study} has {', '.join(study.models)}")
        kind = study.models[name].kind
        if kind in ITEM_TO_ITEM:
            raise ValueError(f"models.{name}: kind {kind!r} tries its own grid in the study; leave it out here")
        if kind in WITHOUT_RANDOMNESS:
            raise ValueError(f"models.{name}: kind {kind!r} is not trained, so it has nothing to tune")
    # The study checks every value of every grid, whether it is drawn or not.
    for name, grid in budget.models.items():
        for table, key, values in grid.axes():
            for value in values:
                _with(study, name, Settings(**({"sizes": {}, "train": {}} | {table: {key: value}})))


def draw(budget: Budget, model: str) -> list[Settings]:
    """The points of the model's grid that are tried, all different. A larger budget begins with those of a smaller one.

    They depend on the seed and the model alone, and not on the other models of the file.
    """
    grid = budget.models[model]
    axes = grid.axes()
    rng = np.random.default_rng([budget.seed, zlib.crc32(model.encode())])
    found = []
    for place in rng.permutation(grid.n_points())[: budget.n_trials].tolist():
        tables: dict[str, dict[str, Any]] = {"sizes": {}, "train": {}}
        index = np.unravel_index(place, [len(values) for _, _, values in axes])
        for (table, name, values), at in zip(axes, index, strict=True):
            tables[table][name] = values[int(at)]
        found.append(Settings(**tables))
    return found


def run_command(study: Study, budget: Budget, inputs: Inputs, out: Path, n_workers: int) -> None:
    """`learn tune`: runs what is missing in `out`, and prints the best trial of each model."""
    for line in summary(budget, tune(study, budget, inputs, out, n_workers)):
        print(line)


def tune(study: Study, budget: Budget, inputs: Inputs, out: Path, n_workers: int = 1) -> list[Trial]:
    """Runs the trials that `out` does not have yet, `n_workers` at a time, and returns all trials of this budget.

    Each trial has one thread and is appended to `out` when it ends. `out`.run holds checkpoints meanwhile. A trial that
    fails costs no other trial; if any did, a ValueError at the end says so.
    """
    bench = _Bench(study, inputs, out.with_suffix(".run"))
    jobs = list(_jobs(study, budget, inputs))
    known = {trial.key: trial for trial in read_trials(out)}
    missing = [job for job in jobs if job.key not in known]
    out.parent.mkdir(parents=True, exist_ok=True)
    n_failed = 0
    with closing(work_off(partial(_run, bench), missing, n_workers)) as events:
        for event in events:
            name = f"{missing[event.index].model}, trial {missing[event.index].number} of {budget.n_trials}"
            if event.kind == "done":
                known[event.content.key] = event.content
                _append(out, event.content)
                print(f"{name}: NDCG@10 {event.content.ndcg_at_10:.4f} on validation", flush=True)
            elif event.kind == "failed":
                n_failed += 1
                print(f"{name} FAILED: {event.content}", flush=True)
    if n_failed:
        raise ValueError(f"{n_failed} of {len(missing)} trials failed; see above, and run the same command again")
    shutil.rmtree(bench.folder, ignore_errors=True)
    return [known[job.key] for job in jobs]


def _jobs(study: Study, budget: Budget, inputs: Inputs) -> Iterator[_Job]:
    """All trials, the first one of every model before the second one of any: a stopped tuning is fair, too."""
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    if not split.validation:
        raise ValueError(f"study {study.study} holds out no validation events, so there is nothing to tune on")
    digest = result_files.data_digest(inputs.dataset, split)
    drawn = {model: draw(budget, model) for model in budget.models}
    for number in range(budget.n_trials):
        for model, points in drawn.items():
            # EASE's factors are attached after training, like a content skip.
            arm = replace(_with(study, model, points[number]).models[model], ease_dim=0)
            config = run_config(study, arm, split) | {"content": content_name(arm, inputs), "seed": budget.seed}
            described = json.dumps([model, config, digest], sort_keys=True)
            key = hashlib.sha256(described.encode()).hexdigest()[:16]
            training = replace(planned_training(study, arm, split), seed=budget.seed)
            yield _Job(model, number + 1, points[number], arm, training, key)


def _with(study: Study, model: str, settings: Settings) -> Study:
    arm = study.models[model]
    changed = replace(arm, sizes=arm.sizes | settings.sizes, train=arm.train | settings.train)
    return replace(study, models=study.models | {model: changed})


def _run(bench: _Bench, job: _Job, report: Report) -> Trial:
    # Asked for first, because a long trial may outlive the code that it has loaded.
    commit = provenance.commit()
    dataset = bench.inputs.dataset
    split = data.split(dataset.sequences, bench.study.chosen_split())
    torch.manual_seed(job.train.seed)
    model = build(job.arm, bench.inputs).to(data_parallel.device())
    # Without the test events, no trial can be chosen by them.
    curve = train(job.train, model, dataset, replace(split, test=[]), bench.folder / job.key, listener=_Silent())
    best = max(curve, key=lambda check: check[FIGURE])
    return Trial(
        model=job.model,
        number=job.number,
        settings=job.settings,
        ndcg_at_10=best[FIGURE],
        best_step=int(best["step"]),
        steps=job.train.steps,
        seconds=curve[-1]["seconds"],
        n_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        seed=job.train.seed,
        key=job.key,
        commit=commit,
    )


class _Silent:
    """Several trials run at once, so none of them may draw a progress bar."""

    def step(self, number: int, losses: Losses, learning_rate: float) -> None:
        pass

    def check(self, record: Mapping[str, float]) -> None:
        pass

    def end(self, warnings: Sequence[str]) -> None:
        pass


def read_trials(path: Path) -> list[Trial]:
    """The trials of a record, in its order; none if there is no file. ValueError names the line that cannot be read."""
    if not path.is_file():
        return []
    trials = []
    for number, line in enumerate(_whole_lines(path).splitlines(), start=1):
        try:
            trials.append(strict(Trial, json.loads(line), ""))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return trials


def _whole_lines(path: Path) -> str:
    """The text without a last line that was cut off when the machine stopped while it was written."""
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1]


def _append(path: Path, trial: Trial) -> None:
    if path.is_file():
        os.truncate(path, len(_whole_lines(path).encode()))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(trial)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def best_of(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The best trial of each model on validation; of equal ones, the first."""
    found: dict[str, Trial] = {}
    for trial in trials:
        if trial.model not in found or trial.ndcg_at_10 > found[trial.model].ndcg_at_10:
            found[trial.model] = trial
    return found


def summary(budget: Budget, trials: Sequence[Trial]) -> list[str]:
    """One line per model: its best trial, and which of the chosen values lie at an end of their axis.

    At an end, a better value may lie beyond it, so the grid should be wider.
    """
    lines = []
    for model, trial in best_of(trials).items():
        chosen = trial.settings.sizes | trial.settings.train
        ends = [name for _, name, values in budget.models[model].axes() if _is_at_an_end(chosen[name], values)]
        settings = ", ".join(f"{name} {value}" for name, value in chosen.items())
        where = f"trial {trial.number} of {budget.n_trials}, step {trial.best_step} of {trial.steps}"
        note = f"; at an end of the grid: {', '.join(ends)}" if ends else ""
        lines.append(f"{model}: NDCG@10 {trial.ndcg_at_10:.4f} on validation ({where}): {settings}{note}")
    commits = sorted({trial.commit for trial in trials})
    if len(commits) > 1:
        lines.append(f"these trials ran different versions of the code: {', '.join(commits)}")
    return lines


def _is_at_an_end(value: Any, values: Sequence[Any]) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(values) > 2 and len(numbers) == len(values) and value in (min(numbers), max(numbers))
