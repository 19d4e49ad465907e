"""Trains any recommender of this package or of `research`: steps, checks on validation, and where a run resumes.

`trainer` has the step and its losses.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learn.atomic_file import replacing
from learn.data import Dataset, Event, Split, sample_events
from learn.evaluation.full_ranking import metrics
from learn.evaluation.retrieval import retrieve
from learn.models.recommender import Recommender
from learn.training import data_parallel, run_length
from learn.training.best_weights import BestWeights
from learn.training.listeners import Listener, ProgressBar, TensorboardLog
from learn.training.run_length import FIGURE
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer


def train(
    config: TrainConfig,
    model: Recommender,
    dataset: Dataset,
    split: Split,
    folder: Path,
    *,
    listener: Listener | None = None,
) -> list[dict[str, float]]:
    """Trains `model` in place and returns one record per check, which are also written to `folder`/train.jsonl.

    `run_length` says how many steps that takes and what ends a run before; its last line in the file says why it ended
    and has the warnings. Keeps the weights of the check with the best NDCG@10; without validation events, those of the
    last step. Continues from `folder`/checkpoint.pt if that belongs to the same config, model, content, data and split.
    What happens is told to `listener`, by default a progress bar that prints the warnings.
    """
    torch.manual_seed(config.seed)
    config = run_length.planned(config, split.n_train, model.max_history)
    trainer = Trainer(config, model, dataset, split)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress.resumed(trainer, folder / "checkpoint.pt", _identity(config, model, dataset, split))
    listeners = _listeners(config, progress.step, listener)
    begin = time.monotonic() - progress.seconds
    validation = sample_events(split.validation, config.validation_events, config.seed)
    step = progress.step
    n_steps = run_length.affordable_steps(config, step, progress.seconds)
    while step < n_steps and not run_length.early_ending(config, progress.curve):
        # The schedule reads the steps, which are fewer than planned if time is short.
        trainer.config = replace(config, steps=n_steps)
        parts = trainer.step(step)
        step += 1
        n_steps = run_length.affordable_steps(config, step, _seconds_since(begin, trainer.device, config))
        for each in listeners:
            each.step(step, parts, trainer.optimizer.param_groups[0]["lr"])
        if step % config.check_every and step < n_steps:
            continue
        record = {"step": step, "seconds": round(time.monotonic() - begin, 1)}
        record |= {f"loss_{name}": value for name, value in parts.items()}
        if validation:
            record |= _validated(model, dataset, validation)
        progress.note(record)
        if data_parallel.is_first():
            progress.save(trainer, folder / "checkpoint.pt")
            _write_curve(folder / "train.jsonl", config, progress.curve)
        for each in listeners:
            each.check(record)
    warnings = run_length.warnings(config, progress.curve)
    if data_parallel.is_first():
        end = {"ended": run_length.ending(config, progress.curve), "warnings": warnings}
        _write_curve(folder / "train.jsonl", config, progress.curve, end)
    for each in listeners:
        each.end(warnings)
    progress.best.restore()
    model.eval()
    return progress.curve


def _validated(model: Recommender, dataset: Dataset, events: Sequence[Event]) -> dict[str, float]:
    """The metrics over all events, which the processes share."""
    own = data_parallel.share(len(events))
    if own.stop - own.start == len(events) or len(events) < data_parallel.n_processes():
        return metrics(retrieve(model, dataset, events).rank)
    device = next(model.parameters()).device
    rank = torch.from_numpy(np.asarray(retrieve(model, dataset, events[own]).rank)).to(device)
    return metrics(data_parallel.gathered(rank, len(events)).cpu().numpy())


def _listeners(config: TrainConfig, done: int, listener: Listener | None) -> Sequence[Listener]:
    """Those of this process: only the first one has any."""
    if not data_parallel.is_first():
        return []
    logs = [TensorboardLog(Path(config.tensorboard), done)] if config.tensorboard else []
    return [ProgressBar(config.steps, done) if listener is None else listener, *logs]


def _seconds_since(begin: float, device: torch.device, config: TrainConfig) -> float:
    """The seconds of a run. If they decide when it ends, all processes get the mean, so that they agree."""
    seconds = time.monotonic() - begin
    if config.max_minutes is None:
        return seconds
    both = torch.tensor([seconds, 1.0], dtype=torch.float64, device=device)
    total, n_processes = (data_parallel.summed(part) for part in both)
    return total / n_processes


@dataclass
class _Progress:
    """What a run needs to continue after an interruption. `identity` says which run it is."""

    identity: str
    step: int
    seconds: float
    curve: list[dict[str, float]]
    best: BestWeights

    @staticmethod
    def resumed(trainer: Trainer, path: Path, identity: str) -> _Progress:
        """The progress in the checkpoint, if it belongs to the same run; else that of a new run."""
        if path.is_file():
            saved = torch.load(path, map_location=trainer.device, weights_only=False)
            if saved.get("identity") == identity:
                trainer.model.load_state_dict(saved["model"])
                trainer.optimizer.load_state_dict(saved["optimizer"])
                trainer.rng.bit_generator.state = saved["rng"]
                torch.set_rng_state(saved["torch_rng"].cpu())
                best = BestWeights([trainer.model], max(past.get(FIGURE, -1.0) for past in saved["curve"]))
                best.weights = [saved["best"]]
                return _Progress(identity, saved["step"], saved["seconds"], saved["curve"], best)
        return _Progress(identity, 0, 0.0, [], BestWeights([trainer.model]))

    def note(self, record: dict[str, float]) -> None:
        """Adds a record to the curve, and keeps the weights if they are the best so far."""
        if FIGURE in record:
            self.best.offer(record[FIGURE])
        else:
            self.best.take()
        self.curve.append(record)
        self.step, self.seconds = int(record["step"]), record["seconds"]

    def save(self, trainer: Trainer, path: Path) -> None:
        """Writes the checkpoint atomically."""
        state = {
            "identity": self.identity,
            "model": trainer.model.state_dict(),
            "best": self.best.weights[0],
        }
        state |= {"optimizer": trainer.optimizer.state_dict(), "rng": trainer.rng.bit_generator.state}
        state |= {"torch_rng": torch.get_rng_state(), "step": self.step, "seconds": self.seconds, "curve": self.curve}
        with replacing(path) as partial:
            torch.save(state, partial)


def _identity(config: TrainConfig, model: Recommender, dataset: Dataset, split: Split) -> str:
    """SHA-256 over everything that the result of a run depends on, before its first step."""
    found = hashlib.sha256(json.dumps([config.recorded(), model.settings()]).encode())
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        found.update(name.encode() + value.detach().cpu().numpy().tobytes())
    reads_actions = bool(getattr(model.config, "actions", ()))
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        found.update(np.array([n_train, *sequence.items[:n_train], *sequence.timestamps[:n_train]], "<i8").tobytes())
        if reads_actions:
            found.update(sequence.actions[:n_train].tobytes())
    found.update(np.array([(event.user, event.position) for event in split.validation], "<i8").tobytes())
    return found.hexdigest()


def _write_curve(
    path: Path, config: TrainConfig, curve: list[dict[str, float]], end: dict[str, Any] | None = None
) -> None:
    """The settings of the run, its checks, and how it ended if it has."""
    lines = [json.dumps(line) for line in ({"config": asdict(config)}, *curve, *([end] if end else []))]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
