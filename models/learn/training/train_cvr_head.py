"""Trains the CVR head, on frozen towers or together with them.

The label is `value >= liked_from`. MovieLens has neither impressions nor conversions, so there `rating >= 4` is a PROXY
for a conversion among the items that a user met: the head learns what is liked, not what is bought.

The order of time is kept. The head learns from the training part of each user's events, each seen from the state before
it, stops where the validation events are predicted best, and is measured once on the test events.

What the user tower reads is a choice (`CvrTrainConfig.history`): every item that the user met, or the liked ones only.
Both can be served, because the caller of the server decides which items it sends as history. A value beside each item
could not: the served tower reads content and a mask, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from learn.content.standardise import fit
from learn.data import Dataset, Event, Sequence, Split
from learn.data.dataset import Sequences
from learn.evaluation.auc import auc
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.pch import Pch
from learn.padding import pad
from learn.training.best_weights import BestWeights, train_epochs

LIKED_FROM = 4.0
# Windows read by the user tower at once.
CHUNK = 64

History = Literal["all", "liked"]
Reading = Literal["sliding", "exact"]


@dataclass(frozen=True)
class CvrTrainConfig:
    """One run of the CVR stage."""

    seed: int = 1
    epochs: int = 8
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    # An event of this value or more is a conversion: 4 stars, or 1 where values are 0 and 1.
    liked_from: float = LIKED_FROM
    # Which of a user's earlier items the user tower reads. Choose what the caller will send in production.
    history: History = "all"
    # Trains the towers with the head's loss too. What retrieval they did before is then no longer what they do.
    tune_towers: bool = False
    tune_learning_rate: float = 3e-4
    # Weight of `within_user`: order among one user's events, which is what a ranking model has to add to a user's mean.
    # Only with `tune_towers`.
    within_user_weight: float = 0.0
    # Windows of history a step while towers are tuned; one window has up to `max_history` items and their events.
    tune_windows: int = 16


@dataclass(frozen=True)
class Examples:
    """user [n,E], item [n] (catalogue index), label [n]."""

    user: Tensor
    item: Tensor
    label: Tensor


@dataclass(frozen=True)
class Window:
    """A run of history and the events that are predicted from within it.

    `history` [l] are catalogue indices. Event j (of n) is seen from the state after `state[j]` items of it, so from the
    start token if that is 0; `item` [n] and `label` [n] say what was met and whether it was liked. `row` [n] is the
    event's place in the order in which events were asked for.
    """

    history: np.ndarray
    state: np.ndarray
    item: np.ndarray
    label: np.ndarray
    row: np.ndarray


def label(values: np.ndarray, liked_from: float = LIKED_FROM) -> np.ndarray:
    """1 for a conversion, or what stands for one, else 0."""
    return (values >= liked_from).astype(np.float32)


def kept(values: np.ndarray, history: History, liked_from: float = LIKED_FROM) -> np.ndarray:
    """[n] which events stand in later histories."""
    if history not in ("all", "liked"):
        raise ValueError(f"history is {history!r}, expected 'all' or 'liked'")
    return values >= liked_from if history == "liked" else np.ones(len(values), dtype=bool)


def windows(
    sequences: list[Sequence],
    spans: list[tuple[int, int, int]],
    longest: int,
    history: History,
    reading: Reading,
    liked_from: float = LIKED_FROM,
) -> list[Window]:
    """Windows that cover the events of `spans`, each (user, begin, end): the positions begin <= p < end of a user.

    "exact": an event is seen from the newest `longest` items before it, as in serving. "sliding": windows move by half
    of `longest`, so a state has read at least half of what it would read in serving (or all there is); for long
    sequences that is 40 times cheaper than a window an event.
    """
    stride = max(1, longest // 2)
    found, n_rows = [], 0
    for user, begin, end in spans:
        sequence = sequences[user]
        items, values = np.asarray(sequence.items[:end]), np.asarray(sequence.values[:end])
        keep = kept(values, history, liked_from)
        run = items[keep]
        before = (np.cumsum(keep) - keep)[begin:end]  # [n] items of `run` that stand before each event
        start = (
            np.maximum(0, before // stride - 1) * stride if reading == "sliding" else np.maximum(0, before - longest)
        )
        for first in np.unique(start):
            own = np.flatnonzero(start == first)
            state = before[own] - first
            at = begin + own
            found.append(
                Window(run[first : first + state.max()], state, items[at], label(values[at], liked_from), n_rows + own)
            )
        n_rows += end - begin
    return found


def states(pch: Pch, content: Tensor, batch: list[Window]) -> Tensor:
    """User states [n,E] of the events of these windows, one after the other."""
    index = torch.from_numpy(pad([window.history for window in batch])[0])
    every = pch.states(content[index])  # [b,l+1,E]; padding stands on the right, where no state of an event sees it
    owner = np.repeat(np.arange(len(batch)), [len(window.state) for window in batch])
    return every[torch.from_numpy(owner), torch.from_numpy(np.concatenate([window.state for window in batch]))]


@torch.no_grad()
def examples(pch: Pch, content: Tensor, found: list[Window]) -> Examples:
    """The events of all windows with their states, in the order of `Window.row`."""
    pch.eval()
    by_length = sorted(found, key=lambda window: len(window.history))
    if not by_length:
        return Examples(torch.zeros(0, pch.config.out_dim), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    order = torch.from_numpy(np.argsort(np.concatenate([window.row for window in by_length])))
    user = torch.cat([states(pch, content, batch) for batch in _batches(by_length, CHUNK)])
    item = torch.from_numpy(np.concatenate([window.item for window in by_length]))
    liked = torch.from_numpy(np.concatenate([window.label for window in by_length]))
    return Examples(user[order], item[order], liked[order])


def training_examples(
    pch: Pch, content: Tensor, dataset: Dataset, split: Split, config: CvrTrainConfig | None = None
) -> Examples:
    """Every training event with the user state before it, read through sliding windows."""
    config = config or CvrTrainConfig()
    spans, longest = training_spans(split), pch.config.max_history
    found = windows(dataset.sequences, spans, longest, config.history, "sliding", config.liked_from)
    return examples(pch, content, found)


def training_spans(split: Split) -> list[tuple[int, int, int]]:
    """Every training event."""
    return [(user, 0, n_train) for user, n_train in enumerate(split.n_train) if n_train]


def event_spans(events: list[Event]) -> list[tuple[int, int, int]]:
    """Held-out events, one span each."""
    return [(event.user, event.position, event.position + 1) for event in events]


def check_labels(sequences: Sequences, split: Split, parts: tuple[str, ...], liked_from: float, advice: str) -> None:
    """ValueError, ending in `advice`, if "training", "validation" or "test", as far as asked for, lacks a label."""
    events = {"validation": split.validation, "test": split.test}
    for part in parts:
        spans = training_spans(split) if part == "training" else event_spans(events[part])
        n_events = n_liked = 0
        for user, begin, end in spans:
            n_events += end - begin
            n_liked += int(label(np.asarray(sequences[user].values[begin:end]), liked_from).sum())
        if n_liked in (0, n_events):
            raise ValueError(
                f"{part} has {n_events:,} events, {n_liked:,} of them with a value of cvr.liked_from = {liked_from:g} "
                f"or more, and a CVR head is trained, chosen and measured on both kinds: {advice}"
            )


def train_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split
) -> tuple[CvrHead, dict[str, float]]:
    """Returns the head of the best epoch on validation, and its figures on the test events.

    With `tune_towers`, `pch` is changed in place and has to be kept with the head.
    """
    head, best_auc = fit_head(config, sizes, pch, content, dataset, split)
    with torch.no_grad():
        item = pch.alone(content)
    ways = (pch.config.max_history, config.history, "exact", config.liked_from)
    train = training_examples(pch, content, dataset, split, config)
    test = examples(pch, content, windows(dataset.sequences, event_spans(split.test), *ways))
    return head, {"cvr_validation_auc": best_auc} | measure(head, train, test, item)


def fit_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split
) -> tuple[CvrHead, float]:
    """The head of the best epoch on validation, and its AUC there. Test events are not looked at."""
    torch.manual_seed(config.seed)
    head = CvrHead(sizes)
    longest = pch.config.max_history
    liked = config.liked_from
    train = windows(dataset.sequences, training_spans(split), longest, config.history, "sliding", liked)
    validation = windows(dataset.sequences, event_spans(split.validation), longest, config.history, "exact", liked)
    if config.tune_towers:
        return head.eval(), _tune(config, head, pch, content, (train, validation))
    with torch.no_grad():
        item = pch.alone(content)  # [I,E]
    known, held_out = examples(pch, content, train), examples(pch, content, validation)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best = BestWeights([head])
    train_epochs(
        best,
        tqdm(range(1, config.epochs + 1), desc="train cvr", unit="epoch"),
        train_epoch=lambda: _epoch_of(head, optimizer, known, item, config.batch),
        validate=lambda: auc(predict(head, held_out, item), held_out.label.numpy()),
    )
    return head.eval(), best.figure


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
        _descend(optimizer, F.binary_cross_entropy_with_logits(logit, train.label[chosen]))


def _tune(
    config: CvrTrainConfig, head: CvrHead, pch: Pch, content: Tensor, found: tuple[list[Window], list[Window]]
) -> float:
    """Head and towers together; both end at the best epoch on validation, and its AUC is returned."""
    train, validation = found
    # The first layer learns badly on raw content, which the towers take as they come here and as they leave.
    standardisation = fit(content, "scale")
    standardisation.unfold_from(pch.adaptor[0])
    content = standardisation.apply(content)
    groups = [
        {"params": list(pch.parameters()), "lr": config.tune_learning_rate},
        {"params": list(head.parameters()), "lr": config.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)

    def train_epoch() -> None:
        pch.train()
        order = torch.randperm(len(train)).tolist()
        for batch in _batches([train[index] for index in order], config.tune_windows):
            _descend(optimizer, _window_loss(config, head, pch, content, batch))

    def validate() -> float:
        held_out = examples(pch, content, validation)
        with torch.no_grad():
            item = pch.alone(content)
        return auc(predict(head, held_out, item), held_out.label.numpy())

    best = BestWeights([head, pch])
    epochs = tqdm(range(1, config.epochs + 1), desc="train cvr and towers", unit="epoch")
    train_epochs(best, epochs, train_epoch, validate)
    standardisation.fold_into(pch.adaptor[0])
    pch.eval()
    return best.figure


def within_user(logit: Tensor, liked: Tensor, owner: Tensor) -> Tensor:
    """Mean of softplus(s_j - s_i) over pairs of one owner, i liked and j not; 0 if there is none. All [n].

    The pairwise logistic loss (RankNet, Burges et al. 2005) within users, added to the pointwise one ("combined-pair",
    Li et al., KDD 2015): a user's own mean does not help with it, so it has to be learned from user and item together.
    """
    pair = (owner[:, None] == owner[None]) & (liked[:, None] > 0.5) & (liked[None] < 0.5)  # [n,n]
    gap = (logit[None] - logit[:, None])[pair]
    return F.softplus(gap).mean() if len(gap) else logit.sum() * 0.0


def _window_loss(config: CvrTrainConfig, head: CvrHead, pch: Pch, content: Tensor, batch: list[Window]) -> Tensor:
    item = torch.from_numpy(np.concatenate([window.item for window in batch]))
    liked = torch.from_numpy(np.concatenate([window.label for window in batch]))
    distinct, place = torch.unique(item, return_inverse=True)
    embedding = pch.alone(content[distinct])[place]
    logit = head(states(pch, content, batch), embedding, torch.arange(len(item)))[1]
    loss = F.binary_cross_entropy_with_logits(logit, liked)
    if config.within_user_weight:
        owner = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(window.item) for window in batch]))
        loss = loss + config.within_user_weight * within_user(logit, liked, owner)
    return loss


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _batches(found: list[Window], size: int) -> Iterator[list[Window]]:
    for begin in range(0, len(found), size):
        yield found[begin : begin + size]
