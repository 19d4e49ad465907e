"""Trains the CVR head in several ways on the same towers, and measures each against the mean label of every item.

An arm is a head (`models.cvr.CvrConfig`), a training of it (`cvr_config.CvrTrainConfig`) and whether the towers read
actions. All arms of a seed start from the same towers, trained once with actions and once without; what an arm tunes
is its own copy. Epochs are chosen on validation, and the test events are ranked once.

A run is kept if its file has the same config and data, so a study that was stopped continues with what is missing.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learn import data
from learn.data.actions import ActionThresholds
from learn.data.splits import SplitSettings
from learn.evaluation.full_ranking import metrics, tower_ranks
from learn.models.cvr import CvrConfig
from learn.models.pch import Pch, PchConfig
from learn.toml_config import as_read, strict
from learn.training.cvr_config import CvrTrainConfig
from learn.training.cvr_events import event_spans, label, training_spans
from learn.training.train_config import TrainConfig
from learn.training.train_cvr_head import CvrData, fit_head, held_out_examples, item_means, item_vectors, predict
from research import provenance, record_files
from research.cvr import summary
from research.cvr.result_files import CvrRun, CvrStudyRecord
from research.cvr.towers import TowerData, TowersConfig, data_digest, trained_towers


@dataclass(frozen=True)
class CvrArm:
    """One way to train the head. `head` and `cvr` override single values of the defaults."""

    label: str
    # Whether the towers read actions.
    actions: bool = True
    head: dict[str, Any] = field(default_factory=dict)
    cvr: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CvrStudy(SplitSettings):
    """The TOML file."""

    study: str
    seeds: list[int]
    arms: dict[str, CvrArm]
    # The actions of arms with actions, and how they are read from values.
    actions: list[str]
    thresholds: ActionThresholds = field(default_factory=ActionThresholds)
    split: data.SplitConfig = field(default_factory=data.SplitConfig)
    time_split: data.TimeSplitConfig | None = None
    pch: PchConfig = field(default_factory=PchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            if "seed" in arm.cvr:
                raise ValueError(f"arms.{name}.cvr: seeds belong to the study")
            if other := {"task", "liked_from", "conversions", "impressions"} & set(arm.cvr):
                raise ValueError(f"arms.{name}.cvr.{min(other)}: all arms are judged by values of 4 and more")
            self.head_of(arm, f"arms.{name}")
            self.training_of(arm, 1, f"arms.{name}")

    def head_of(self, arm: CvrArm, where: str = "arm") -> CvrConfig:
        """Sizes and parts of the arm's head."""
        return strict(CvrConfig, {"in_dim": self.pch.embedding_dim} | arm.head, f"{where}.head")

    def training_of(self, arm: CvrArm, seed: int, where: str = "arm") -> CvrTrainConfig:
        """How the arm's head is trained."""
        return strict(CvrTrainConfig, {"seed": seed} | arm.cvr, f"{where}.cvr")

    def towers_of(self, arm: CvrArm) -> TowersConfig:
        """How the arm's towers are trained."""
        pch = replace(self.pch, actions=tuple(self.actions) if arm.actions else ())
        return TowersConfig(pch, self.train, self.thresholds)


def run_study(
    study: CvrStudy, dataset: data.Dataset, content: torch.Tensor, work: Path, out: Path
) -> list[summary.Row]:
    """Runs what `out` lacks, seed by seed, and returns the summary. Towers are kept in `work`.

    `dataset` must read actions by the thresholds of the study; content [I,C] is in the order of its catalogue.
    """
    split = data.split(dataset.sequences, study.chosen_split())
    tower_data = TowerData(dataset, content, split, data_digest(dataset, content, split))
    record_files.write(out / record_files.CVR_STUDY_FILE, _describe(study, tower_data))
    provenance.commit()  # Before training: the first call in a process decides.
    for seed in study.seeds:
        for name, arm in study.arms.items():
            path, config = record_files.run_path(out, name, seed), _recorded(study, arm)
            if not _is_done(path, config, tower_data.digest):
                record_files.write(path, _run(study, name, seed, tower_data, work))
    rows = summary.summarise(out)
    print(summary.text(rows))
    return rows


def _run(study: CvrStudy, name: str, seed: int, tower_data: TowerData, work: Path) -> CvrRun:
    arm, begin = study.arms[name], time.monotonic()
    towers = trained_towers(study.towers_of(arm), seed, tower_data, work)
    cvr_data = CvrData(tower_data.content, tower_data.dataset, tower_data.split)
    pch, config = copy.deepcopy(towers), study.training_of(arm, seed)
    fitted = fit_head(config, study.head_of(arm), pch, cvr_data, study.train)
    test = held_out_examples(pch, cvr_data, config, "test")
    with torch.no_grad():
        scores = predict(fitted.head, test, item_vectors(pch, cvr_data.content))
    figures = fitted.figures | {"ndcg_at_10_before_cvr": _retrieved(towers, cvr_data)}
    figures["ndcg_at_10"] = _retrieved(pch, cvr_data) if config.tune_towers else figures["ndcg_at_10_before_cvr"]
    return CvrRun(
        study=study.study,
        arm=name,
        seed=seed,
        data=tower_data.digest,
        config=_recorded(study, arm),
        figures={key: round(float(value), 6) for key, value in figures.items()},
        seconds=round(time.monotonic() - begin, 1),
        score_rank=record_files.score_ranks(scores),
    )


def _retrieved(pch: Pch, cvr_data: CvrData) -> float:
    ranks = tower_ranks(pch, cvr_data.content, cvr_data.dataset, cvr_data.split.test)
    return metrics(ranks)["ndcg_at_10"]


def _describe(study: CvrStudy, tower_data: TowerData) -> CvrStudyRecord:
    split, sequences = tower_data.split, tower_data.dataset.sequences
    liked_from = CvrTrainConfig().liked_from
    users, items, labels = _events(sequences, event_spans(split.test), liked_from)
    _users, seen, liked = _events(sequences, training_spans(split), liked_from)
    means = item_means(torch.from_numpy(seen), torch.from_numpy(liked), len(tower_data.content)).numpy()
    return CvrStudyRecord(
        study=study.study,
        label_meaning=f"value >= {liked_from:g}, a proxy for a conversion",
        data=tower_data.digest,
        split=as_read(asdict(study.chosen_split())),
        user=users,
        label=labels.astype(np.uint8),
        item_mean_rank=record_files.score_ranks(means[items]),
    )


def _events(sequences, spans, liked_from: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and label of all events of the spans, each [n]."""
    users, items, labels = [], [], []
    for user, begin, end in spans:
        sequence = sequences[user]
        users.append(np.full(end - begin, user))
        items.append(np.asarray(sequence.items[begin:end]))
        labels.append(label(np.asarray(sequence.values[begin:end]), liked_from))
    return np.concatenate(users), np.concatenate(items), np.concatenate(labels)


def _recorded(study: CvrStudy, arm: CvrArm) -> dict[str, Any]:
    """The config as a record has it: everything that the run depends on but its seed."""
    towers = study.towers_of(arm)
    config = {"pch": towers.pch.recorded(), "train": towers.train.recorded(), "head": asdict(study.head_of(arm))}
    config["cvr"] = asdict(study.training_of(arm, 0))
    if arm.actions:
        config["thresholds"] = asdict(study.thresholds)
    for part in ("train", "cvr"):
        del config[part]["seed"]
    return as_read(config)


def _is_done(path: Path, config: dict[str, Any], digest: str) -> bool:
    if not path.is_file():
        return False
    run = record_files.read(path, CvrRun)
    return run.config == config and run.data == digest
