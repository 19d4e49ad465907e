"""Ranks and metrics against hand-computed values and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import small_pch

from learn.data import (
    Dataset,
    Event,
    Interaction,
    Sequence,
    Split,
    SplitConfig,
    prepare,
    read_prepared,
    split,
    write_neutral,
)
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


def test_ranks_by_weight_are_those_of_the_joined_embeddings(monkeypatch):
    rng = np.random.default_rng(4)
    sequences = [Sequence(str(u), rng.integers(0, 40, 9), np.ones(9)) for u in range(12)]
    dataset, events = (
        Dataset([str(i) for i in range(40)], [], sequences),
        [Event(u, p) for u in range(12) for p in (5, 8)],
    )
    # Small whole numbers, so that sums are exact and items tie.
    user, item = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (24, 40))
    monkeypatch.setattr(full_ranking, "CHUNK", 7)
    weights = (0.0, 0.5, 2.0)
    parts = [(user[:, part], item[:, part]) for part in (slice(4), slice(4, None))]
    got = full_ranking.ranks_by_weight(*parts, weights, dataset, events)
    for weight, ranks in zip(weights, got, strict=True):
        joined = np.concatenate([user[:, :4], weight * user[:, 4:]], axis=1)
        np.testing.assert_array_equal(ranks, full_ranking.array_ranking(joined, item, dataset, events).rank)
    item[3, 5] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        full_ranking.ranks_by_weight(*parts, weights, dataset, events)
    with pytest.raises(ValueError, match="no events"):
        full_ranking.ranks_by_weight(*parts, weights, dataset, [])


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


def drawn_world(n_items=50, seed=1):
    rng = np.random.default_rng(seed)
    runs = [rng.integers(0, n_items, int(n)) for n in rng.integers(3, 20, 12)]
    sequences = [Sequence(str(user), run, np.ones(len(run))) for user, run in enumerate(runs)]
    dataset = Dataset([str(i) for i in range(n_items)], [ItemText(title=str(i)) for i in range(n_items)], sequences)
    return dataset, [Event(user, position) for user, run in enumerate(runs) for position in range(1, len(run))]


def test_ranks_do_not_depend_on_how_many_scores_fit_in_memory(monkeypatch):
    dataset, events = drawn_world()
    scores = np.random.default_rng(2).normal(size=(len(events), 50)).astype(np.float32)
    want = full_ranking.full_ranking(dataset, events, lambda rows: scores[rows])
    asked = []

    def score(rows):
        asked.append(len(scores[rows]))
        return scores[rows]

    monkeypatch.setattr(full_ranking, "SCORE_BYTES", 3 * 50 * full_ranking.BYTES_PER_SCORE)
    found = full_ranking.full_ranking(dataset, events, score)
    assert max(asked) == 3 and sum(asked) == len(events)
    assert found.rank.tolist() == want.rank.tolist()
    assert [set(row) for row in found.top.tolist()] == [set(row) for row in want.top.tolist()]
    # A catalogue whose scores for one event exceed the limit is still ranked, one event at a time.
    asked.clear()
    monkeypatch.setattr(full_ranking, "SCORE_BYTES", 1)
    assert full_ranking.full_ranking(dataset, events, score).rank.tolist() == want.rank.tolist() and max(asked) == 1


def test_tower_ranks_read_a_memory_mapped_table_in_fp16_piece_by_piece(tmp_path, monkeypatch):
    dataset, events = drawn_world()
    content, pch = torch.randn(50, 12).half(), small_pch()
    np.save(tmp_path / "content.npy", content.numpy())
    stored = torch.from_numpy(np.load(tmp_path / "content.npy", mmap_mode="c"))
    want = full_ranking.tower_ranks(pch, content.float(), dataset, events)
    monkeypatch.setattr(full_ranking, "ITEM_CHUNK", 7)
    monkeypatch.setattr(full_ranking, "CHUNK", 16)
    assert full_ranking.tower_ranks(pch, stored, dataset, events).tolist() == want.tolist()
    figures = full_ranking.sequence_against_alone(pch, stored, dataset, events)
    assert figures == full_ranking.sequence_against_alone(pch, content.float(), dataset, events)


def test_the_pool_is_a_fixed_sample_of_users_if_there_are_too_many_targets(monkeypatch):
    dataset, events = drawn_world()
    content, pch = torch.randn(50, 12), small_pch()
    whole = full_ranking.sequence_against_alone(pch, content, dataset, events)
    monkeypatch.setattr(full_ranking, "POOL_CHUNK", 8)
    assert full_ranking.sequence_against_alone(pch, content, dataset, events) == whole
    by_user = {user: list(range(1, 5)) for user in range(12)}
    monkeypatch.setattr(full_ranking, "POOL", 21)
    chosen = full_ranking._users_of_pool(by_user)
    assert len(chosen) == 5 and chosen == sorted(chosen) == full_ranking._users_of_pool(by_user)
    monkeypatch.setattr(full_ranking, "POOL", 3)
    assert len(full_ranking._users_of_pool(by_user)) == 1
    assert full_ranking.sequence_against_alone(pch, content, dataset, events).keys() == whole.keys()


def test_popularity_of_a_prepared_folder_equals_a_count_user_by_user(tmp_path, monkeypatch):
    dataset, _events = drawn_world()
    interactions = [
        Interaction(sequence.user, str(item), position)
        for sequence in dataset.sequences
        for position, item in enumerate(sequence.items)
    ]
    write_neutral(interactions, zip(dataset.item_ids, dataset.texts, strict=True), tmp_path / "raw")
    prepare(tmp_path / "raw", tmp_path / "data")
    prepared = read_prepared(tmp_path / "data")
    found = split(prepared.sequences, SplitConfig(n_test=3, n_validation=2))
    assert 0 in [len(s.items) - n for s, n in zip(prepared.sequences, found.n_train, strict=True)]
    in_memory = Dataset(prepared.item_ids, prepared.texts, prepared.sequences[:])
    want = full_ranking.popularity(in_memory, found)
    monkeypatch.setattr(full_ranking, "COUNT_CHUNK", 7)
    assert full_ranking.popularity(prepared, found).tolist() == want.tolist()
