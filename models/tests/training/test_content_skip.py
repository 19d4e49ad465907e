"""The content skip: what it computes, which weight is taken, and that served towers rank as training measured them."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_pch, write_movielens

from learn import data
from learn.content import standardise
from learn.evaluation.full_ranking import tower_ranks
from learn.evaluation.retrieval import retrieve
from learn.models import content_skip as skip_model
from learn.models.cvr import CvrConfig, CvrHead
from learn.models.recommender import Learn
from learn.training import content_skip, cvr_tuning, train_cvr_head
from learn.training.content_skip import Tried
from learn.training.cvr_config import CvrTrainConfig
from learn.training.train_config import TrainConfig


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(1)
    movies = [(i + 1, f"Film {i}", "Drama") for i in range(40)]
    ratings = [
        (user + 1, int(film) + 1, 4.0, when) for user in range(20) for when, film in enumerate(rng.permutation(40)[:12])
    ]
    data.write_neutral(*data.read_movielens(write_movielens(tmp_path / "ml", ratings, movies)), tmp_path)
    dataset = data.read_neutral(tmp_path)
    return dataset, data.split(dataset.sequences, data.SplitConfig(n_test=2, n_validation=2))


def test_fitted_directions_are_whitened_components_of_length_one():
    torch.manual_seed(3)
    # Three strong components and nine weak ones.
    content = torch.randn(5000, 12) * torch.tensor([9.0] * 3 + [1.0] * 9) + 50.0
    skip = skip_model.fit(content, 12)
    rows = torch.nn.functional.normalize(content - content.mean(dim=0), dim=-1)
    covariance = torch.cov((rows @ skip.linear.weight.T).T)
    torch.testing.assert_close(covariance, torch.eye(12), rtol=0, atol=0.01)
    torch.testing.assert_close(skip(content).norm(dim=-1), torch.ones(5000))
    # Fewer components: those of the largest variance.
    few = skip_model.fit(content, 3).linear.weight
    assert few[:, :3].norm() > 20 * few[:, 3:].norm()


def test_a_dimension_that_content_does_not_have_is_refused():
    with pytest.raises(ValueError, match="skip_dim is 13, but content embeddings have 12 numbers"):
        skip_model.fit(torch.randn(50, 12), 13)


def test_a_score_is_the_towers_plus_the_weighted_cosine_with_the_mean_of_the_history(log):
    content = torch.randn(40, 12)
    model = Learn(small_pch(), content, "scale").eval()
    items = torch.tensor([[3, 7, 30]])
    towers = model.states(items, items)[0, 3] @ model.item_embeddings(torch.arange(40)).T
    skip = skip_model.fit(content, 5)
    direction = skip(content)
    skip.weight.fill_(0.3)
    model.attach(skip)
    mean = torch.nn.functional.normalize(direction[[3, 7, 30]].mean(dim=0), dim=0)
    got = model.last(items, items, torch.tensor([3]))[0] @ model.item_embeddings(torch.arange(40)).T
    torch.testing.assert_close(got, towers + 0.3 * direction @ mean, rtol=0, atol=1e-5)
    # Before the first event there is nothing to compare content with.
    start = model.states(items, items)[0, 0] @ model.item_embeddings(torch.arange(40)).T
    assert torch.equal(model.states(items, items)[0, 0, -5:], torch.zeros(5)) and start.isfinite().all()


def test_the_rule_takes_the_best_weight_for_rare_items_that_costs_nothing_over_all():
    tried = [Tried(0.0, 0.40, 0.10), Tried(0.1, 0.42, 0.15), Tried(0.2, 0.397, 0.17), Tried(0.35, 0.39, 0.30)]
    assert content_skip.chosen(tried).weight == 0.2
    # If every weight costs something, none is taken.
    assert content_skip.chosen([tried[0], tried[3]]).weight == 0.0
    # Without events of rare items, those over all decide.
    assert content_skip.chosen([Tried(one.weight, one.all, None) for one in tried]).weight == 0.1
    assert "0.20" in next(line for line in content_skip.table(tried).splitlines() if "taken" in line)


def test_attaching_measures_every_weight_as_the_model_is_served_with_it(log):
    dataset, split = log
    content = torch.randn(40, 12)
    model = Learn(small_pch(), content, "scale").eval()
    tried = content_skip.attach(model, content, 6, dataset, split)
    assert [one.weight for one in tried] == list(content_skip.WEIGHTS)
    for one in tried:
        model.pch.skip.weight.fill_(one.weight)
        rank = retrieve(model, dataset, split.validation).rank
        assert content_skip.event_values(rank, "ndcg_at_10").mean() == pytest.approx(one.all, abs=1e-9)
    # Finished towers read raw content and rank the same.
    model.pch.skip.weight.fill_(0.35)
    want = retrieve(model, dataset, split.test).rank
    model.finish()
    assert np.array_equal(tower_ranks(model.pch, content, dataset, split.test), want)


def test_without_validation_events_nothing_chooses_the_weight(log):
    dataset, _split = log
    split = data.split(dataset.sequences, data.SplitConfig(n_test=2, n_validation=0))
    with pytest.raises(ValueError, match="no events are held out for validation"):
        content_skip.attach(Learn(small_pch(), torch.randn(40, 12)), torch.randn(40, 12), 4, dataset, split)
    content_skip.check(0, 12, split)


def test_what_cannot_be_attached_is_refused_before_training(log):
    with pytest.raises(ValueError, match="skip_dim is 13, but content embeddings have 12 numbers"):
        content_skip.check(13, 12, log[1])
    with pytest.raises(ValueError, match="skip_dim is -1"):
        small_pch(skip_dim=-1)


def test_a_skip_joins_towers_on_another_device():
    # "meta" stands for a GPU: an operation on tensors of this device and of the CPU fails.
    model = Learn(small_pch(), torch.randn(40, 12), "whiten").to("meta")
    model.attach(skip_model.fit(torch.randn(40, 12), 4))
    assert {value.device.type for value in (*model.pch.parameters(), *model.pch.buffers())} == {"meta"}


def test_of_many_validation_events_a_sample_is_ranked(log, monkeypatch):
    dataset, split = log
    n_ranked, ranking = [], content_skip.ranks_by_weight

    def counted(*inputs):
        n_ranked.append(len(inputs[-1]))
        return ranking(*inputs)

    monkeypatch.setattr(content_skip, "MOST_EVENTS", 7)
    monkeypatch.setattr(content_skip, "ranks_by_weight", counted)
    content_skip.attach(Learn(small_pch(), torch.randn(40, 12)), torch.randn(40, 12), 4, dataset, split)
    assert n_ranked == [7] and len(split.validation) > 7


@pytest.mark.parametrize("layers", ["all", "last"])
def test_tuning_with_the_head_changes_the_towers_and_not_their_skip(log, layers):
    dataset, split = log
    content = torch.randn(40, 12).half()
    pch = small_pch()
    pch.attach(skip_model.fit(content, 5))
    pch.skip.weight.fill_(0.3)
    before, directions = copy.deepcopy(pch.state_dict()), pch.skip(content.float())
    values = [np.arange(len(sequence.items)) % 2 * 4.0 + 1.0 for sequence in dataset.sequences]
    sequences = [replace(s, values=v) for s, v in zip(dataset.sequences, values, strict=True)]
    dataset = data.Dataset(dataset.item_ids, dataset.texts, sequences)
    tuning = CvrTrainConfig(tune_towers=True, tune_layers=layers, tune_epochs=1, tune_next_weight=0.3)
    cvr_data = train_cvr_head.CvrData(content, dataset, split)
    found = train_cvr_head.training_windows(pch.config.max_history, cvr_data, tuning)
    figures = iter((0.5, 0.6))

    def validate():
        assert train_cvr_head.item_vectors(pch, content).shape == (40, 6 + 5)
        return next(figures)

    tune_data = cvr_tuning.TuneData(found, content, dataset, split)
    head = CvrHead(CvrConfig(in_dim=6 + 5))
    assert cvr_tuning.tune(tuning, TrainConfig(users=4, n_uniform=4), head, pch, tune_data, validate) == 1
    after = pch.state_dict()
    assert not torch.equal(after["projection.weight"], before["projection.weight"])
    assert torch.equal(after["skip.weight"], before["skip.weight"])
    torch.testing.assert_close(pch.skip(content.float()), directions, rtol=0, atol=1e-5)


def test_a_table_that_is_too_large_for_memory_gets_the_same_skip(monkeypatch):
    content = torch.randn(300, 12)
    whole = skip_model.fit(content, 4)
    monkeypatch.setattr(standardise, "IN_MEMORY_BYTES", 100)
    piecewise = skip_model.fit(content.half(), 4)
    # A component may point either way.
    cosine = torch.nn.functional.cosine_similarity(whole.linear.weight, piecewise.linear.weight, dim=1)
    assert (cosine.abs() > 0.999).all()
