from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import small_pch

from learn.data import Dataset, Event, Sequence, Split
from learn.data.item_text import ItemText
from learn.evaluation.auc import auc
from learn.models.cvr import CvrConfig
from learn.training.train_cvr_head import (
    CvrTrainConfig,
    examples,
    fit_head,
    is_history,
    train_head,
    windows,
    within_user_loss,
)

N_ITEMS = 40


def sequences(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sequence(str(user), rng.permutation(N_ITEMS)[:n], rng.integers(1, 6, n).astype(np.float32), np.arange(n))
        for user, n in enumerate(lengths)
    ]


def content(dim=12):
    return torch.nn.functional.normalize(torch.randn(N_ITEMS, dim), dim=-1)


def served_state(pch, vectors, sequence, position, history):
    """Returns the served user tower's state before the event, from the newest items that a caller would send."""
    items = sequence.items[:position][is_history(sequence.values[:position], history)][-pch.config.max_history :]
    padded = torch.zeros(1, pch.config.max_history, vectors.shape[1])
    padded[0, : len(items)] = vectors[torch.from_numpy(items)]
    mask = (torch.arange(pch.config.max_history) < len(items)).long()[None]
    return pch.last(padded, mask)[0]


@pytest.mark.parametrize("history", ["all", "liked"])
def test_exact_windows_give_the_states_of_serving(history):
    pch, vectors, runs = small_pch(), content(), sequences(30, 3, 12)
    spans = [(0, 0, 30), (2, 4, 12), (1, 0, 1)]
    found = examples(pch, vectors, windows(runs, spans, pch.config.max_history, history, "exact"))
    events = [(user, position) for user, begin, end in spans for position in range(begin, end)]
    assert found.item.tolist() == [int(runs[user].items[position]) for user, position in events]
    assert found.label.tolist() == [float(runs[user].values[position] >= 4) for user, position in events]
    with torch.no_grad():
        want = torch.stack([served_state(pch, vectors, runs[u], p, history) for u, p in events])
    np.testing.assert_allclose(found.user, want, atol=1e-5)


@pytest.mark.parametrize("history", ["all", "liked"])
@pytest.mark.parametrize("longest", [1, 2, 9, 10])
def test_sliding_windows_read_at_least_half_a_window_and_no_future_event(history, longest):
    runs = sequences(35, 1, 8)
    spans = [(0, 5, 35), (1, 0, 1), (2, 0, 8)]
    events = [(user, position) for user, begin, end in spans for position in range(begin, end)]
    seen = {}
    for window in windows(runs, spans, longest, history, "sliding"):
        assert len(window.history) <= longest
        for row, state, item in zip(window.row, window.state, window.item, strict=True):
            user, position = events[row]
            assert item == runs[user].items[position]
            before = runs[user].items[:position][is_history(runs[user].values[:position], history)]
            assert window.history[:state].tolist() == before[len(before) - state :].tolist()
            assert state >= min(len(before), max(1, longest // 2)) or state == len(before)
            seen[int(row)] = True
    assert len(seen) == len(events)


def test_an_unknown_history_is_refused_by_name():
    with pytest.raises(ValueError, match="'seen'"):
        is_history(np.ones(3), "seen")


def test_the_within_user_loss_matches_a_hand_computed_value():
    logit = torch.tensor([1.0, 0.0, 3.0, -1.0, 5.0])
    liked, user_of_event = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    # User 0 has the pairs 1 over 0 and 1 over 3; user 1 has liked events only, so no pairs.
    want = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0))) / 2
    assert within_user_loss(logit, liked, user_of_event).item() == pytest.approx(want)
    assert within_user_loss(logit[:1], liked[:1], user_of_event[:1]).item() == 0.0


def taste_data():
    """Users like either even or odd items, and only their liked history tells which."""
    rng = np.random.default_rng(1)
    vectors = torch.nn.functional.one_hot(torch.arange(N_ITEMS) % 2, 12).float() + 0.1 * torch.randn(N_ITEMS, 12)
    runs = []
    for user in range(60):
        items = rng.permutation(N_ITEMS)[:20]
        runs.append(
            Sequence(str(user), items, np.where(items % 2 == user % 2, 5.0, 2.0).astype(np.float32), np.arange(20))
        )
    dataset = Dataset([str(i) for i in range(N_ITEMS)], [ItemText(title=str(i)) for i in range(N_ITEMS)], runs)
    validation = [Event(user, position) for user in range(60) for position in (14, 15)]
    test = [Event(user, position) for user in range(60) for position in range(16, 20)]
    return vectors, dataset, Split([14] * 60, validation, test)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_tuned_towers_learn_tastes_from_liked_histories(weight):
    vectors, dataset, split = taste_data()
    config = CvrTrainConfig(
        epochs=6,
        history="liked",
        tune_towers=True,
        tune_learning_rate=3e-3,
        learning_rate=3e-3,
        within_user_weight=weight,
    )
    pch = small_pch()
    before = {name: value.clone() for name, value in pch.state_dict().items()}
    _head, figures = train_head(config, CvrConfig(6, 16, 8), pch, vectors, dataset, split)
    assert figures["cvr_auc"] > 0.9 and figures["cvr_n_test"] == 240
    assert any(not torch.equal(v, before[n]) for n, v in pch.state_dict().items())


def test_frozen_towers_do_not_change():
    vectors, dataset, split = taste_data()
    pch = small_pch()
    before = {name: value.clone() for name, value in pch.state_dict().items()}
    fit_head(CvrTrainConfig(epochs=1), CvrConfig(6, 16, 8), pch, vectors, dataset, split)
    assert all(torch.equal(value, before[name]) for name, value in pch.state_dict().items())


def test_auc_needs_both_labels():
    with pytest.raises(ValueError, match="both labels"):
        auc(np.ones(2), np.ones(2))
