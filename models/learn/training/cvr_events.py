"""The events that a CVR head learns from, each with its label and the user state just before it.

A head sees a user's events through windows: stretches of the history that the user tower reads at once. Only events
before the predicted one are read, with what the user did with them if the towers read actions (`PchConfig.actions`).

The user tower reads either every item that the user met or only the liked ones (`CvrTrainConfig.history`). Both can be
served, because the server's caller decides which items it sends as history; the bundle's manifest says which (`keeps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from learn.data import Event, Split
from learn.data.actions import LIKED, number
from learn.data.dataset import Sequences
from learn.models.pch import Pch
from learn.padding import pad
from learn.training.cvr_config import LIKED_FROM, CvrTrainConfig

# How many windows the user tower reads at once.
CHUNK = 64

Reading = Literal["sliding", "exact"]
Spans = Sequence[tuple[int, int, int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """Events as the head sees them: user state [n,E]; item, label, value, click and owner [n], as in `Window`."""

    user: Tensor
    item: Tensor
    label: Tensor
    value: Tensor
    click: Tensor
    owner: Tensor

    def take(self, rows: Tensor) -> Examples:
        """The examples of these rows."""
        return Examples(*(getattr(self, column.name)[rows] for column in fields(self)))


@dataclass(frozen=True)
class Window:
    """A stretch of one user's history, and the events that are predicted from its states.

    `history` [l] holds catalogue indices, `actions` [l] what the user did with them, as in `Sequence.actions`. Event j
    (of n) is predicted from the state after the first `state[j]` items, which is the start token's state where that is
    0. `item` [n] and `value` [n] are the event's; `label` [n] is 1 for a conversion, `click` [n] is 0 for an impression
    and no more. `row` [n] is its position in the order of the requested spans. `owner` is the user's index.
    """

    owner: int
    history: np.ndarray
    actions: np.ndarray
    state: np.ndarray
    item: np.ndarray
    label: np.ndarray
    value: np.ndarray
    click: np.ndarray
    row: np.ndarray


def label(values: np.ndarray, liked_from: float = LIKED_FROM) -> np.ndarray:
    """1 for a value that counts as a conversion or its proxy, 0 for another one."""
    return (values >= liked_from).astype(np.float32)


def labels(config: CvrTrainConfig, values: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """[n] 1 for an event that is a conversion, by its action or by its value, 0 for another one."""
    if config.conversions:
        return _is_one_of(actions, config.conversions).astype(np.float32)
    by_value = label(values, config.liked_from)
    return by_value * clicks(config, actions) if config.task == "click_and_conversion" else by_value


def clicks(config: CvrTrainConfig, actions: np.ndarray) -> np.ndarray:
    """[n] 0 for an event that is an impression and no more, 1 for another one."""
    return 1.0 - _is_one_of(actions, config.impressions).astype(np.float32)


def is_history(config: CvrTrainConfig, values: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """[n] Which events are part of the histories of later ones."""
    if config.history == "all":
        return np.ones(len(values), dtype=bool)
    return _is_one_of(actions, LIKED) if config.conversions else values >= config.liked_from


def _is_one_of(actions: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    return np.isin(actions, [number(name) for name in names])


def windows(sequences: Sequences, spans: Spans, longest: int, config: CvrTrainConfig, reading: Reading) -> list[Window]:
    """Windows that cover the events of `spans`. A span (user, begin, end) is the user's positions begin <= p < end.

    "exact": an event is predicted from the newest `longest` items before it, as in serving. "sliding": windows move by
    half of `longest`, so a state has read at least half of what it would read in serving, or all that there is. For
    long sequences this is 40 times cheaper than one window per event.
    """
    stride = max(1, longest // 2)
    found, n_rows = [], 0
    for user, begin, end in spans:
        sequence = sequences[user]
        items, values, actions = (
            np.asarray(column[:end]) for column in (sequence.items, sequence.values, sequence.actions)
        )
        in_history = is_history(config, values, actions)
        past, done = items[in_history], actions[in_history]
        n_before = (np.cumsum(in_history) - in_history)[begin:end]  # [n] how many items of `past` precede each event
        if reading == "sliding":
            starts = np.maximum(0, n_before // stride - 1) * stride
        else:
            starts = np.maximum(0, n_before - longest)
        for start in np.unique(starts):
            events = np.flatnonzero(starts == start)
            state, position = n_before[events] - start, begin + events
            read = slice(start, start + state.max())
            found_labels = labels(config, values[position], actions[position])
            # Actions have no order of their own, so a conversion is better than another event, and that is all.
            value = found_labels if config.conversions else values[position].astype(np.float32)
            columns = (items[position], found_labels, value, clicks(config, actions[position]), n_rows + events)
            found.append(Window(user, past[read], done[read], state, *columns))
        n_rows += end - begin
    return found


@dataclass(frozen=True)
class Stacked:
    """Windows [b] as the towers read them: history and actions [b,l], padded on the right; of all their events [n],
    in the order of the windows, the window and the state in it, and what `Window` has of them.
    """

    history: Tensor
    actions: Tensor
    window: Tensor
    state: Tensor
    item: Tensor
    label: Tensor
    value: Tensor
    click: Tensor
    owner: Tensor

    def pick(self, states: Tensor) -> Tensor:
        """The states [n,E] of the events, out of all states of the windows [b,l+1,E].

        Padding is on the right, so no event's state has read it.
        """
        return states[self.window, self.state]


def stack(batch: list[Window]) -> Stacked:
    """These windows as tensors."""
    history, actions = (
        torch.from_numpy(pad(rows)[0])
        for rows in ([window.history for window in batch], [window.actions for window in batch])
    )
    n_events = torch.tensor([len(window.state) for window in batch])
    names = ("state", "item", "label", "value", "click")
    columns = (torch.from_numpy(np.concatenate([getattr(window, name) for window in batch])) for name in names)
    index = torch.repeat_interleave(torch.arange(len(batch)), n_events)
    owner = torch.tensor([window.owner for window in batch])[index]
    return Stacked(history, actions, index, *columns, owner)


@torch.no_grad()
def examples(pch: Pch, content: Tensor, found: list[Window]) -> Examples:
    """The events of all windows with their user states, in the order of `Window.row`."""
    pch.eval()
    by_length = sorted(found, key=lambda window: len(window.history))
    if not by_length:
        none, nothing = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return Examples(torch.zeros(0, pch.config.embedding_dim), nothing, none, none, none, nothing)
    order = torch.from_numpy(np.argsort(np.concatenate([window.row for window in by_length])))
    parts = []
    for batch in batches(by_length, CHUNK):
        read = stack(batch)
        distinct, place = torch.unique(read.history, return_inverse=True)
        adapted = pch.adapt(content[distinct].float())[place]
        states = pch.states_from_adapted(adapted, pch.config.action_numbers(read.actions))
        parts.append((read.pick(states), read.item, read.label, read.value, read.click, read.owner))
    return Examples(*(torch.cat(column)[order] for column in zip(*parts, strict=True)))


def training_spans(split: Split) -> Spans:
    """The training events: one span per user who has any."""
    return [(user, 0, n_train) for user, n_train in enumerate(split.n_train) if n_train]


def event_spans(events: list[Event]) -> Spans:
    """One span per held-out event."""
    return [(event.user, event.position, event.position + 1) for event in events]


def check_labels(sequences: Sequences, split: Split, config: CvrTrainConfig, advice: str) -> None:
    """Raises ValueError, ending in `advice`, if all training, validation or test events have the same label."""
    parts = {
        "training": training_spans(split),
        "validation": event_spans(split.validation),
        "test": event_spans(split.test),
    }
    for part, spans in parts.items():
        n_events = n_liked = 0
        for user, begin, end in spans:
            sequence = sequences[user]
            n_events += end - begin
            n_liked += int(labels(config, sequence.values[begin:end], sequence.actions[begin:end]).sum())
        if n_liked in (0, n_events):
            raise ValueError(
                f"{n_liked:,} of the {n_events:,} {part} events have {config.conversion()}, but training, choosing and "
                f"measuring a CVR head each need both labels: {advice}"
            )


def batches(found: list[T], size: int) -> Iterator[list[T]]:
    """The list in parts of at most `size`."""
    for begin in range(0, len(found), size):
        yield found[begin : begin + size]
