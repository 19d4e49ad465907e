"""A study: several models and several seeds under one protocol, with one file per run for `learn report`.

All models of a study have the same split, events, loss, candidates and number of steps unless a model's entry says
otherwise. The weights that are best on validation are measured on the test events, once, at the end of a run.

A run whose file exists with the same config is not repeated, so a study that was stopped continues where it was.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from learn import data
from learn.content import ceg, embedding_store
from learn.data.splits import SplitSettings
from learn.evaluation.full_ranking import popularity
from learn.models.pch import PchConfig
from learn.run_settings import EncoderSettings, PrepareSettings, read_toml
from learn.toml_config import as_read, strict
from learn.training import run_length
from learn.training.train_config import TrainConfig
from learn.training_run import Prompts, prepare_config
from research import provenance
from research.retrieval import measured_models, result_files
from research.retrieval.arms import (
    ITEM_TO_ITEM,
    SIZES,
    WITH_CONTENT,
    WITH_EASE,
    WITHOUT_RANDOMNESS,
    Arm,
    Content,
    Inputs,
    content_name,
)
from research.retrieval.prepare_once import prepare_once
from research.retrieval.progress import PlannedRun, Progress, Timed, closing_table
from research.retrieval.workers import Report, work_off

# Tags per item, where a content has keywords.
N_KEYWORDS = 8


@dataclass(frozen=True)
class Study(SplitSettings):
    """The TOML file."""

    study: str
    seeds: list[int]
    train: TrainConfig
    contents: dict[str, Content]
    models: dict[str, Arm]
    # As in `run_settings`.
    split: data.SplitConfig = field(default_factory=data.SplitConfig)
    time_split: data.TimeSplitConfig | None = None
    prepare: PrepareSettings = field(default_factory=PrepareSettings)

    def __post_init__(self) -> None:
        for name, arm in self.models.items():
            if arm.content not in self.contents:
                raise ValueError(f"models.{name}.content: {arm.content!r} is none of {sorted(self.contents)}")
            if set(arm.train) & {"seed"}:
                raise ValueError(f"models.{name}.train: seeds belong to the study")
            self.training_of(arm, f"models.{name}.train")
            if arm.kind in SIZES:
                strict(SIZES[arm.kind], arm.sizes, f"models.{name}.sizes")
            if arm.ease_dim and arm.kind not in WITH_EASE:
                raise ValueError(f"models.{name}.ease_dim: only {', '.join(WITH_EASE)} can have factors of EASE")
            if arm.ease_dim < 0:
                raise ValueError(f"models.{name}.ease_dim is {arm.ease_dim}; expected 0 (none) or more")
            if arm.sizes.get("actions"):
                raise ValueError(f"models.{name}.sizes.actions: these studies read no actions from the log")

    def runs(self) -> list[tuple[str, int]]:
        """Every (model, seed) by seed, ablations last, so that a study that is stopped has all main models."""
        pairs = [(name, seed) for seed in self.seeds for name in self.models]
        pairs.sort(key=lambda pair: self.models[pair[0]].family == "ablation")
        return [(name, seed) for name, seed in pairs if seed in self.seeds_of(self.models[name])]

    def training_of(self, arm: Arm, where: str = "train") -> TrainConfig:
        """How the arm is trained."""
        return strict(TrainConfig, asdict(self.train) | arm.train, where)

    def seeds_of(self, arm: Arm) -> list[int]:
        """The seeds of the arm: one if it has no randomness."""
        n_seeds = len(self.seeds) if arm.n_seeds is None else arm.n_seeds
        return self.seeds[: min(n_seeds, 1) if arm.kind in WITHOUT_RANDOMNESS else n_seeds]


def read_study(path: Path) -> Study:
    """A study's TOML. Unknown keys and wrong types are errors that name the key."""
    study = read_toml(Study, path)
    for name, arm in study.models.items():
        if arm.reference and arm.reference not in study.models:
            raise ValueError(f"{path}: models.{name}.reference: {arm.reference!r} is not a model of this study")
    return study


def only(study: Study, names: Sequence[str]) -> Study:
    """The study with some of its models. Models that these are compared with may be missing."""
    unknown = sorted(set(names) - set(study.models))
    if unknown:
        raise ValueError(f"--only {unknown[0]}: this study has {', '.join(study.models)}")
    return replace(study, models={name: study.models[name] for name in names})


def inputs_of(study: Study, source: Path | str, run: Path, encoders: Path) -> Inputs:
    """Prepares the data set in `source` and encodes its items for every content that a model of the study needs.

    What is there already, from the same files with the same settings, is neither prepared nor encoded again.
    """
    needed = {arm.content for arm in study.models.values() if arm.kind in WITH_CONTENT}
    content, plain = {}, prepare_config(study.prepare, study.chosen_split())
    prepare_once(source, run / "data", plain)
    if any(study.contents[name].keywords for name in needed):
        prepare_once(source, run / "data-keywords", replace(plain, max_keywords=N_KEYWORDS))
    for name in sorted(needed):
        entry = study.contents[name]
        folder = run / ("data-keywords" if entry.keywords else "data")
        encoder = ceg.EncoderFolder(encoders / entry.encoder, EncoderSettings.max_tokens)
        content[name] = embedding_store.encode_to_file(
            encoder, Prompts(data.read_prepared(folder).texts), run / "cache"
        )
    folders = {name: encoders / entry.encoder for name, entry in study.contents.items()}
    return Inputs(data.read_prepared(run / "data"), content, folders)


def planned_runs(study: Study, inputs: Inputs, split: data.Split) -> list[PlannedRun]:
    """All runs of the study with the settings that their files record, in the order in which they run."""
    found = []
    for name, seed in study.runs():
        arm = study.models[name]
        config = run_config(study, arm, split) | {"content": content_name(arm, inputs), "seed": seed}
        steps = 0 if arm.kind in WITHOUT_RANDOMNESS else config["train"]["steps"]
        found.append(PlannedRun(name, seed, arm.kind, steps, config))
    return found


@dataclass(frozen=True)
class Bench:
    """What all runs of a study share: the study, its inputs, and the folder of all results."""

    study: Study
    inputs: Inputs
    root: Path
    # The digest of the data and the split.
    data: str

    def path(self, run: PlannedRun) -> Path:
        """The file of a run."""
        return result_files.run_path(self.root, self.study.study, run.model, run.seed)

    def finished(self, run: PlannedRun) -> result_files.Run | None:
        """The record of a run, if its file exists with the same config and data."""
        path = self.path(run)
        if not path.is_file():
            return None
        record = result_files.read_run(path)
        return record if (record.config, record.data) == (run.config, self.data) else None


def _bench(study: Study, inputs: Inputs, root: Path, split: data.Split) -> Bench:
    return Bench(study, inputs, root, result_files.data_digest(inputs.dataset, split))


def run_one(bench: Bench, run: PlannedRun, report: Report) -> None:
    """Trains one model with one seed and writes its file. `report` gets each check of `train`."""
    provenance.commit()  # Before training: the first call in a process decides.
    study, inputs, path = bench.study, bench.inputs, bench.path(run)
    arm = study.models[run.model]
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    counts = popularity(inputs.dataset, split)
    if arm.kind == "popularity":
        ranking, costs = measured_models.popular(inputs, split, counts)
    elif arm.kind in ITEM_TO_ITEM:
        ranking, costs = measured_models.item_to_item(arm, inputs, split)
    else:
        config = replace(planned_training(study, arm, split), seed=run.seed)
        if config.tensorboard:  # Each run needs a folder of its own there.
            config = replace(config, tensorboard=str(Path(config.tensorboard) / path.stem))
        ranking, costs = measured_models.trained(config, arm, inputs, split, path.with_suffix(".run"), report)
    shared = describe(study, inputs.dataset, split)
    record = result_files.Run(
        study=study.study,
        model=run.model,
        **arm.shown(),
        seed=run.seed,
        config=run.config,
        machine=machine(),
        **costs,
        **result_files.measured(shared, ranking, counts),
    )
    result_files.write_run(bench.root, record)
    shutil.rmtree(path.with_suffix(".run"), ignore_errors=True)


def describe(study: Study, dataset: data.Dataset, split: data.Split) -> result_files.Study:
    """The record of what all runs of the study share."""
    by_time = study.time_split is not None
    n_test, n_validation = (0, 0) if by_time else (study.split.n_test, study.split.n_validation)
    protocol = result_files.Protocol(n_test=n_test, n_validation=n_validation)
    return result_files.describe(study.study, dataset, split, protocol)


# The fields of an arm that its runs depend on, apart from `sizes` and `train`.
_RECORDED = ("kind", "content", "standardise", "ids", "id_dropout")


def run_config(study: Study, arm: Arm, split: data.Split | None = None) -> dict[str, Any]:
    """The settings that a run depends on, without its seed and content, as its file records them.

    A file has the length in steps. Without `split`, a length that the study gives in epochs stays in epochs.
    """
    recorded = {key: value for key, value in asdict(arm).items() if key in _RECORDED}
    if arm.ease_dim:
        recorded["ease_dim"] = arm.ease_dim
    # Defaults are written out, so that a run with other defaults counts as another run.
    sizes = strict(SIZES[arm.kind], arm.sizes, "sizes") if arm.kind in SIZES else None
    if isinstance(sizes, PchConfig):
        recorded["sizes"] = sizes.recorded()
    else:
        recorded["sizes"] = {} if sizes is None else asdict(sizes)
    given = study.training_of(arm)
    training = (given if split is None else planned_training(study, arm, split)).recorded()
    del training["seed"]
    # A run has its length in steps, so it also says from how many epochs they follow.
    length = {} if given.steps else {"epochs": given.epochs}
    return as_read({"arm": recorded, "train": training, "split": asdict(study.chosen_split())} | length)


def planned_training(study: Study, arm: Arm, split: data.Split) -> TrainConfig:
    """How the arm is trained on this log, with its length in steps."""
    sizes = strict(SIZES[arm.kind], arm.sizes, "sizes") if arm.kind in SIZES else None
    longest = getattr(sizes, "max_history", PchConfig.max_history)
    return run_length.planned(study.training_of(arm), split.n_train, longest)


def run_study(study: Study, inputs: Inputs, root: Path, n_workers: int) -> list[PlannedRun]:
    """Runs what is missing, `n_workers` runs at a time, on the first GPU if there is one; returns the runs that failed.

    Each run has one thread, since small models gain little from a second one. A run that fails costs no other run.
    """
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    result_files.write_study(root, describe(study, inputs.dataset, split))
    bench, runs = _bench(study, inputs, root, split), planned_runs(study, inputs, split)
    finished = {run: record for run in runs if (record := bench.finished(run))}
    for run, record in finished.items():
        _show_as_in_config(bench, run, record)
    missing = [run for run in runs if run not in finished]
    progress = Progress(missing, [_timed(run, record) for run, record in finished.items()], n_workers)
    with closing(work_off(partial(run_one, bench), missing, n_workers)) as events:
        for event in events:
            progress.note(event)
    records = {name: [] for name in study.models}
    for run in runs:
        if record := bench.finished(run):
            records[run.model].append(record)
    print(closing_table(records), flush=True)
    for run in progress.failed:
        print(f"{run} failed; see above, and run the same command again for what is missing", flush=True)
    return progress.failed


def _show_as_in_config(bench: Bench, run: PlannedRun, record: result_files.Run) -> None:
    """A new label is no reason to train again, but with two labels for one model a report would be refused."""
    renamed = record.model_copy(update=bench.study.models[run.model].shown())
    if renamed.header() != record.header():
        result_files.write_run(bench.root, renamed)


def dry_run(study: Study, inputs: Inputs, root: Path, n_workers: int) -> None:
    """Prints which runs the study has, their steps and, from the results that are there, how long they would take."""
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    bench, runs = _bench(study, inputs, root, split), planned_runs(study, inputs, split)
    finished = {run: record for run in runs if (record := bench.finished(run))}
    for run in runs:
        training = run.config["train"]
        length = f"{run.steps} steps of {training['users']} users" if run.steps else "nothing to train"
        print(f"{run}: {length}{', done' if run in finished else ''}")
    missing = [run for run in runs if run not in finished]
    progress = Progress(missing, [_timed(run, record) for run, record in finished.items()], n_workers)
    print(f"{len(missing)} of {len(runs)} runs to do, {progress.left()}")


def _timed(run: PlannedRun, record: result_files.Run) -> Timed:
    return Timed(run, record.seconds.train + record.seconds.evaluate)


def machine() -> str:
    """The machine that the seconds of a run were measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s){gpu}, torch {torch.__version__.split('+')[0]}"
