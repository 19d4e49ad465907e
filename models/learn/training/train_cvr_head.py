"""Trains the CVR head on frozen towers, and then, if that is asked for, head and towers together.

The label is `value >= liked_from`, or the event's action (`conversions`). MovieLens records neither impressions nor
conversions, so `rating >= 4` is a PROXY for a conversion there, among the items that a user rated: the head learns what
users like, not what they buy. For a log of events alone, `task` = "click" learns which items a user meets
(`cvr_negatives`).

Training respects time. The head learns from each user's training events, each paired with the user state just before
it. The epoch with the best UAUC on the validation events is kept: a ranking model orders one user's items, and a pooled
AUC also rewards knowing which users like more than others. The head of that epoch is measured once on the test events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learn.data import Dataset, Split
from learn.evaluation.auc import auc, uauc
from learn.evaluation.full_ranking import item_embeddings, metrics, tower_ranks
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch
from learn.training import cvr_tuning
from learn.training.best_weights import BestWeights, train_epochs
from learn.training.cvr_config import CvrTrainConfig
from learn.training.cvr_events import (
    Examples,
    Window,
    event_spans,
    examples,
    training_spans,
    windows,
)
from learn.training.cvr_negatives import catalogue, with_negatives
from learn.training.train_config import TrainConfig

Part = Literal["training", "validation", "test"]
PARTS = get_args(Part)


@dataclass(frozen=True)
class CvrData:
    """What the head is trained on; content [I,C] is in the order of the catalogue."""

    content: Tensor
    dataset: Dataset
    split: Split


@dataclass(frozen=True)
class Fitted:
    """A head and what decided for it: figures on the validation events, and the epochs that were kept."""

    head: CvrHead
    figures: dict[str, float]


def train_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, data: CvrData, next_item: TrainConfig | None = None
) -> tuple[CvrHead, dict[str, float]]:
    """Returns the head of the best epoch on validation, and its metrics on the test events.

    With `tune_towers`, `pch` is changed in place, so save it together with the head; `next_item` is how the towers
    were trained, and the metrics say what they retrieve before and after.
    """
    before = _retrieved(pch, data) if config.tune_towers else {}
    fitted = fit_head(config, sizes, pch, data, next_item)
    figures = dict(fitted.figures)
    if config.tune_towers:
        figures |= {f"{name}_before_cvr": value for name, value in before.items()} | _retrieved(pch, data)
    item = item_vectors(pch, data.content)
    # The item means need no user states, which take a run of the tower over all training events.
    seen = training_windows(pch.config.max_history, data, config)
    items, labels = (np.concatenate([getattr(window, name) for window in seen]) for name in ("item", "label"))
    means = item_means(torch.from_numpy(items), torch.from_numpy(labels), len(item))
    test = held_out_examples(pch, data, config, "test")
    return fitted.head, figures | measure(fitted.head, means, test, item)


def fit_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, data: CvrData, next_item: TrainConfig | None = None
) -> Fitted:
    """Returns the head of the best epoch on validation. Test events are not read."""
    torch.manual_seed(config.seed)
    head = CvrHead(replace(sizes, click=config.task == "click_and_conversion"))
    item = item_vectors(pch, data.content)
    training, held_out = training_examples(pch, data, config), held_out_examples(pch, data, config, "validation")
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best = BestWeights([head])
    epoch = train_epochs(
        best,
        tqdm(range(1, config.epochs + 1), desc="train cvr", unit="epoch"),
        train_epoch=lambda: _train_epoch(config, head, optimizer, training, item),
        validate=lambda: choosing_figure(head, held_out, item),
    )
    figures = {"cvr_epoch": epoch}
    if config.tune_towers:
        figures["cvr_tune_epoch"] = _tune(config, head, pch, data, next_item or TrainConfig())
        held_out = held_out_examples(pch, data, config, "validation")
        item = item_vectors(pch, data.content)
    return Fitted(head.eval(), figures | _validation_figures(head, held_out, item))


def item_vectors(pch: Pch, content: Tensor) -> Tensor:
    """[I,E]: each item's embedding, as an input of training; of the content, a chunk is in memory as fp32."""
    # A tensor of inference mode could not be saved for a backward pass.
    return item_embeddings(pch, content).clone()


def training_windows(longest: int, data: CvrData, config: CvrTrainConfig) -> list[Window]:
    """Windows over every training event; they slide, so a state has read at least half of what serving reads."""
    found = windows(data.dataset.sequences, training_spans(data.split), longest, config, "sliding")
    return _with_negatives(found, data, config, "training")


def training_examples(pch: Pch, data: CvrData, config: CvrTrainConfig) -> Examples:
    """Every training event with the user state just before it."""
    return examples(pch, data.content, training_windows(pch.config.max_history, data, config))


def held_out_examples(pch: Pch, data: CvrData, config: CvrTrainConfig, part: Part) -> Examples:
    """The "validation" or "test" events with the user states that serving would give."""
    spans = event_spans(getattr(data.split, part))
    found = windows(data.dataset.sequences, spans, pch.config.max_history, config, "exact")
    return examples(pch, data.content, _with_negatives(found, data, config, part))


def _with_negatives(found: list[Window], data: CvrData, config: CvrTrainConfig, part: Part) -> list[Window]:
    """Adds the negatives of the click task, the same at every call."""
    if config.task != "click":
        return found
    # Training may not learn from a negative that the user meets later; held-out negatives are no event of the user's.
    ends = data.split.n_train if part == "training" else [None] * len(data.split.n_train)
    met = [data.dataset.sequences[window.owner].items[: ends[window.owner]] for window in found]
    rng = np.random.default_rng([config.seed, PARTS.index(part)])
    return with_negatives(found, met, catalogue(data.dataset, data.split), config.negatives, rng)


def measure(head: CvrHead, means: Tensor, test: Examples, item: Tensor) -> dict[str, float]:
    """AUC and UAUC on the test events, next to two baselines: the base rate, and the mean label of each item [I].

    UAUCs are left out if no user has test events of both labels.
    """
    labels, scores = test.label.numpy(), predict(head, test, item)
    mean = means[test.item].numpy()
    figures = {"cvr_auc": auc(scores, labels), "cvr_item_mean_auc": auc(mean, labels)}
    owner = test.owner.numpy()
    within = {"cvr_uauc": uauc(scores, labels, owner), "cvr_item_mean_uauc": uauc(mean, labels, owner)}
    figures |= {name: value for name, value in within.items() if not np.isnan(value)}
    return figures | {"cvr_base_rate": float(labels.mean()), "cvr_n_test": len(labels)}


def item_means(item: Tensor, label: Tensor, n_items: int) -> Tensor:
    """[I] the mean label of each item, given the items and labels [n] of the training events.

    Each mean is smoothed with five events at the base rate; otherwise items with a single event would rank first.
    """
    seen = torch.bincount(item, minlength=n_items).float()
    liked = torch.bincount(item, weights=label, minlength=n_items).float()
    return (liked + 5 * label.mean()) / (seen + 5)


@torch.no_grad()
def predict(head: CvrHead, examples: Examples, item: Tensor) -> np.ndarray:
    """The logits [n] of what is labelled."""
    head.eval()
    return head.outcome(examples.user, item[examples.item], torch.arange(len(examples.item)))[0].numpy()


def choosing_figure(head: CvrHead, held_out: Examples, item: Tensor) -> float:
    """UAUC, or the pooled AUC if no user has events of both labels, as with one validation event per user."""
    labels, scores = held_out.label.numpy(), predict(head, held_out, item)
    figure = uauc(scores, labels, held_out.owner.numpy())
    return auc(scores, labels) if np.isnan(figure) else figure


def _validation_figures(head: CvrHead, held_out: Examples, item: Tensor) -> dict[str, float]:
    labels, scores = held_out.label.numpy(), predict(head, held_out, item)
    figures = {"cvr_validation_auc": auc(scores, labels)}
    figure = uauc(scores, labels, held_out.owner.numpy())
    return figures if np.isnan(figure) else figures | {"cvr_validation_uauc": figure}


def _train_epoch(
    config: CvrTrainConfig, head: CvrHead, optimizer: torch.optim.Optimizer, train: Examples, item: Tensor
) -> None:
    head.train()
    for chosen in event_batches(train.owner, config):
        batch = train.take(chosen)
        outcome = head.outcome(batch.user, item[batch.item], torch.arange(len(chosen)))
        cvr_tuning.step(optimizer, cvr_tuning.head_loss(config, outcome, batch))


def event_batches(owner: Tensor, config: CvrTrainConfig) -> tuple[Tensor, ...]:
    """Random batches of events [n], given their owners: each event once.

    With a `within_user_weight`, up to `events_per_user` events of a user stay together, so that there are pairs.
    """
    order = torch.randperm(len(owner))
    if config.within_user_weight:
        order = order[torch.argsort(owner[order], stable=True)]  # user by user, in random order within a user
        of_user, n_events = torch.unique_consecutive(owner[order], return_inverse=True, return_counts=True)[1:]
        first = torch.cumsum(n_events, 0) - n_events
        part = (torch.arange(len(order)) - first[of_user]) // config.events_per_user
        group = torch.unique_consecutive(torch.stack([of_user, part]), dim=1, return_inverse=True)[1]
        place = torch.randperm(int(group.max()) + 1 if len(group) else 0)
        order = order[torch.argsort(place[group], stable=True)]
    return order.split(config.batch)


def _tune(config: CvrTrainConfig, head: CvrHead, pch: Pch, data: CvrData, next_item: TrainConfig) -> int:
    train = training_windows(pch.config.max_history, data, config)

    def validate() -> float:
        held_out = held_out_examples(pch, data, config, "validation")
        item = item_vectors(pch, data.content)
        return choosing_figure(head, held_out, item)

    tune_data = cvr_tuning.TuneData(train, data.content, data.dataset, data.split)
    return cvr_tuning.tune(config, replace(next_item, seed=config.seed), head, pch, tune_data, validate)


def _retrieved(pch: Pch, data: CvrData) -> dict[str, float]:
    """NDCG@10 on the test events, the figure that tuning must not lose."""
    if not data.split.test:
        return {}
    return {"ndcg_at_10": metrics(tower_ranks(pch, data.content, data.dataset, data.split.test))["ndcg_at_10"]}
