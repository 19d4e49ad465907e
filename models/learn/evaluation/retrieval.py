"""Retrieval from the whole catalogue by any recommender: the ranks of held-out items, and the first items of each list.

The protocol is that of `full_ranking`. The history has the newest `max_history` events before the one to be predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learn.data import Dataset, Event
from learn.evaluation.full_ranking import array_ranking
from learn.evaluation.metrics import Ranking
from learn.models.recommender import Recommender
from learn.padding import pad

CHUNK = 256


@dataclass(frozen=True)
class Histories:
    """The histories of e events: items and actions [e,l], times [e,l+1] and length [e]; padded on the right."""

    items: Tensor
    times: Tensor
    length: Tensor
    actions: Tensor


def histories(dataset: Dataset, events: list[Event], longest: int) -> Histories:
    """The histories of `events`, with as many columns as the longest one needs and at least one."""
    lengths = [min(event.position, longest) for event in events]
    items, times, actions = [], [], []
    for event, length in zip(events, lengths, strict=True):
        sequence, begin = dataset.sequences[event.user], event.position - length
        items.append(sequence.items[begin : event.position])
        actions.append(sequence.actions[begin : event.position])
        times.append(sequence.timestamps[begin : event.position + 1])
    padded = pad(items)[0]
    padded_times = pad(times, least=padded.shape[1] + 1)[0]
    padded_actions = torch.from_numpy(pad(actions)[0])
    return Histories(torch.from_numpy(padded), torch.from_numpy(padded_times), torch.tensor(lengths), padded_actions)


@torch.inference_mode()
def user_states(model: Recommender, dataset: Dataset, events: list[Event]) -> Tensor:
    """[e,E] on the CPU: each user's state before the event."""
    model.eval()
    device = next(model.buffers(), next(model.parameters(), torch.empty(0))).device
    # Histories of similar lengths are read at once, so that few columns are padding.
    order = torch.tensor([min(event.position, model.max_history) for event in events]).argsort(stable=True)
    found = []
    for chunk in order.split(CHUNK):
        given = histories(dataset, [events[index] for index in chunk.tolist()], model.max_history)
        inputs = (part.to(device) for part in (given.items, given.times, given.length, given.actions))
        found.append(model.last(*inputs).float().cpu())
    return torch.cat(found)[order.argsort()]


@torch.inference_mode()
def item_table(model: Recommender, n_items: int) -> Tensor:
    """[I,E] on the CPU: all item embeddings; only the result is as large as the catalogue."""
    model.eval()
    device = next(model.buffers(), next(model.parameters(), torch.empty(0))).device
    found = torch.empty(n_items, 0)
    for chunk in torch.arange(n_items).split(4096):
        embedded = model.item_embeddings(chunk.to(device)).float().cpu()
        if not found.numel():
            found = torch.empty(n_items, embedded.shape[1])
        found[chunk] = embedded
    return found


def retrieve(model: Recommender, dataset: Dataset, events: list[Event]) -> Ranking:
    """The rank and the first items of each event."""
    users, items = user_states(model, dataset, events), item_table(model, len(dataset.item_ids))
    return array_ranking(users.numpy(), items.numpy(), dataset, events)
