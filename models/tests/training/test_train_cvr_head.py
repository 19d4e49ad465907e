from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_pch

from learn.data import Dataset, Event, Sequence, Split
from learn.data.actions import ACTIONS, ActionThresholds
from learn.data.item_text import ItemText
from learn.evaluation.auc import auc, uauc
from learn.models.cvr import CvrConfig, CvrHead
from learn.training import losses
from learn.training.cvr_config import CvrTrainConfig
from learn.training.cvr_events import Examples, examples, is_history, windows
from learn.training.cvr_negatives import catalogue, with_negatives
from learn.training.train_config import TrainConfig
from learn.training.train_cvr_head import (
    CvrData,
    choosing_figure,
    event_batches,
    fit_head,
    held_out_examples,
    predict,
    train_head,
)

N_ITEMS = 40


def sequences(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Sequence(
            str(user),
            rng.permutation(N_ITEMS)[:n],
            rng.integers(1, 6, n).astype(np.float32),
            np.arange(n),
            rng.integers(0, 1 + len(ACTIONS), n).astype(np.uint8),
        )
        for user, n in enumerate(lengths)
    ]


def content(dim=12):
    return torch.nn.functional.normalize(torch.randn(N_ITEMS, dim), dim=-1)


def served_state(pch, vectors, sequence, position, history):
    """Returns the served user tower's state before the event, from the newest items that a caller would send."""
    longest = pch.config.max_history
    config = CvrTrainConfig(history=history)
    kept = np.flatnonzero(is_history(config, sequence.values[:position], sequence.actions[:position]))[-longest:]
    padded, actions = torch.zeros(1, longest, vectors.shape[1]), torch.zeros(1, longest, dtype=torch.int64)
    padded[0, : len(kept)] = vectors[torch.from_numpy(sequence.items[kept])]
    names = [ACTIONS[number - 1] if number else "" for number in sequence.actions[kept]]
    actions[0, : len(kept)] = torch.tensor([pch.config.action_number(name) for name in names], dtype=torch.int64)
    mask = (torch.arange(longest) < len(kept)).long()[None]
    return pch.last(padded, mask, actions if pch.config.actions else None)[0]


@pytest.mark.parametrize("actions", [(), ("dislike", "like")], ids=["plain", "actions"])
@pytest.mark.parametrize("history", ["all", "liked"])
def test_exact_windows_give_the_states_of_serving(history, actions):
    pch, vectors, runs = small_pch(actions=actions), content(), sequences(30, 3, 12)
    spans = [(0, 0, 30), (2, 4, 12), (1, 0, 1)]
    config = CvrTrainConfig(history=history)
    found = examples(pch, vectors, windows(runs, spans, pch.config.max_history, config, "exact"))
    assert found.owner.tolist() == [user for user, begin, end in spans for _ in range(begin, end)]
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
    config = CvrTrainConfig(history=history)
    for window in windows(runs, spans, longest, config, "sliding"):
        assert len(window.history) <= longest
        for row, state, item in zip(window.row, window.state, window.item, strict=True):
            user, position = events[row]
            assert item == runs[user].items[position]
            before = runs[user].items[:position]
            before = before[is_history(config, runs[user].values[:position], runs[user].actions[:position])]
            assert window.history[:state].tolist() == before[len(before) - state :].tolist()
            assert state >= min(len(before), max(1, longest // 2)) or state == len(before)
            seen[int(row)] = True
    assert len(seen) == len(events)


def test_conversions_and_liked_items_are_read_from_actions_if_the_config_names_some():
    names = ("purchase", "click", "like", "", "cart")
    actions = np.array([1 + ACTIONS.index(name) if name else 0 for name in names], np.uint8)
    run = Sequence("u", np.arange(5), np.ones(5, np.float32), np.arange(5), actions)
    config = CvrTrainConfig(conversions=("purchase", "cart"), history="liked")
    (window,) = windows([run], [(0, 0, 5)], 9, config, "sliding")
    assert window.label.tolist() == window.value.tolist() == [1, 0, 0, 0, 1]
    # The like is no conversion, but it is liked, as in the histories that `learn features` makes.
    assert window.history.tolist() == [0, 2] and window.state.tolist() == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="conversions has 'buy', but must be some of view, click"):
        CvrTrainConfig(conversions=("buy",))


def test_the_within_user_loss_matches_a_hand_computed_value():
    logit = torch.tensor([1.0, 0.0, 3.0, -1.0, 5.0])
    liked, user_of_event = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    # User 0 has the pairs 1 over 0 and 1 over 3; user 1 has liked events only, so no pairs.
    want = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(2.0))) / 2
    assert losses.within_user(logit, liked, user_of_event).item() == pytest.approx(want)
    assert losses.within_user(logit[:1], liked[:1], user_of_event[:1]).item() == 0.0
    # By values, user 1's second event is preferred to the first one as well, and user 0's to the third.
    value = torch.tensor([5.0, 3.0, 2.0, 4.0, 5.0])
    want = sum(math.log1p(math.exp(gap)) for gap in (-1.0, 2.0, 3.0, -6.0)) / 4
    assert losses.within_user(logit, value, user_of_event).item() == pytest.approx(want)


def taste_data():
    """Users like either even or odd items, and only what they liked before tells which."""
    rng = np.random.default_rng(1)
    vectors = torch.nn.functional.one_hot(torch.arange(N_ITEMS) % 2, 12).float() + 0.1 * torch.randn(N_ITEMS, 12)
    runs = []
    for user in range(60):
        items = rng.permutation(N_ITEMS)[:20]
        values = np.where(items % 2 == user % 2, 5.0, 2.0).astype(np.float32)
        runs.append(Sequence(str(user), items, values, np.arange(20), ActionThresholds(4.0, 2.0).numbers(values)))
    dataset = Dataset([str(i) for i in range(N_ITEMS)], [ItemText(title=str(i)) for i in range(N_ITEMS)], runs)
    validation = [Event(user, position) for user in range(60) for position in (14, 15)]
    test = [Event(user, position) for user in range(60) for position in range(16, 20)]
    return CvrData(vectors, dataset, Split([14] * 60, validation, test))


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


TUNED = CvrTrainConfig(
    epochs=1,
    tune_towers=True,
    tune_epochs=20,
    tune_learning_rate=3e-3,
    tune_head_learning_rate=3e-3,
    learning_rate=3e-3,
)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_tuned_towers_learn_tastes_from_liked_histories(weight):
    pch = small_pch()
    before = weights(pch)
    config = replace(TUNED, history="liked", within_user_weight=weight)
    _head, figures = train_head(config, CvrConfig(6, 16, 8), pch, taste_data())
    assert figures["cvr_auc"] > 0.9 and figures["cvr_n_test"] == 240
    assert figures["cvr_uauc"] > 0.9 > 0.6 > figures["cvr_item_mean_uauc"]
    assert changed(pch, before) and figures["cvr_tune_epoch"] > 0


def test_towers_with_actions_learn_tastes_from_histories_of_all_items():
    """Without actions, a history of all items does not tell what the user liked."""
    found = {}
    for actions in ((), ("like", "dislike")):
        torch.manual_seed(0)
        _head, figures = train_head(TUNED, CvrConfig(6, 16, 8), small_pch(actions=actions), taste_data())
        found[actions] = figures["cvr_uauc"]
    assert found["like", "dislike"] > 0.9 > 0.65 > found[()]


def test_tuning_the_last_block_leaves_what_comes_before_it():
    pch = small_pch(actions=("like", "dislike"))
    before = weights(pch)
    config = replace(TUNED, tune_layers="last", tune_epochs=3, tune_next_weight=0.5)
    _head, figures = train_head(config, CvrConfig(6, 16, 8), pch, taste_data(), TrainConfig(users=8, n_uniform=8))
    names = changed(pch, before)
    assert figures["cvr_tune_epoch"] > 0
    assert names and all(name.startswith(("blocks.2.", "norm_out.", "projection.")) for name in names)
    assert {"ndcg_at_10", "ndcg_at_10_before_cvr"} <= figures.keys()


@pytest.mark.parametrize("layers", ["last", "all"])
def test_next_item_prediction_keeps_what_the_towers_retrieve(layers):
    """With almost all weight on it, the towers learn to retrieve while the head is trained."""
    found = {}
    for weight in (0.0, 100.0):
        torch.manual_seed(1)
        config = replace(TUNED, tune_layers=layers, tune_next_weight=weight, tune_windows=4, history="liked")
        data = taste_data()
        # Every user meets the items of one taste only, so there is something to retrieve.
        runs = [
            Sequence(s.user, s.items[s.values > 4], s.values[s.values > 4] - (np.arange((s.values > 4).sum()) % 2) * 3)
            for s in data.dataset.sequences
        ]
        n_train = [len(run.items) - 4 for run in runs]
        validation = [Event(user, n_train[user] + k) for user in range(60) for k in (0, 1)]
        test = [Event(user, n_train[user] + k) for user in range(60) for k in (2, 3)]
        split = Split(n_train, validation, test)
        data = CvrData(data.content, Dataset(data.dataset.item_ids, data.dataset.texts, runs), split)
        _head, figures = train_head(config, CvrConfig(6, 16, 8), small_pch(), data, TrainConfig(users=16, n_uniform=16))
        found[weight] = figures["ndcg_at_10"]
    assert found[100.0] > found[0.0] + 0.05


def test_tuning_that_makes_validation_worse_is_undone():
    pch = small_pch()
    before = weights(pch)
    config = replace(TUNED, tune_learning_rate=10.0, tune_epochs=1, epochs=1)
    _head, figures = train_head(config, CvrConfig(6, 16, 8), pch, taste_data())
    if figures["cvr_tune_epoch"] == 0:
        assert not changed(pch, before)


def test_frozen_towers_do_not_change():
    pch = small_pch()
    before = weights(pch)
    fit_head(CvrTrainConfig(epochs=1), CvrConfig(6, 16, 8), pch, taste_data())
    assert not changed(pch, before)


def test_the_click_task_learns_which_items_a_user_meets_from_a_log_of_events_alone():
    """Users meet most of the even items or most of the odd ones; there are no values."""
    rng, taste = np.random.default_rng(1), taste_data()
    runs = [
        Sequence(str(user), rng.permutation(np.arange(user % 2, N_ITEMS, 2))[:18], np.ones(18, np.float32))
        for user in range(60)
    ]
    validation, test = ([Event(user, position) for user in range(60)] for position in (16, 17))
    dataset = Dataset(taste.dataset.item_ids, taste.dataset.texts, runs)
    data = CvrData(taste.content, dataset, Split([16] * 60, validation, test))
    torch.manual_seed(0)
    config = CvrTrainConfig(task="click", negatives=3, epochs=20, batch=64, learning_rate=1e-2)
    _head, figures = train_head(config, CvrConfig(6, 16, 8, product=True), small_pch(), data)
    assert figures["cvr_n_test"] == 240 and figures["cvr_base_rate"] == 0.25
    assert figures["cvr_uauc"] > 0.75 > figures["cvr_item_mean_uauc"] + 0.15


def test_a_log_with_impressions_trains_clicks_and_conversions_after_them():
    """Even items are clicked; of these, items below 20 convert. Odd ones below 20 would, but are never clicked."""
    rng, taste = np.random.default_rng(1), taste_data()
    view, click, purchase = (1 + ACTIONS.index(name) for name in ("view", "click", "purchase"))
    runs = []
    for user in range(60):
        items = rng.permutation(N_ITEMS)[:20]
        done = np.where(items % 2 == 1, view, np.where(items < 20, purchase, click)).astype(np.uint8)
        runs.append(Sequence(str(user), items, np.ones(20, np.float32), np.arange(20), done))
    dataset = Dataset(taste.dataset.item_ids, taste.dataset.texts, runs)
    vectors = torch.cat([taste.content[:, :2], (torch.arange(N_ITEMS) < 20).float()[:, None]], dim=1)
    vectors = torch.cat([vectors, 0.1 * torch.randn(N_ITEMS, 9)], dim=1)
    data = CvrData(vectors, dataset, taste.split)
    torch.manual_seed(0)
    config = CvrTrainConfig(
        task="click_and_conversion", conversions=("purchase",), epochs=20, batch=64, learning_rate=1e-2
    )
    pch = small_pch()
    head, figures = train_head(config, CvrConfig(6, 16, 8), pch, data)
    assert figures["cvr_uauc"] > 0.9
    # What is served tells conversions from clicks; that odd items are never clicked is known by the other output.
    held_out = held_out_examples(pch, data, config, "test")
    item = pch.alone(vectors).detach()
    with torch.no_grad():
        served = head(held_out.user, item[held_out.item], torch.arange(240))[1].numpy()
        clicked = head.outcome(held_out.user, item[held_out.item], torch.arange(240))[1].numpy()
    even, low = held_out.item % 2 == 0, held_out.item < 20
    assert auc(served[even], low[even].float().numpy()) > 0.8
    assert auc(clicked, even.float().numpy()) > 0.8
    assert torch.equal(held_out.click, even.float()) and torch.equal(held_out.label, (even & low).float())


def test_negatives_are_items_that_the_user_has_not_met_and_follow_their_event():
    runs = sequences(20, 30, seed=4)
    dataset = Dataset([str(i) for i in range(N_ITEMS)], [], runs)
    items = catalogue(dataset, Split([20, 20], [], []))
    assert items.probability.sum() == pytest.approx(1) and set(items.item) <= {*runs[0].items, *runs[1].items[:20]}
    found = windows(runs, [(0, 0, 20), (1, 5, 20)], 9, CvrTrainConfig(task="click"), "sliding")
    met = [runs[window.owner].items[:20] for window in found]
    extended = with_negatives(found, met, items, 2, np.random.default_rng(0))
    pch, vectors = small_pch(), content()
    plain, more = examples(pch, vectors, found), examples(pch, vectors, extended)
    assert more.label.tolist() == [1.0, 0.0, 0.0] * 35 and torch.equal(more.owner, plain.owner.repeat_interleave(3))
    torch.testing.assert_close(more.user, plain.user.repeat_interleave(3, dim=0))
    assert torch.equal(more.item[::3], plain.item)
    for row in range(1, len(more.item), 3):
        known = set(runs[int(more.owner[row])].items[:20].tolist())
        assert set(more.item[row : row + 2].tolist()) <= set(items.item.tolist()) - known
    # A user who met everything gets negatives anyway.
    everything = [np.arange(N_ITEMS)] * len(found)
    assert len(with_negatives(found, everything, items, 1, np.random.default_rng(0))[0].item) == 2 * len(found[0].item)


def test_batches_hold_every_event_once_and_pairs_of_users_if_the_loss_needs_them():
    owner = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(50), np.arange(1, 51))))
    for weight in (0.0, 1.0):
        config = CvrTrainConfig(batch=64, events_per_user=8, within_user_weight=weight)
        found = event_batches(owner, config)
        assert sorted(torch.cat(found).tolist()) == list(range(len(owner)))
        n_users = np.mean([len(owner[batch].unique()) for batch in found[:-1]])
        assert (n_users < 64 / 5) == bool(weight) and n_users > 5
    assert event_batches(owner[:0], config)[0].tolist() == []


def test_epochs_are_chosen_by_uauc_and_by_auc_where_no_user_has_both_labels():
    head = CvrHead(CvrConfig(2, 4, 3))
    item = torch.randn(6, 2)
    every = {"user": torch.randn(6, 2), "item": torch.arange(6), "label": torch.tensor([1.0, 0, 1, 0, 1, 0])}
    every["value"] = every["click"] = every["label"]
    for owner, want in (([0, 0, 1, 1, 2, 2], uauc), ([0, 1, 2, 3, 4, 5], lambda s, y, _owner: auc(s, y))):
        held_out = Examples(**every, owner=torch.tensor(owner))
        scores = predict(head, held_out, item)
        assert choosing_figure(head, held_out, item) == want(scores, held_out.label.numpy(), np.array(owner))


def test_auc_needs_both_labels():
    with pytest.raises(ValueError, match="both labels"):
        auc(np.ones(2), np.ones(2))
