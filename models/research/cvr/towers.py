"""The towers of a CVR study: one training per seed, with or without actions, shared by all arms that start from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learn.atomic_file import replacing
from learn.data import Dataset, Split, has_own_actions
from learn.data.actions import ActionThresholds
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import Learn
from learn.training.train_config import TrainConfig
from learn.training.train_recommender import train


@dataclass(frozen=True)
class TowersConfig:
    """How the towers are trained: the steps before the head's."""

    pch: PchConfig
    train: TrainConfig
    thresholds: ActionThresholds


@dataclass(frozen=True)
class TowerData:
    """What towers and heads of one split are trained on; content [I,C] is in the order of the catalogue."""

    dataset: Dataset
    content: Tensor
    split: Split
    digest: str


def data_digest(dataset: Dataset, content: Tensor, split: Split) -> str:
    """SHA-256 over the events, the split and the content embeddings."""
    found = hashlib.sha256(content.numpy().tobytes())
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        found.update(np.array([n_train, len(sequence.items)], "<i8").tobytes())
        found.update(sequence.items.astype("<i8").tobytes() + sequence.values.astype("<f4").tobytes())
        if has_own_actions(dataset):
            found.update(sequence.actions.tobytes())
    for events in (split.validation, split.test):
        found.update(np.array([(event.user, event.position) for event in events], "<i8").tobytes())
    return found.hexdigest()


def trained_towers(config: TowersConfig, seed: int, data: TowerData, folder: Path) -> Pch:
    """The towers of a seed, which take raw content. They are trained unless `folder` has them with the same config."""
    config = replace(config, train=replace(config.train, seed=seed))
    sizes = replace(config.pch, content_dim=data.content.shape[1])
    thresholds = asdict(config.thresholds) if sizes.actions else {}
    identity = json.dumps([data.digest, sizes.recorded(), config.train.recorded(), thresholds])
    name = f"towers-{'actions' if sizes.actions else 'plain'}-seed{seed}"
    path = folder / f"{name}.pt"
    pch = Pch(sizes)
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        if saved["identity"] == identity:
            pch.load_state_dict(saved["weights"])
            return pch.eval()
    torch.manual_seed(seed)
    model = Learn(Pch(sizes), data.content)
    train(config.train, model, data.dataset, data.split, folder / name)
    model.finish()
    with replacing(path) as partial:
        torch.save({"identity": identity, "weights": model.pch.state_dict()}, partial)
    return model.pch.eval()
