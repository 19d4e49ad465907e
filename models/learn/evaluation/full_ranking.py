"""Ranks the whole catalogue for each held-out event; popularity as a baseline.

For each held-out event, all items of the catalogue that the user has not met before are scored. The rank of the true
item is 1 + the number of other items whose score is at least as high, so ties count against the model, and a constant
score earns nothing. Each item is embedded alone, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from learn.data import Dataset, Event, PreparedSequences, Split
from learn.evaluation.metrics import Ranking, event_values, rank_scores
from learn.models.pch import Pch
from learn.padding import pad

# Events whose scores are computed at once, if `SCORE_BYTES` permits.
CHUNK = 256
# What the scores of a chunk may take while they are ranked, and what one of them takes: twice fp32, an int64 index of
# the partition, and the results of comparisons. Catalogues of up to 209,715 items get whole chunks.
SCORE_BYTES = 1 << 30
BYTES_PER_SCORE = 20
# Items that are embedded at once.
ITEM_CHUNK = 1 << 13
# The most held-out targets that `sequence_against_alone` compares with each other.
POOL = 20_000
POOL_CHUNK = 1 << 11
# Events counted at once.
COUNT_CHUNK = 1 << 22


def metrics(rank: np.ndarray) -> dict[str, float]:
    """The four metrics of a training log and a manifest, as means over events. `metrics.figures` gives all metrics."""
    names = ("hr_at_10", "hr_at_50", "ndcg_at_10", "mrr")
    return {name: float(event_values(rank, name).mean()) for name in names}


def popularity(dataset: Dataset, split: Split) -> np.ndarray:
    """[I] the number of training events of each item."""
    if isinstance(dataset.sequences, PreparedSequences):
        return _popularity_on_disk(dataset.sequences, np.asarray(split.n_train), len(dataset.item_ids))
    counts = np.zeros(len(dataset.item_ids), dtype=np.float32)
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        np.add.at(counts, sequence.items[:n_train], 1)
    return counts


def _popularity_on_disk(sequences: PreparedSequences, n_train: np.ndarray, n_items: int) -> np.ndarray:
    """The same from the array of all events, piece by piece, because a loop over millions of users takes minutes."""
    items, offsets = sequences.arrays["items"], np.asarray(sequences.arrays["offsets"])
    ends = offsets[:-1] + n_train
    counts = np.zeros(n_items, np.int64)
    for begin in range(0, len(items), COUNT_CHUNK):
        position = np.arange(begin, min(begin + COUNT_CHUNK, len(items)))
        # "right": the user of an event is the last one whose events begin at or before it.
        user = np.searchsorted(offsets, position, side="right") - 1
        counts += np.bincount(items[begin : begin + COUNT_CHUNK][position < ends[user]], minlength=n_items)
    return counts.astype(np.float32)


def popularity_ranks(dataset: Dataset, split: Split, events: list[Event]) -> np.ndarray:
    """The ranks of a baseline that recommends the same popular items to every user."""
    scores = popularity(dataset, split)
    return full_ranking(dataset, events, lambda rows: np.tile(scores, (len(events[rows]), 1))).rank


@torch.inference_mode()
def tower_ranks(pch: Pch, content: torch.Tensor, dataset: Dataset, events: list[Event]) -> np.ndarray:
    """The ranks of the towers as served: they read the newest `max_history` items, and dot products are the scores."""
    pch.eval()
    item = item_embeddings(pch, content)

    def score(rows: slice) -> np.ndarray:
        return (user_embeddings(pch, content, dataset, events[rows]) @ item.T).numpy()

    return full_ranking(dataset, events, score).rank


@torch.inference_mode()
def item_embeddings(pch: Pch, content: torch.Tensor) -> torch.Tensor:
    """[I,E] fp32: each item alone. `content` may be in fp16 or memory-mapped, as it is read piece by piece."""
    found = torch.empty(len(content), pch.config.embedding_dim)
    for begin in range(0, len(content), ITEM_CHUNK):
        rows = slice(begin, begin + ITEM_CHUNK)
        found[rows] = pch.alone(content[rows].float())
    return found


@torch.inference_mode()
def user_embeddings(pch: Pch, content: torch.Tensor, dataset: Dataset, events: Sequence[Event]) -> torch.Tensor:
    """[e,E] each user's embedding from the history before the event; `CHUNK` histories are in memory at once."""
    chunks = [events[begin : begin + CHUNK] for begin in range(0, len(events), CHUNK)]
    return torch.cat([_chunk_embeddings(pch, content, dataset, chunk) for chunk in chunks])


def _chunk_embeddings(pch: Pch, content: torch.Tensor, dataset: Dataset, events: Sequence[Event]) -> torch.Tensor:
    items, actions = [], []
    for event in events:
        sequence = dataset.sequences[event.user]
        newest = slice(max(0, event.position - pch.config.max_history), event.position)
        items.append(sequence.items[newest])
        actions.append(sequence.actions[newest])
    index, mask = map(torch.from_numpy, pad(items))
    return pch.last(content[index].float(), mask, pch.config.action_numbers(torch.from_numpy(pad(actions)[0])))


def full_ranking(dataset: Dataset, events: list[Event], score: Callable[[slice], np.ndarray]) -> Ranking:
    """Ranks the whole catalogue for each event, some events at a time.

    `score(rows)` returns [n,I] for `events[rows]`, so only that many scores are in memory: those of `CHUNK` events, or
    fewer for a catalogue whose scores would take more than `SCORE_BYTES`. Raises ValueError if there are no events, or
    if a score is NaN.
    """
    found = [
        rank_scores(score(rows), target, seen)
        for rows, target, seen in _chunks(dataset, events, BYTES_PER_SCORE * len(dataset.item_ids))
    ]
    return Ranking(np.concatenate([part.rank for part in found]), np.concatenate([part.top for part in found]))


def _chunks(
    dataset: Dataset, events: list[Event], bytes_per_event: int
) -> Iterator[tuple[slice, np.ndarray, list[np.ndarray]]]:
    """The rows of `events` that are ranked at once, their targets, and the items that are not ranked for each."""
    if not events:
        raise ValueError("there are no events to rank for")
    n_at_once = max(1, min(CHUNK, SCORE_BYTES // max(1, bytes_per_event)))
    for begin in range(0, len(events), n_at_once):
        rows = slice(begin, begin + n_at_once)
        before = [dataset.sequences[event.user].items[: event.position + 1] for event in events[rows]]
        target = np.array([items[-1] for items in before])
        # A target that the user has met before stays in the ranking.
        yield rows, target, [np.setdiff1d(items, items[-1:]) for items in before]


def ranks_by_weight(
    tower: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    weights: Sequence[float],
    dataset: Dataset,
    events: list[Event],
) -> np.ndarray:
    """[w,e]: the ranks by a score of the tower plus each of `weights` times another score.

    Both scores are dot products of user [e,E] and item [I,E] embeddings, which are computed once for all weights.
    Raises ValueError if there are no events, or if a score is not finite.
    """
    found = []
    for rows, target, seen in _chunks(dataset, events, 2 * BYTES_PER_SCORE * len(dataset.item_ids)):
        first, second = (user[rows] @ item.T for user, item in (tower, other))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            # NaN compares false with everything, so such an item would count as ranked below the target.
            raise ValueError("the score of an item is not finite")
        for row, indices in enumerate(seen):
            first[row, indices] = -np.inf
        ranks = []
        for weight in weights:
            scores = first + np.float32(weight) * second
            # The target counts itself, so no 1 is added.
            ranks.append((scores >= scores[np.arange(len(target)), target][:, None]).sum(axis=1))
        found.append(np.stack(ranks))
    return np.concatenate(found, axis=1)


def array_ranking(user: np.ndarray, item: np.ndarray, dataset: Dataset, events: list[Event]) -> Ranking:
    """Ranks by the dot products of user [e,E], one embedding per event, with item [I,E]."""
    if len(user) != len(events) or len(item) != len(dataset.item_ids):
        raise ValueError(
            f"{len(user)} user embeddings for {len(events)} events, {len(item)} items for {len(dataset.item_ids)}"
        )
    return full_ranking(dataset, events, lambda rows: user[rows] @ item.T)


@torch.inference_mode()
def sequence_against_alone(pch: Pch, content: torch.Tensor, dataset: Dataset, events: list[Event]) -> dict[str, float]:
    """Hit rates with targets read as a sequence, as in training variant 1, and with each target read alone.

    The pool holds the held-out targets of all users. Each target is ranked among the pool by its user's state before
    the first held-out event; a rank of at most 10 is a hit. With more than `POOL` targets, only those of a fixed sample
    of users are in the pool, because its cost grows with the square of its size.
    """
    pch.eval()
    by_user: dict[int, list[int]] = {}
    for event in events:
        by_user.setdefault(event.user, []).append(event.position)
    users = _users_of_pool(by_user)
    positions = [np.array(sorted(by_user[user])) for user in users]
    state = user_embeddings(pch, content, dataset, [Event(u, int(p[0])) for u, p in zip(users, positions, strict=True)])
    items = [dataset.sequences[user].items[p] for user, p in zip(users, positions, strict=True)]
    pool = torch.from_numpy(np.concatenate(items))
    owner = torch.repeat_interleave(torch.arange(len(users)), torch.tensor([len(i) for i in items]))
    read = torch.cat([pch.states(content[torch.from_numpy(i)][None].float())[0, 1:] for i in items])
    return {
        "pool_hr_at_10_in_sequence": _pool_hits(state, read, pool, owner),
        "pool_hr_at_10_alone": _pool_hits(state, item_embeddings(pch, content[pool]), pool, owner),
    }


def _pool_hits(state: torch.Tensor, key: torch.Tensor, pool: torch.Tensor, owner: torch.Tensor) -> float:
    n_hits = 0
    for begin in range(0, len(pool), POOL_CHUNK):
        rows = slice(begin, begin + POOL_CHUNK)
        scores = state[owner[rows]] @ key.T  # [n,p]: row i ranks the pool for its item begin + i
        own = scores.diagonal(begin)[:, None]
        # Other targets of the same user, and other copies of the same item, are not mistakes.
        rival = (owner[rows, None] != owner[None]) & (pool[rows, None] != pool[None])
        n_hits += int((((scores >= own) & rival).sum(dim=1) < 10).sum())
    return n_hits / len(pool)


def _users_of_pool(by_user: dict[int, list[int]]) -> list[int]:
    """All users, or a fixed sample of them that has at most `POOL` targets."""
    users = sorted(by_user)
    if sum(map(len, by_user.values())) <= POOL:
        return users
    drawn = np.random.default_rng(0).permutation(users).tolist()
    n_targets = np.cumsum([len(by_user[user]) for user in drawn])
    # One user with more targets than that still makes a pool.
    return sorted(drawn[: max(1, int(np.searchsorted(n_targets, POOL, side="right")))])
