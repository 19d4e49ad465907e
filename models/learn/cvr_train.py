"""Trains the CVR head on frozen towers.

MovieLens has neither impressions nor conversions. The label here is `rating >= 4`, a PROXY for a conversion among the
items that a user met: the head learns what is liked, not what is bought.

The order of time is kept. The head learns from the training part of each user's events, each seen from the state before
it, stops where the validation events are predicted best, and is measured once on the test events.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from learn.cvr import CvrConfig, CvrHead
from learn.data import Dataset, Event, Split
from learn.evaluate import user_embeddings
from learn.pch import Pch

LIKED_FROM = 4.0


@dataclass(frozen=True)
class CvrTrainConfig:
    """One run of the head."""

    seed: int = 1
    epochs: int = 8
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Examples:
    """user [n,E], item [n] (catalogue index), label [n]."""

    user: Tensor
    item: Tensor
    label: Tensor


def label(values: np.ndarray) -> np.ndarray:
    """The proxy for a conversion."""
    return (values >= LIKED_FROM).astype(np.float32)


@torch.no_grad()
def training_examples(pch: Pch, content: Tensor, dataset: Dataset, split: Split) -> Examples:
    """Every training event with the user state before it.

    States come from windows that move by half the history length, so each state has read at least half of what it
    would read in serving (or all there is). That is 40 times cheaper than one window an event.
    """
    pch.eval()
    longest = pch.config.max_history
    stride = max(1, longest // 2)
    users, items, labels = [], [], []
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        run = sequence.items[:n_train]
        for begin in range(0, max(1, n_train - stride), stride):
            states = pch.states(content[torch.from_numpy(run[begin : begin + longest])][None])[0]  # [l+1,E]
            # State j stands before event begin + j. Earlier ones were taken from the window before.
            first = 0 if begin == 0 else begin + stride
            last = min(begin + longest, n_train)
            users.append(states[first - begin : last - begin])
            items.append(run[first:last])
            labels.append(label(sequence.values[first:last]))
    return Examples(torch.cat(users), torch.from_numpy(np.concatenate(items)), torch.from_numpy(np.concatenate(labels)))


def event_examples(pch: Pch, content: Tensor, dataset: Dataset, events: list[Event]) -> Examples:
    """Held-out events with exactly what serving would read."""
    items = np.array([dataset.sequences[event.user].items[event.position] for event in events], dtype=np.int64)
    values = np.array([dataset.sequences[event.user].values[event.position] for event in events], dtype=np.float32)
    chunks = [user_embeddings(pch, content, dataset, events[i : i + 256]) for i in range(0, len(events), 256)]
    return Examples(torch.cat(chunks), torch.from_numpy(items), torch.from_numpy(label(values)))


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half."""
    positive, negative = scores[labels > 0.5], scores[labels <= 0.5]
    if not len(positive) or not len(negative):
        raise ValueError("AUC needs both labels")
    below = np.searchsorted(np.sort(negative), positive, side="left")
    not_above = np.searchsorted(np.sort(negative), positive, side="right")
    return float((below + not_above).sum() / 2 / (len(positive) * len(negative)))


def train_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split
) -> tuple[CvrHead, dict[str, float]]:
    """Returns the head of the best epoch on validation, and its figures on the test events."""
    torch.manual_seed(config.seed)
    with torch.no_grad():
        item = pch.alone(content)  # [I,E]
    train = training_examples(pch, content, dataset, split)
    validation = event_examples(pch, content, dataset, split.validation)
    head = CvrHead(sizes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best, best_auc = copy.deepcopy(head.state_dict()), -1.0
    for _epoch in tqdm(range(config.epochs), desc="train cvr", unit="epoch"):
        _epoch_of(head, optimizer, train, item, config.batch)
        found = auc(predict(head, validation, item), validation.label.numpy())
        if found > best_auc:
            best, best_auc = copy.deepcopy(head.state_dict()), found
    head.load_state_dict(best)
    test = event_examples(pch, content, dataset, split.test)
    return head.eval(), {"cvr_validation_auc": best_auc} | measure(head, train, test, item)


def measure(head: CvrHead, train: Examples, test: Examples, item: Tensor) -> dict[str, float]:
    """AUC on the test events, beside what knows nothing (the base rate) and what knows the item only."""
    labels = test.label.numpy()
    n_items = len(item)
    seen = torch.bincount(train.item, minlength=n_items).float()
    liked = torch.bincount(train.item, weights=train.label, minlength=n_items).float()
    # Item means are pulled to the base rate as if by five more ratings, or items rated once would lead.
    mean = (liked + 5 * train.label.mean()) / (seen + 5)
    return {
        "cvr_auc": auc(predict(head, test, item), labels),
        "cvr_item_mean_auc": auc(mean[test.item].numpy(), labels),
        "cvr_base_rate": float(labels.mean()),
        "cvr_n_test": len(labels),
    }


@torch.no_grad()
def predict(head: CvrHead, examples: Examples, item: Tensor) -> np.ndarray:
    """Logits [n]."""
    return head(examples.user, item[examples.item], torch.arange(len(examples.item)))[1].numpy()


def _epoch_of(head: CvrHead, optimizer: torch.optim.Optimizer, train: Examples, item: Tensor, batch: int) -> None:
    order = torch.randperm(len(train.item))
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        logit = head(train.user[chosen], item[train.item[chosen]], torch.arange(len(chosen)))[1]
        loss = F.binary_cross_entropy_with_logits(logit, train.label[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
