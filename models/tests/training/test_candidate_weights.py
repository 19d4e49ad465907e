"""How many items of the catalogue each candidate stands for: by hand, and on average over many draws of a trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import small_pch, write_movielens

from learn import data
from learn.models.recommender import Learn
from learn.training import losses
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer

N_USERS, N_ITEMS, N_EVENTS = 150, 120, 8


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Every user has eight events, all of which fit in a window, on items whose popularity falls as 1 / rank."""
    folder, rng = tmp_path_factory.mktemp("log"), np.random.default_rng(5)
    share = 1.0 / np.arange(1, N_ITEMS + 1)
    share /= share.sum()
    ratings = [
        (user + 1, int(film) + 1, 4.0, when)
        for user in range(N_USERS)
        for when, film in enumerate(rng.choice(N_ITEMS, N_EVENTS, replace=False, p=share))
    ]
    movies = [(item + 1, f"Film {item}", "Drama") for item in range(N_ITEMS)]
    data.write_neutral(*data.read_movielens(write_movielens(folder / "ml", ratings, movies)), folder)
    dataset = data.read_neutral(folder)
    return dataset, data.split(dataset.sequences, data.SplitConfig(n_test=0, n_validation=0))


class Weights:
    """Sums, over the steps of a trainer, what each candidate weighs in the loss of each user of the batch."""

    def __init__(self, log, monkeypatch, **settings) -> None:
        dataset, split = log
        config = TrainConfig(users=6, steps=1, **settings)
        model = Learn(small_pch(max_history=9), torch.randn(len(dataset.item_ids), 12))
        self.trainer = Trainer(config, model, dataset, split)
        self.total = np.zeros((N_USERS, len(dataset.item_ids)))
        self.n_drawn = np.zeros(N_USERS)
        self.owned = np.array([np.isin(np.arange(len(dataset.item_ids)), s.items) for s in dataset.sequences])
        self.counts = self.owned.sum(axis=0)
        candidates = self.trainer._candidates
        monkeypatch.setattr(self.trainer, "_candidates", lambda target: self._keep(candidates(target)))
        monkeypatch.setattr(losses, "catalogue_softmax", self._add)

    def _keep(self, candidate):
        self.candidate = candidate.numpy()
        return candidate

    def _add(self, asked, candidates, scale, reduction):
        weight = np.exp(-candidates.log_inclusion.double().numpy())
        self.total[self.users[:, None], self.candidate[None]] += weight
        self.n_drawn[self.users] += 1
        return candidates.embedding.sum()

    def mean(self, n_steps=1000):
        """[U,I] the mean weight of each item in the loss of each user; an item that is not drawn weighs 0."""
        for _ in range(n_steps):
            self.users = self.trainer.draw_users()
            self.trainer.next_item(self.users)
        return self.total / self.n_drawn[:, None]


@pytest.mark.parametrize("settings", [{"n_uniform": 12}, {"candidates": "batch"}], ids=["sampled", "batch"])
def test_every_item_counts_as_one_on_average_whoever_asks(log, monkeypatch, settings):
    weights = Weights(log, monkeypatch, own_items="certain", **settings)
    mean, owned, counts = weights.mean(), weights.owned, weights.counts
    assert np.allclose(mean[owned], 1.0, rtol=0, atol=1e-6)
    for low, high in ((1, 2), (3, 9), (10, N_USERS)):
        others = ~owned & ((counts >= low) & (counts <= high))[None]
        # Users are drawn without replacement, which makes a popular item a little more likely than the formula says.
        assert mean[others].mean() == pytest.approx(1.0, abs=0.08), (low, high)


def test_masked_own_items_leave_the_weights_of_all_others_as_they_are(log, monkeypatch):
    weights = Weights(log, monkeypatch, own_items="masked", n_uniform=12)
    mean = weights.mean()
    assert not mean[weights.owned].any()
    for low, high in ((1, 2), (3, 9), (10, N_USERS)):
        others = ~weights.owned & ((weights.counts >= low) & (weights.counts <= high))[None]
        assert mean[others].mean() == pytest.approx(1.0, abs=0.08), (low, high)


@pytest.mark.parametrize(("settings", "at_least"), [({"n_uniform": 12}, 6), ({"candidates": "batch"}, 20)])
def test_as_if_drawn_like_others_a_users_own_rare_items_count_as_many(log, monkeypatch, settings, at_least):
    weights = Weights(log, monkeypatch, own_items="marginal", **settings)
    mean, only_once = weights.mean(500), weights.counts == 1
    assert mean[weights.owned & only_once[None]].mean() > at_least


@pytest.mark.parametrize("own_items", ["certain", "masked"])
def test_a_full_softmax_weighs_every_item_that_training_meets_once_or_masks_it(log, monkeypatch, own_items):
    weights = Weights(log, monkeypatch, own_items=own_items, candidates="full")
    mean, met = weights.mean(200), weights.counts > 0
    drawn = weights.n_drawn > 0
    masked = weights.owned if own_items == "masked" else np.zeros_like(weights.owned)
    assert np.array_equal(mean[drawn][:, met], 1.0 - masked[drawn][:, met])
    assert not mean[:, ~met].any()


def test_weights_by_hand_in_a_batch_of_two_users(log):
    dataset, split = log
    trainer = Trainer(
        TrainConfig(users=2, steps=1, n_uniform=3, own_items="certain"),
        Learn(small_pch(max_history=9), torch.randn(120, 12)),
        dataset,
        split,
    )
    trainer.pool = np.arange(10)
    trainer.next_frequency = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    candidate = torch.arange(5)
    # The first user's window is items 0 and 3, the second user's is 1, 2 and 0; the first event of the second is not
    # asked for, since its window was cut from the middle of a sequence.
    item = torch.tensor([[0, 3, 0], [1, 2, 0]])
    asked = torch.tensor([[True, True, False], [False, True, True]])
    got = trainer._log_inclusion(candidate, item, asked, n_targets=4).exp()

    def by_others(frequency):
        # Two targets of the other user, or three draws from a pool of ten.
        return 1 - (1 - frequency) ** 2 * 0.9**3

    first = [1.0, by_others(0.3), by_others(0.2), 1.0, by_others(0.0)]
    second = [1.0, by_others(0.3), 1.0, by_others(0.1), by_others(0.0)]
    torch.testing.assert_close(got, torch.tensor([first, second]))


def test_the_loss_weighs_candidates_by_user():
    state, embedding = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [0.2], [0.1]])
    probability = torch.tensor([[0.5, 0.25, 1.0], [0.5, 1.0, 1.0]])
    log_inclusion = probability.log()
    log_inclusion[1, 2] = math.inf  # The third item is no negative of the second user.
    asked = losses.Questions(state, torch.tensor([0, 1]), torch.tensor([0, 0]))
    got = losses.catalogue_softmax(asked, losses.Candidates(embedding, log_inclusion), scale=2.0)
    first = -math.log(math.exp(1) / (math.exp(1) + 4 * math.exp(0.4) + math.exp(0.2)))
    second = -math.log(math.exp(1) / (math.exp(1) + math.exp(0.4)))
    assert float(got) == pytest.approx((first + second) / 2, rel=1e-6)
