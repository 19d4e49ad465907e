"""EASE's factors beside a trained model: what they approximate, how their weight is chosen, and what a run records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learn import data
from learn.evaluation import retrieval
from learn.training.content_skip import Tried
from research.baselines import ease_skip
from research.baselines.item_to_item import ease_weights, gram_matrix
from research.baselines.sasrec import SasRec, SasRecConfig

N_ITEMS = 30


@pytest.fixture
def pairs():
    """Items 2k and 2k + 1 follow each other in every sequence, in an order of pairs without a rule."""
    rng = np.random.default_rng(2)
    sequences = []
    for user in range(80):
        items = np.stack([2 * (first := rng.permutation(N_ITEMS // 2)[:4]), 2 * first + 1], axis=1).ravel()
        sequences.append(data.Sequence(str(user), items, np.ones(8, np.float32)))
    dataset = data.Dataset([str(item) for item in range(N_ITEMS)], [], sequences)
    return dataset, data.split(sequences, data.SplitConfig(n_test=1, n_validation=2))


def untrained():
    torch.manual_seed(0)
    return SasRec(SasRecConfig(width=8, max_history=10), N_ITEMS).eval()


def test_all_factors_together_are_the_weights_and_fewer_are_the_nearest_of_their_rank(pairs):
    weight = ease_weights(gram_matrix(*pairs), 10.0)
    first, second = ease_skip.factors(weight, N_ITEMS)
    torch.testing.assert_close(first @ second.T, weight, rtol=1e-4, atol=1e-5)
    left, values, right = torch.linalg.svd(weight)
    first, second = ease_skip.factors(weight, 4)
    assert first.shape == second.shape == (N_ITEMS, 4)
    torch.testing.assert_close(first @ second.T, left[:, :4] * values[:4] @ right[:4], rtol=1e-3, atol=1e-4)


def test_a_score_is_that_of_the_model_and_the_weighted_cosine_of_the_factors():
    first, second = torch.randn(N_ITEMS, 3), torch.randn(N_ITEMS, 3)
    model = ease_skip.EaseSkip(untrained(), first, second)
    model.weight = 0.3
    items, times, length = torch.tensor([[4, 9, 4], [7, 0, 0]]), torch.zeros(2, 4), torch.tensor([3, 1])
    candidates = torch.arange(N_ITEMS)
    with torch.no_grad():
        score = model.last(items, times, length) @ model.item_embeddings(candidates).T
        inner = model.inner.last(items, times, length) @ model.inner.item_embeddings(candidates).T
        states = model.states(items, times)
    read = torch.stack([first[4] + first[9] + first[4], first[7]])
    cosine = torch.nn.functional.cosine_similarity(read[:, None], second[None], dim=-1)
    torch.testing.assert_close(score, inner + 0.3 * cosine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[0, 3], model.last(items, times, length)[0], rtol=1e-4, atol=1e-5)
    # A user without history has no direction of EASE.
    assert (states[:, 0, -3:] == 0).all()


def test_the_weight_is_the_best_one_on_all_validation_events(pairs):
    dataset, split = pairs
    attached = ease_skip.attach(untrained(), N_ITEMS, dataset, split)
    figures = {one.weight: one.all for one in attached.tried}
    assert tuple(figures) == ease_skip.WEIGHTS
    assert attached.model.weight == attached.taken.weight > 0
    assert attached.taken.all == max(figures.values())
    ranked = retrieval.retrieve(attached.model, dataset, split.validation).rank
    assert (1 / np.log2(ranked[ranked <= 10] + 1)).sum() / len(ranked) == pytest.approx(attached.taken.all, rel=1e-5)
    # The second item of a pair is found by its first one; the model alone was never trained.
    seconds = [event for event in split.test if event.position % 2]
    alone, together = (retrieval.retrieve(model, dataset, seconds).rank for model in (untrained(), attached.model))
    assert (1 / together).mean() > 1.5 * (1 / alone).mean()


def test_of_equally_good_weights_the_smallest_is_taken():
    tried = [Tried(0.0, 0.5, None), Tried(0.1, 0.7, 0.2), Tried(0.2, 0.7, 0.9), Tried(0.5, 0.6, 1.0)]
    assert ease_skip.best_of(tried).weight == 0.1


def test_the_same_factors_come_out_again_and_random_numbers_go_on_as_before(pairs):
    weight = ease_weights(gram_matrix(*pairs), 10.0)
    torch.manual_seed(5)
    once = ease_skip.factors(weight, 4)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after
    torch.testing.assert_close(ease_skip.factors(weight, 4), once, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [0, -1, N_ITEMS + 1])
def test_a_size_that_the_matrix_does_not_have_is_refused(pairs, dim):
    with pytest.raises(ValueError, match=f"ease_dim is {dim}, .* {N_ITEMS}"):
        ease_skip.attach(untrained(), dim, *pairs)


def test_without_validation_nothing_can_choose_the_weight(pairs):
    dataset, split = pairs
    with pytest.raises(ValueError, match="ease_dim needs validation events"):
        ease_skip.attach(untrained(), 4, dataset, replace(split, validation=[]))
