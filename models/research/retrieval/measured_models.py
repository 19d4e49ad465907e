"""One model of a study on the test events: how it is trained or computed, and the costs that its record has."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learn import data
from learn.evaluation.full_ranking import array_ranking
from learn.evaluation.metrics import Ranking
from learn.evaluation.retrieval import retrieve
from learn.models.recommender import Learn, Recommender
from learn.training import content_skip, data_parallel, run_length
from learn.training.listeners import Losses
from learn.training.train_config import TrainConfig
from learn.training.train_recommender import train
from research.baselines import ease_skip
from research.retrieval import result_files
from research.retrieval.arms import Arm, Inputs, build, content_of, fit_item_to_item
from research.retrieval.workers import Report

Costs = dict[str, Any]


def popular(inputs: Inputs, split: data.Split, counts: np.ndarray) -> tuple[Ranking, Costs]:
    """Ranks the test events by the number of training events of each item, `counts` [I]."""
    begin = time.monotonic()
    everyone = np.ones((len(split.test), 1), dtype=np.float32)
    ranking = array_ranking(everyone, counts[:, None], inputs.dataset, split.test)
    seconds = result_files.Seconds(train=0.0, evaluate=round(time.monotonic() - begin, 1))
    return ranking, {"n_parameters": 0, "seconds": seconds, "curve": []}


def item_to_item(arm: Arm, inputs: Inputs, split: data.Split) -> tuple[Ranking, Costs]:
    """Ranks the test events with the setting of EASE or ItemKNN that is best on validation."""
    begin = time.monotonic()
    fitted = fit_item_to_item(arm, inputs.dataset, split)
    middle = time.monotonic()
    ranking = fitted.rank(inputs.dataset, split.test)
    seconds = result_files.Seconds(train=round(middle - begin, 1), evaluate=round(time.monotonic() - middle, 1))
    choices = [
        result_files.Choice(
            settings={name: float(value) for name, value in trial.settings.items()},
            ndcg_at_10=trial.metrics[run_length.FIGURE],
            taken=number == fitted.best,
        )
        for number, trial in enumerate(fitted.trials)
    ]
    return ranking, {"n_parameters": 0, "seconds": seconds, "curve": [], "choices": choices}


def trained(
    config: TrainConfig, arm: Arm, inputs: Inputs, split: data.Split, folder: Path, report: Report
) -> tuple[Ranking, Costs]:
    """Trains a model, attaches what its arm asks for, and ranks the test events. `report` gets each check."""
    torch.manual_seed(config.seed)
    model = build(arm, inputs).to(data_parallel.device())
    curve = []
    if any(parameter.requires_grad for parameter in model.parameters()):
        curve = train(config, model, inputs.dataset, split, folder, listener=_Reporter(report))
    n_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    choices = _with_skip(model, arm, inputs, split)
    if arm.ease_dim:
        attached = ease_skip.attach(model, arm.ease_dim, inputs.dataset, split)
        model, choices = attached.model, choices + _choices("ease_weight", attached.tried, attached.taken)
    middle = time.monotonic()
    ranking = retrieve(model, inputs.dataset, split.test)
    # A run that was stopped and continued has all of its seconds in the curve.
    training = curve[-1]["seconds"] if curve else 0.0
    seconds = result_files.Seconds(train=training, evaluate=round(time.monotonic() - middle, 1))
    return ranking, {
        "n_parameters": n_parameters,
        "seconds": seconds,
        "curve": [_curve_point(record) for record in curve],
        "choices": choices,
    }


def _with_skip(model: Recommender, arm: Arm, inputs: Inputs, split: data.Split) -> list[result_files.Choice]:
    """Attaches the content skip that the arm asks for to its trained model; returns the weights that were tried."""
    dim = arm.sizes.get("skip_dim", 0)
    if not dim or not isinstance(model, Learn):
        return []
    tried = content_skip.attach(model, content_of(arm, inputs), dim, inputs.dataset, split)
    return _choices("skip_weight", tried, content_skip.chosen(tried))


def _choices(name: str, tried: list[content_skip.Tried], taken: content_skip.Tried) -> list[result_files.Choice]:
    return [
        result_files.Choice(settings={name: one.weight}, ndcg_at_10=one.all, ndcg_at_10_few=one.few, taken=one is taken)
        for one in tried
    ]


@dataclass(frozen=True)
class _Reporter:
    """Sends each check of a run to the study's own process."""

    report: Report

    def step(self, number: int, losses: Losses, learning_rate: float) -> None:
        pass

    def check(self, record: Mapping[str, float]) -> None:
        self.report(dict(record))

    def end(self, warnings: Sequence[str]) -> None:
        """Nothing: the table at the end of the study has the warnings of all runs."""


def _curve_point(record: Mapping[str, float]) -> result_files.CurvePoint:
    return result_files.CurvePoint(
        step=int(record["step"]),
        seconds=record["seconds"],
        loss=sum(value for key, value in record.items() if key.startswith("loss_")),
        ndcg_at_10=record.get("ndcg_at_10"),
        hr_at_10=record.get("hr_at_10"),
    )
