"""A study: several models and several seeds under one protocol, with one file per run for `learn report`.

All models of a study have the same split, events, loss, candidates and number of steps unless a model's entry says
otherwise. The weights that are best on validation are measured on the test events, once, at the end of a run.

A run whose file exists with the same config is not repeated, so a study that was stopped continues where it was.
"""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from learn import data
from learn.content import ceg, embedding_store
from learn.data.splits import SplitSettings
from learn.evaluation.full_ranking import array_ranking, popularity
from learn.evaluation.metrics import Ranking
from learn.evaluation.retrieval import retrieve
from learn.models.pch import PchConfig
from learn.run_settings import EncoderSettings, PrepareSettings, read_toml
from learn.toml_config import as_read, strict
from learn.training import data_parallel
from learn.training.train_config import TrainConfig
from learn.training.train_recommender import train
from learn.training_run import Prompts, prepare_config
from research.retrieval import result_files
from research.retrieval.arms import SIZES, Arm, Content, Inputs, build, content_name

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
            strict(TrainConfig, asdict(self.train) | arm.train, f"models.{name}.train")
            if arm.kind in SIZES:
                strict(SIZES[arm.kind], arm.sizes, f"models.{name}.sizes")
            if arm.sizes.get("actions"):
                raise ValueError(f"models.{name}.sizes.actions: these studies read no actions from the log")

    def runs(self) -> list[tuple[str, int]]:
        """Every (model, seed) by seed, ablations last, so that a study that is stopped has all main models."""
        pairs = [(name, seed) for seed in self.seeds for name in self.models]
        pairs.sort(key=lambda pair: self.models[pair[0]].family == "ablation")
        return [(name, seed) for name, seed in pairs if seed in self._seeds_of(self.models[name])]

    def _seeds_of(self, arm: Arm) -> list[int]:
        if arm.kind in ("popularity", "content-mean"):
            return self.seeds[:1]  # They have no randomness.
        return self.seeds[: arm.n_seeds]


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


def inputs_of(study: Study, source: Path, run: Path, encoders: Path) -> Inputs:
    """Prepares the data set in `source` and encodes its items for every content that a model of the study needs."""
    needed = {arm.content for arm in study.models.values() if arm.kind in ("content-mean", "learn")}
    content, plain = {}, prepare_config(study.prepare, study.chosen_split())
    for name in sorted(needed):
        entry = study.contents[name]
        folder = run / ("data-keywords" if entry.keywords else "data")
        data.prepare(source, folder, replace(plain, max_keywords=N_KEYWORDS) if entry.keywords else plain)
        encoder = ceg.EncoderFolder(encoders / entry.encoder, EncoderSettings.max_tokens)
        content[name] = embedding_store.encode_to_file(
            encoder, Prompts(data.read_prepared(folder).texts), run / "cache"
        )
    data.prepare(source, run / "data", plain)
    folders = {name: encoders / entry.encoder for name, entry in study.contents.items()}
    return Inputs(data.read_prepared(run / "data"), content, folders)


def run_one(study: Study, name: str, seed: int, inputs: Inputs, root: Path) -> None:
    """Trains one model with one seed and writes its file; does nothing if the file exists with the same config."""
    arm, path = study.models[name], result_files.run_path(root, study.study, name, seed)
    config = run_config(study, arm) | {"content": content_name(arm, inputs), "seed": seed}
    if path.is_file() and result_files.read_run(path).config == config:
        return
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    counts = popularity(inputs.dataset, split)
    if arm.kind == "popularity":
        ranking, costs = _popular(inputs, split, counts)
    else:
        ranking, costs = _trained(
            TrainConfig(**config["train"], seed=seed), arm, inputs, split, path.with_suffix(".run")
        )
    shared = describe(study, inputs.dataset, split)
    record = result_files.Run(
        study=study.study,
        model=name,
        label=arm.label,
        family=arm.family,
        reference=arm.reference or None,
        question=arm.question or None,
        seed=seed,
        config=config,
        machine=machine(),
        **costs,
        **result_files.measured(shared, ranking, counts),
    )
    result_files.write_run(root, record)
    shutil.rmtree(path.with_suffix(".run"), ignore_errors=True)


def describe(study: Study, dataset: data.Dataset, split: data.Split) -> result_files.Study:
    """The record of what all runs of the study share."""
    by_time = study.time_split is not None
    n_test, n_validation = (0, 0) if by_time else (study.split.n_test, study.split.n_validation)
    protocol = result_files.Protocol(n_test=n_test, n_validation=n_validation)
    return result_files.describe(study.study, dataset, split, protocol)


def run_config(study: Study, arm: Arm) -> dict[str, Any]:
    """The settings that a run depends on, without its seed and content, as its file records them."""
    recorded = {key: value for key, value in asdict(arm).items() if key in ("kind", "content", "standardise", "ids")}
    # Defaults are written out, so that a run with other defaults counts as another run.
    sizes = strict(SIZES[arm.kind], arm.sizes, "sizes") if arm.kind in SIZES else None
    if isinstance(sizes, PchConfig):
        recorded["sizes"] = sizes.recorded()
    else:
        recorded["sizes"] = {} if sizes is None else asdict(sizes)
    training = study.train.recorded() | arm.train
    del training["seed"]
    return as_read({"arm": recorded, "train": training, "split": asdict(study.chosen_split())})


Costs = dict[str, Any]


def _popular(inputs: Inputs, split: data.Split, counts: np.ndarray) -> tuple[Ranking, Costs]:
    begin = time.monotonic()
    everyone = np.ones((len(split.test), 1), dtype=np.float32)
    ranking = array_ranking(everyone, counts[:, None], inputs.dataset, split.test)
    seconds = result_files.Seconds(train=0.0, evaluate=round(time.monotonic() - begin, 1))
    return ranking, {"n_parameters": 0, "seconds": seconds, "curve": []}


def _trained(config: TrainConfig, arm: Arm, inputs: Inputs, split: data.Split, folder: Path) -> tuple[Ranking, Costs]:
    torch.manual_seed(config.seed)
    model = build(arm, inputs).to(data_parallel.device())
    curve = []
    if any(parameter.requires_grad for parameter in model.parameters()):
        curve = train(config, model, inputs.dataset, split, folder)
    middle = time.monotonic()
    ranking = retrieve(model, inputs.dataset, split.test)
    # A run that was stopped and continued has all of its seconds in the curve.
    trained = curve[-1]["seconds"] if curve else 0.0
    seconds = result_files.Seconds(train=trained, evaluate=round(time.monotonic() - middle, 1))
    n_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ranking, {
        "n_parameters": n_parameters,
        "seconds": seconds,
        "curve": [_curve_point(record) for record in curve],
    }


def _curve_point(record: Mapping[str, float]) -> result_files.CurvePoint:
    return result_files.CurvePoint(
        step=int(record["step"]),
        seconds=record["seconds"],
        loss=sum(value for key, value in record.items() if key.startswith("loss_")),
        ndcg_at_10=record.get("ndcg_at_10"),
        hr_at_10=record.get("hr_at_10"),
    )


def run_study(study: Study, inputs: Inputs, root: Path, n_workers: int) -> None:
    """Runs what is missing, `n_workers` runs at a time, on the first GPU if there is one.

    Each run has one thread, since small models gain little from a second one.
    """
    split = data.split(inputs.dataset.sequences, study.chosen_split())
    result_files.write_study(root, describe(study, inputs.dataset, split))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = {pool.submit(run_one, study, name, seed, inputs, root): (name, seed) for name, seed in study.runs()}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=study.study, unit="run"):
            job.result()


def machine() -> str:
    """The machine that the seconds of a run were measured on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s){gpu}, torch {torch.__version__.split('+')[0]}"
