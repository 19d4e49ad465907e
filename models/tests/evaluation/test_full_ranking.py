"""Ranks and metrics against hand-computed values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import small_pch

from learn.data import Dataset, Event, Sequence, Split
from learn.data.item_text import ItemText
from learn.evaluation import full_ranking
from learn.evaluation.auc import auc
from learn.evaluation.metrics import rank_scores


def test_ranks_match_hand_computed_values():
    scores = np.array([[0.9, 0.5, 0.7, 0.1], [0.9, 0.5, 0.7, 0.1], [1.0, 1.0, 1.0, 1.0]])
    got = rank_scores(scores, np.array([1, 1, 2]), [np.array([], dtype=int), np.array([0]), np.array([3])])
    # In the third row, two other items tie with the target; ties count against it.
    assert got.rank.tolist() == [3, 2, 3]


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_target_without_a_finite_score_or_a_rank_is_an_error(score):
    with pytest.raises(ValueError, match="not finite"):
        rank_scores(np.array([[score, 1.0]]), np.array([0]), [np.array([], dtype=int)])
    with pytest.raises(ValueError, match="not ranked"):
        rank_scores(np.array([[0.0, 1.0]]), np.array([0]), [np.array([0])])


def test_metrics_match_hand_computed_values():
    got = full_ranking.metrics(np.array([1, 3, 11, 60]))
    assert got["hr_at_10"] == pytest.approx(0.5)
    assert got["hr_at_50"] == pytest.approx(0.75)
    assert got["ndcg_at_10"] == pytest.approx((1 + 1 / math.log2(4)) / 4)
    assert got["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 60) / 4)


def tiny_dataset():
    runs = [[0, 1, 2, 3], [1, 0, 1, 4], [1, 2, 0, 4]]
    sequences = [Sequence(str(u), np.array(r), np.ones(len(r))) for u, r in enumerate(runs)]
    return Dataset([str(i) for i in range(6)], [ItemText(title=str(i)) for i in range(6)], sequences)


def test_popularity_counts_training_events_only_and_skips_items_the_user_has_met():
    dataset = tiny_dataset()
    events = [Event(0, 3), Event(1, 3), Event(2, 3)]
    split = Split([3, 3, 3], [], events)
    assert full_ranking.popularity(dataset, split).tolist() == [3, 4, 2, 0, 0, 0]
    # User 0 met items 0, 1 and 2. Items 3, 4 and 5 tie at 0 events, so the target has rank 3. User 1 met items 0 and 1,
    # so item 2 comes first, and the target has rank 4.
    assert full_ranking.popularity_ranks(dataset, split, events).tolist() == [3, 4, 3]


def test_an_item_met_before_can_be_the_target():
    dataset = tiny_dataset()
    assert full_ranking.popularity_ranks(dataset, Split([3, 3, 3], [], []), [Event(1, 2)]).tolist() == [1]


def test_tower_ranks_are_those_of_a_plain_loop():
    import torch

    dataset, pch = tiny_dataset(), small_pch()
    content = torch.randn(6, 12)
    events = [Event(0, 3), Event(1, 2), Event(2, 1), Event(2, 0)]
    got = full_ranking.tower_ranks(pch, content, dataset, events)
    for event, rank in zip(events, got, strict=True):
        run = dataset.sequences[event.user].items
        state = pch.states(content[torch.from_numpy(run[: event.position])][None])[0, -1]
        score = (pch.alone(content) @ state).tolist()
        target = run[event.position]
        others = [i for i in range(6) if i not in run[: event.position] and i != target]
        assert rank == 1 + sum(score[i] >= score[target] for i in others)


def test_auc_matches_a_hand_computed_value():
    # The positive with .9 beats both negatives; the one with .4 beats .1 and ties with .4.
    assert auc(np.array([0.9, 0.4, 0.1, 0.4]), np.array([1, 1, 0, 0])) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    with pytest.raises(ValueError, match="both labels"):
        auc(np.array([0.1]), np.array([1]))


def test_embeddings_given_as_arrays_are_ranked_like_those_of_the_towers():
    import torch

    dataset, pch = tiny_dataset(), small_pch()
    content = torch.randn(6, 12)
    events = [Event(0, 3), Event(1, 2), Event(2, 1)]
    with torch.inference_mode():
        item = pch.alone(content).numpy()
        user = full_ranking.user_embeddings(pch, content, dataset, events).numpy()
    ranking = full_ranking.array_ranking(user, item, dataset, events)
    assert ranking.rank.tolist() == full_ranking.tower_ranks(pch, content, dataset, events).tolist()
    # User 0 met 0, 1 and 2, so three items are left.
    assert set(ranking.top[0]) == {3, 4, 5, -1}


def test_a_wrong_number_of_user_embeddings_and_no_events_are_errors():
    dataset = tiny_dataset()
    with pytest.raises(ValueError, match="1 user embeddings for 2 events"):
        full_ranking.array_ranking(np.zeros((1, 2)), np.zeros((6, 2)), dataset, [Event(0, 3), Event(1, 3)])
    with pytest.raises(ValueError, match="no events"):
        full_ranking.array_ranking(np.zeros((0, 2)), np.zeros((6, 2)), dataset, [])


def test_ranking_in_chunks_gives_the_same_ranks(monkeypatch):
    dataset = tiny_dataset()
    events = [Event(0, 3), Event(1, 3), Event(2, 3)]
    user, item = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1).normal(size=(6, 4))
    whole = full_ranking.array_ranking(user, item, dataset, events)
    monkeypatch.setattr(full_ranking, "CHUNK", 2)
    assert full_ranking.array_ranking(user, item, dataset, events).rank.tolist() == whole.rank.tolist()
