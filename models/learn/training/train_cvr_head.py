"""Trains the CVR head, either on frozen towers or together with them.

The label is `value >= liked_from`. MovieLens records neither impressions nor conversions, so `rating >= 4` is a PROXY
for a conversion there, among the items that a user rated: the head learns what users like, not what they buy.

Training respects time. The head learns from each user's training events, each paired with the user state just before
it. The epoch with the best AUC on the validation events is kept, and its head is measured once on the test events.

The user tower reads either every item that the user met or only the liked ones (`CvrTrainConfig.history`). Both can be
served, because the server's caller decides which items it sends as history; the bundle's manifest says which (`keeps`).
The value of each item cannot be served. Towers can read what the user did with an item (`PchConfig.actions`), but this
training does not read it from the log yet.
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
# How many windows the user tower reads at once.
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
    # An event with this value or a higher one counts as a conversion: 4 for star ratings, 1 where values are 0 and 1.
    liked_from: float = LIKED_FROM
    # Which of a user's earlier items the user tower reads. Choose the one that callers will send in production.
    history: History = "all"
    # Whether the head's loss trains the towers as well. That changes what the towers retrieve: evaluate them again.
    tune_towers: bool = False
    tune_learning_rate: float = 3e-4
    # Weight of the `within_user_loss`, which rewards the right order among one user's events. Only with `tune_towers`.
    within_user_weight: float = 0.0
    # Windows per step while the towers are tuned; a window has up to `max_history` items, and their events.
    tune_windows: int = 16


@dataclass(frozen=True)
class Examples:
    """Events as the head sees them: user state [n,E], item [n] (catalogue index), label [n]."""

    user: Tensor
    item: Tensor
    label: Tensor


@dataclass(frozen=True)
class Window:
    """A stretch of one user's history, and the events that are predicted from its states.

    `history` [l] holds catalogue indices. Event j (of n) is predicted from the state after the first `state[j]` items,
    which is the start token's state where that is 0. `item` [n] and `label` [n] are the event's item and whether it is
    a conversion. `row` [n] is the event's position in the order of the requested spans.
    """

    history: np.ndarray
    state: np.ndarray
    item: np.ndarray
    label: np.ndarray
    row: np.ndarray


def label(values: np.ndarray, liked_from: float = LIKED_FROM) -> np.ndarray:
    """1 for a conversion or its proxy, 0 otherwise."""
    return (values >= liked_from).astype(np.float32)


def is_history(values: np.ndarray, history: History, liked_from: float = LIKED_FROM) -> np.ndarray:
    """[n] Which events are part of the histories of later ones."""
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
    """Windows that cover the events of `spans`. A span (user, begin, end) is the user's positions begin <= p < end.

    "exact": an event is predicted from the newest `longest` items before it, as in serving. "sliding": windows move by
    half of `longest`, so a state has read at least half of what it would read in serving, or all that there is. For
    long sequences this is 40 times cheaper than one window per event.
    """
    stride = max(1, longest // 2)
    found, n_rows = [], 0
    for user, begin, end in spans:
        sequence = sequences[user]
        items, values = np.asarray(sequence.items[:end]), np.asarray(sequence.values[:end])
        in_history = is_history(values, history, liked_from)
        past = items[in_history]
        n_before = (np.cumsum(in_history) - in_history)[begin:end]  # [n] how many items of `past` precede each event
        if reading == "sliding":
            starts = np.maximum(0, n_before // stride - 1) * stride
        else:
            starts = np.maximum(0, n_before - longest)
        for start in np.unique(starts):
            events = np.flatnonzero(starts == start)
            state, position = n_before[events] - start, begin + events
            labels = label(values[position], liked_from)
            found.append(Window(past[start : start + state.max()], state, items[position], labels, n_rows + events))
        n_rows += end - begin
    return found


def states(pch: Pch, content: Tensor, batch: list[Window]) -> Tensor:
    """User states [n,E] of all events of these windows, in the order of the windows."""
    index = torch.from_numpy(pad([window.history for window in batch])[0])
    all_states = pch.states(content[index])  # [b,l+1,E]; padding is on the right, so no event's state has read it
    window_of_event = np.repeat(np.arange(len(batch)), [len(window.state) for window in batch])
    state_of_event = np.concatenate([window.state for window in batch])
    return all_states[torch.from_numpy(window_of_event), torch.from_numpy(state_of_event)]


@torch.no_grad()
def examples(pch: Pch, content: Tensor, found: list[Window]) -> Examples:
    """The events of all windows with their user states, in the order of `Window.row`."""
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
    """Every training event with the user state just before it, read through sliding windows."""
    config = config or CvrTrainConfig()
    spans, longest = training_spans(split), pch.config.max_history
    found = windows(dataset.sequences, spans, longest, config.history, "sliding", config.liked_from)
    return examples(pch, content, found)


def training_spans(split: Split) -> list[tuple[int, int, int]]:
    """The training events: one span per user who has any."""
    return [(user, 0, n_train) for user, n_train in enumerate(split.n_train) if n_train]


def event_spans(events: list[Event]) -> list[tuple[int, int, int]]:
    """One span per held-out event."""
    return [(event.user, event.position, event.position + 1) for event in events]


def check_labels(sequences: Sequences, split: Split, parts: tuple[str, ...], liked_from: float, advice: str) -> None:
    """Raises ValueError, ending in `advice`, if all events of one of the `parts` have the same label.

    A part is "training", "validation" or "test".
    """
    events = {"validation": split.validation, "test": split.test}
    for part in parts:
        spans = training_spans(split) if part == "training" else event_spans(events[part])
        n_events = n_liked = 0
        for user, begin, end in spans:
            n_events += end - begin
            n_liked += int(label(np.asarray(sequences[user].values[begin:end]), liked_from).sum())
        if n_liked in (0, n_events):
            raise ValueError(
                f"{n_liked:,} of the {n_events:,} {part} events have a value of cvr.liked_from = {liked_from:g} or "
                f"more, but training, choosing and measuring a CVR head each need both labels: {advice}"
            )


def train_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split
) -> tuple[CvrHead, dict[str, float]]:
    """Returns the head of the best epoch on validation, and its metrics on the test events.

    With `tune_towers`, `pch` is changed in place; save it together with the head.
    """
    head, best_auc = fit_head(config, sizes, pch, content, dataset, split)
    with torch.no_grad():
        item = pch.alone(content)
    longest, spans = pch.config.max_history, event_spans(split.test)
    train = training_examples(pch, content, dataset, split, config)
    test_windows = windows(dataset.sequences, spans, longest, config.history, "exact", config.liked_from)
    test = examples(pch, content, test_windows)
    return head, {"cvr_validation_auc": best_auc} | measure(head, train, test, item)


def fit_head(
    config: CvrTrainConfig, sizes: CvrConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split
) -> tuple[CvrHead, float]:
    """Returns the head of the best epoch on validation, and its validation AUC. Test events are not read."""
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
    training, held_out = examples(pch, content, train), examples(pch, content, validation)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best = BestWeights([head])
    train_epochs(
        best,
        tqdm(range(1, config.epochs + 1), desc="train cvr", unit="epoch"),
        train_epoch=lambda: _train_epoch(head, optimizer, training, item, config.batch),
        validate=lambda: auc(predict(head, held_out, item), held_out.label.numpy()),
    )
    return head.eval(), best.figure


def measure(head: CvrHead, train: Examples, test: Examples, item: Tensor) -> dict[str, float]:
    """AUC on the test events, next to two baselines: the base rate, and the mean label of each item."""
    labels = test.label.numpy()
    n_items = len(item)
    seen = torch.bincount(train.item, minlength=n_items).float()
    liked = torch.bincount(train.item, weights=train.label, minlength=n_items).float()
    # Each mean is smoothed with five events at the base rate; otherwise items with a single event would rank first.
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


def _train_epoch(head: CvrHead, optimizer: torch.optim.Optimizer, train: Examples, item: Tensor, batch: int) -> None:
    order = torch.randperm(len(train.item))
    for begin in range(0, len(order), batch):
        chosen = order[begin : begin + batch]
        logit = head(train.user[chosen], item[train.item[chosen]], torch.arange(len(chosen)))[1]
        _step(optimizer, F.binary_cross_entropy_with_logits(logit, train.label[chosen]))


def _tune(
    config: CvrTrainConfig, head: CvrHead, pch: Pch, content: Tensor, found: tuple[list[Window], list[Window]]
) -> float:
    """Trains head and towers together, leaves both with the weights of the best epoch, and returns its validation AUC.

    `found` are the windows of the training and the validation events.
    """
    train, validation = found
    # The first layer learns badly from raw content, so it is trained on standardised content. The towers take raw
    # content before and after.
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
            _step(optimizer, _window_loss(config, head, pch, content, batch))

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


def within_user_loss(logit: Tensor, liked: Tensor, window: Tensor) -> Tensor:
    """Mean of softplus(logit_j - logit_i) over pairs of events of one window, i liked and j not; 0 without pairs.

    All inputs are [n]; `window` is the index of the event's window, and so separates users. This is the pairwise
    logistic loss (RankNet, Burges et al. 2005), taken within users and added to the pointwise loss ("combined-pair",
    Li et al., KDD 2015). Knowing how much a user likes in general does not lower it, so the head must learn which
    items go with which user.
    """
    pair = (window[:, None] == window[None]) & (liked[:, None] > 0.5) & (liked[None] < 0.5)  # [n,n]
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
        n_events = torch.tensor([len(window.item) for window in batch])
        window_of_event = torch.repeat_interleave(torch.arange(len(batch)), n_events)
        loss = loss + config.within_user_weight * within_user_loss(logit, liked, window_of_event)
    return loss


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _batches(found: list[Window], size: int) -> Iterator[list[Window]]:
    for begin in range(0, len(found), size):
        yield found[begin : begin + size]
