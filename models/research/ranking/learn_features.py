"""LEARN's features for the ranking study: towers and head are trained on the towers' part, then run on later events."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learn.content.standardise import Method
from learn.data import Dataset, Event, Sequence, Split
from learn.evaluation.full_ranking import metrics, tower_ranks
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import Learn
from learn.training.train_cvr_head import CvrTrainConfig, check_labels, examples, fit_head, is_history, windows
from learn.training.train_recommender import TrainConfig, train
from research.ranking import event_parts
from research.ranking.event_parts import Events


@dataclass(frozen=True)
class MidEmbeddingConfig:
    """How the features are made. `cvr.history` also decides whether the towers train on all events or on liked ones."""

    towers: TrainConfig = field(default_factory=TrainConfig)
    pch: PchConfig = field(default_factory=PchConfig)
    standardise: Method = "scale"
    cvr: CvrTrainConfig = field(default_factory=CvrTrainConfig)
    # Sizes of the CVR head; its inputs are the embeddings of the towers.
    fuse_dim: int = 128
    mid_dim: int = 64


@dataclass(frozen=True)
class Features:
    """One row per event: mid_emb [n,M], user [n,E] and item [n,E] embedding, and the head's logit [n]."""

    mid_emb: Tensor
    user: Tensor
    item: Tensor
    logit: Tensor


@dataclass(frozen=True)
class Learned:
    """Towers and head, their figures (measured within the towers' part), and seconds per stage."""

    pch: Pch
    head: CvrHead
    figures: dict[str, float]
    seconds: dict[str, float]


def train_towers(
    config: MidEmbeddingConfig, seed: int, content: Tensor, dataset: Dataset, split: Split, log: Path
) -> Pch:
    """Trains the towers and returns them on the CPU; the training log goes to `log`."""
    torch.manual_seed(seed)
    model = Learn(Pch(replace(config.pch, content_dim=content.shape[1])), content, config.standardise)
    folder = log.with_suffix(".run")
    train(replace(config.towers, seed=seed), model, dataset, split, folder)
    (folder / "train.jsonl").replace(log)
    shutil.rmtree(folder)
    model.cpu().finish()
    return model.pch


def learn(
    config: MidEmbeddingConfig, seed: int, content: Tensor, dataset: Dataset, events: Events, log: Path
) -> Learned:
    """Trains towers and head on the towers' part. ValueError if its labels cannot train or validate the head."""
    split = event_parts.tower_split(dataset, events)
    advice = "the users have too few events for a ranking study, or its cuts are too early"
    check_labels(dataset.sequences, split, ("training", "validation"), config.cvr.liked_from, advice)
    shown, shown_split = histories(dataset, split, config)
    begin = time.monotonic()
    pch = train_towers(config, seed, content, shown, shown_split, log)
    towers_at = time.monotonic()
    before = _hit_rate(pch, content, shown, shown_split)
    sizes = CvrConfig(pch.config.out_dim, config.fuse_dim, config.mid_dim)
    head, validation_auc = fit_head(replace(config.cvr, seed=seed), sizes, pch, content, dataset, split)
    seconds = {"towers": round(towers_at - begin, 1), "cvr": round(time.monotonic() - towers_at, 1)}
    figures = {"cvr_validation_auc": validation_auc, "hr_at_10_before_cvr": before}
    return Learned(pch, head, figures | {"hr_at_10": _hit_rate(pch, content, shown, shown_split)}, seconds)


def histories(dataset: Dataset, split: Split, config: MidEmbeddingConfig) -> tuple[Dataset, Split]:
    """Data set and split for the towers; with `history="liked"` they have liked events only."""
    sequences, n_train, validation = [], [], []
    ends = list(split.n_train)
    for event in split.validation:
        ends[event.user] = max(ends[event.user], event.position + 1)
    for user, (sequence, n_known, end) in enumerate(zip(dataset.sequences, split.n_train, ends, strict=True)):
        # Later events are removed here, so that no mistake further down can read them.
        keep = np.flatnonzero(is_history(np.asarray(sequence.values[:end]), config.cvr.history, config.cvr.liked_from))
        columns = (np.asarray(column)[keep] for column in (sequence.items, sequence.values, sequence.timestamps))
        sequences.append(Sequence(sequence.user, *columns))
        n_train.append(int((keep < n_known).sum()))
        validation += [Event(user, position) for position in range(n_train[-1], len(keep))]
    return Dataset(dataset.item_ids, dataset.texts, sequences), Split(n_train, validation, [])


@torch.no_grad()
def features(
    learned: Learned, config: MidEmbeddingConfig, content: Tensor, dataset: Dataset, events: Events
) -> Features:
    """The features of every event after the towers' part, in the order of `events.rows(RANKER_PART, VALIDATION, TEST)`.

    The user embedding of an event is computed from the events before it in the user's sequence.
    """
    pch, head = learned.pch, learned.head
    spans = events.spans(event_parts.RANKER_PART, event_parts.VALIDATION, event_parts.TEST)
    longest, cvr = pch.config.max_history, config.cvr
    history_windows = windows(dataset.sequences, spans, longest, cvr.history, "sliding", cvr.liked_from)
    seen = examples(pch, content, history_windows)
    item = pch.alone(content)[seen.item]
    parts = [head(u, i, torch.arange(len(u))) for u, i in zip(seen.user.split(8192), item.split(8192), strict=True)]
    mid_emb, logit = (torch.cat(part) for part in zip(*parts, strict=True))
    return Features(mid_emb, seen.user, item, logit)


def _hit_rate(pch: Pch, content: Tensor, dataset: Dataset, split: Split) -> float:
    if not split.validation:
        return float("nan")
    return metrics(tower_ranks(pch, content, dataset, split.validation))["hr_at_10"]
