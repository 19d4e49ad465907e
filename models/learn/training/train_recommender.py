"""Trains any recommender of this package or of `research`: steps, checks on validation, and where a run resumes.

`trainer` has the step and its losses.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from learn.atomic_file import replacing
from learn.data import Dataset, Split
from learn.evaluation.full_ranking import metrics
from learn.evaluation.retrieval import retrieve
from learn.models.recommender import Recommender
from learn.training import data_parallel
from learn.training.best_weights import BestWeights
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer

# The validation metric that decides which weights are best.
FIGURE = "ndcg_at_10"


def train(
    config: TrainConfig, model: Recommender, dataset: Dataset, split: Split, folder: Path
) -> list[dict[str, float]]:
    """Trains `model` in place and returns one record per check, which are also written to `folder`/train.jsonl.

    Keeps the weights of the check with the best NDCG@10; without validation events, those of the last step. Continues
    from `folder`/checkpoint.pt if that belongs to the same config, model, content, data and split.
    """
    if config.check_every < 1 or config.steps < 1:
        raise ValueError(f"steps and check_every are at least 1, got {config.steps} and {config.check_every}")
    torch.manual_seed(config.seed)
    trainer = Trainer(config, model, dataset, split)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress.resumed(trainer, folder / "checkpoint.pt", _identity(config, model, dataset, split))
    begin = time.monotonic() - progress.seconds
    bar = tqdm(
        total=config.steps, initial=progress.step, desc="train", unit="step", disable=not data_parallel.is_first()
    )
    for number in range(progress.step, config.steps):
        parts = trainer.step(number)
        bar.update()
        if (number + 1) % config.check_every and number + 1 != config.steps:
            continue
        record = {"step": number + 1, "seconds": round(time.monotonic() - begin, 1)}
        record |= {f"loss_{name}": value for name, value in parts.items()}
        if split.validation:
            record |= metrics(retrieve(model, dataset, split.validation).rank)
        progress.note(record)
        if data_parallel.is_first():
            progress.save(trainer, folder / "checkpoint.pt")
            _write_curve(folder / "train.jsonl", config, progress.curve)
        bar.set_postfix(loss=f"{sum(parts.values()):.3f}", ndcg10=f"{record.get('ndcg_at_10', 0):.4f}")
    bar.close()
    progress.best.restore()
    model.eval()
    return progress.curve


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


def _write_curve(path: Path, config: TrainConfig, curve: list[dict[str, float]]) -> None:
    lines = [json.dumps({"config": asdict(config)}), *(json.dumps(record) for record in curve)]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
