"""Losses against values computed term by term in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from learn.training import losses


def test_inclusion_probability_matches_hand_computed_values():
    frequency = torch.tensor([0.5, 0.25, 0.25, 0.0])
    got = losses.inclusion_log_probability(frequency, torch.tensor([2]), n_uniform=1, n_pool=len(frequency)).exp()[0]
    # 1 - (1 - f)^2 * (1 - 1/4)
    want = torch.tensor([1 - 0.25 * 0.75, 1 - 0.5625 * 0.75, 1 - 0.5625 * 0.75, 1 - 0.75])
    torch.testing.assert_close(got, want)


def test_inclusion_probability_matches_a_simulation():
    frequency = torch.tensor([0.6, 0.3, 0.1, 0.0, 0.0])
    generator = torch.Generator().manual_seed(1)
    hits = torch.zeros(5)
    for _ in range(4000):
        drawn = torch.multinomial(frequency, 3, replacement=True, generator=generator)
        uniform = torch.randint(5, (2,), generator=generator)
        hits[torch.unique(torch.cat([drawn, uniform]))] += 1
    got = losses.inclusion_log_probability(frequency, torch.tensor([3]), 2, len(frequency)).exp()[0]
    torch.testing.assert_close(got, hits / 4000, rtol=0, atol=0.03)


def test_catalogue_softmax_matches_a_hand_computed_value():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidate = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, -1.0]])
    probability = [0.5, 0.25, 1.0]
    asked = losses.Questions(query, torch.tensor([0, 0]), torch.tensor([0, 1]))
    got = losses.catalogue_softmax(asked, losses.Candidates(candidate, torch.tensor([probability]).log()), scale=2.0)
    # Logits of row 0: 2*1 for the target; 2*.5 with weight 1/.25 and 0 with weight 1 for the others. Logits of row 1:
    # 2*.5 for the target; 0 with weight 1/.5 and -2 with weight 1 for the others.
    first = -math.log(math.exp(2) / (math.exp(2) + 4 * math.exp(1) + 1))
    second = -math.log(math.exp(1) / (math.exp(1) + 2 * math.exp(0) + math.exp(-2)))
    assert float(got) == pytest.approx((first + second) / 2, rel=1e-6)


def test_catalogue_softmax_with_every_item_is_the_full_softmax():
    query, candidate, target = torch.randn(4, 3), torch.randn(9, 3), torch.tensor([0, 3, 8, 3])
    asked = losses.Questions(query, torch.tensor([0, 0, 1, 1]), target)
    got = losses.catalogue_softmax(asked, losses.Candidates(candidate, torch.zeros(2, 9)), scale=1.0)
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(query @ candidate.T, target))


def alignment_in_plain_python(query, key, item, log_frequency, present, scale):
    terms = []
    for user, states in enumerate(query.tolist()):
        own = {i for i, real in zip(item[user].tolist(), present[user].tolist(), strict=True) if real}
        for state in states:

            def logit(c, t, state=state):
                dot = sum(a * b for a, b in zip(state, key[c, t].tolist(), strict=True))
                return scale * dot - float(log_frequency[c, t])

            negatives = [
                math.exp(logit(c, t))
                for c in range(len(key))
                for t in range(key.shape[1])
                if c != user and present[c, t] and int(item[c, t]) not in own
            ]
            for t in range(key.shape[1]):
                if present[user, t]:
                    positive = math.exp(logit(user, t))
                    terms.append(-math.log(positive / (positive + sum(negatives))))
    return sum(terms) / len(terms)


def test_alignment_matches_plain_python_with_padding_and_a_shared_item():
    query, key = torch.randn(3, 2, 4), torch.randn(3, 3, 4)
    item = torch.tensor([[1, 2, 0], [2, 3, 4], [5, 0, 0]])  # users 0 and 1 share item 2
    present = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    log_frequency = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.1, 0.05]).log()[item]
    targets = losses.Targets(key, item, log_frequency, present)
    got = losses.alignment(query, targets, scale=1.5)
    # Each of several processes takes a range of the users, and their losses add up to the whole.
    parts = [losses.alignment(query[own], targets, 1.5, own) for own in (slice(0, 1), slice(1, 3))]
    assert float(sum(parts)) == pytest.approx(float(got), rel=1e-6)
    assert float(got) == pytest.approx(
        alignment_in_plain_python(query, key, item, log_frequency, present, 1.5), rel=1e-5
    )


def test_alignment_is_finite_if_a_batch_has_no_negatives():
    query, key = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4)
    item, present = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    loss = losses.alignment(query, losses.Targets(key, item, torch.zeros(1, 2), present), scale=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(query.grad).all()
