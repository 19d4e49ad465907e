"""A small world with a rule in it: the towers have to find the rule, popularity cannot."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import small_pch, write_movielens

from learn import cvr_train, data, evaluate, train
from learn.cvr import CvrConfig
from learn.pch import PchConfig

N_ITEMS, N_GROUPS = 60, 6
SIZES = PchConfig(content_dim=12, adaptor_hidden=24, width=24, layers=2, heads=2, ffn=32, out_dim=12, max_history=10)


@pytest.fixture
def world(tmp_path):
    """Users stay in one of six groups of ten films; the films' embeddings say which group, noisily."""
    rng = np.random.default_rng(3)
    movies = [(i + 1, f"Film {i}", f"Group {i % N_GROUPS}") for i in range(N_ITEMS)]
    ratings = []
    for user in range(60):
        films = rng.permutation(np.arange(user % N_GROUPS, N_ITEMS, N_GROUPS))[:9]
        # Three of the groups are liked: that is the CVR head's rule.
        ratings += [(user + 1, int(f) + 1, 5.0 if f % N_GROUPS < 3 else 2.0, when) for when, f in enumerate(films)]
    data.write_neutral(*data.read_movielens(write_movielens(tmp_path / "ml", ratings, movies)), tmp_path)
    dataset = data.read_neutral(tmp_path)
    group = torch.nn.functional.one_hot(torch.arange(N_ITEMS) % N_GROUPS, 12).float()
    noise = torch.from_numpy(rng.normal(size=(N_ITEMS, 12)).astype(np.float32))
    content = group + 0.1 * noise
    return torch.nn.functional.normalize(content, dim=-1), dataset


def fit(world, tmp_path, **changes):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    sizes = {"steps": 120, "users": 16, "warmup": 10, "learning_rate": 3e-3, "n_uniform": 16, "check_every": 2}
    config = train.TrainConfig(**(sizes | changes))
    pch = train.train(config, SIZES, content, dataset, split, tmp_path / "log.jsonl")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    return pch, split, records


@pytest.mark.parametrize("weights", [{"next_weight": 1.0}, {"next_weight": 0.0, "align_weight": 1.0}])
def test_towers_find_a_planted_rule_that_popularity_cannot(world, tmp_path, weights):
    content, dataset = world
    pch, split, records = fit(world, tmp_path, **weights)
    name = "next" if weights["next_weight"] else "align"
    assert records[-1][name] < records[0][name] - 0.2
    assert [record["step"] for record in records] == list(range(2, 121, 2))
    # Every user has met eight of the ten films of a group, so the two that are left should lead.
    found = (evaluate.tower_ranks(pch, content, dataset, split.test) <= 2).mean()
    popular = (evaluate.popularity_ranks(dataset, split, split.test) <= 2).mean()
    assert found > 0.8 > 2 * popular


def test_a_run_repeats_itself(world, tmp_path):
    first = fit(world, tmp_path, steps=5)[0].state_dict()
    again = fit(world, tmp_path, steps=5)[0].state_dict()
    other = fit(world, tmp_path, steps=5, seed=2)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projection.weight"], other["projection.weight"])


def test_training_never_reads_a_held_out_event(world, tmp_path):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    trainer = train.Trainer(train.TrainConfig(), small_pch(), content, dataset, split)
    for sequence, run in zip(dataset.sequences, trainer.sequences, strict=True):
        assert run.tolist() == sequence.items[:-2].tolist()
    assert trainer.frequency.sum() == pytest.approx(1.0)


def test_the_head_finds_what_is_liked(world, tmp_path):
    content, dataset = world
    pch, split, _ = fit(world, tmp_path, steps=30)
    config = cvr_train.CvrTrainConfig(epochs=15, batch=64, learning_rate=5e-3)
    sizes = CvrConfig(in_dim=12, fuse_dim=16, mid_dim=8)
    _head, figures = cvr_train.train_head(config, sizes, pch, content, dataset, split)
    assert figures["cvr_auc"] > 0.9
    assert 0.2 < figures["cvr_base_rate"] < 0.8


@pytest.mark.parametrize("n_events", [1, 2, 4, 5, 9, 10, 14, 15, 16, 31])
def test_head_examples_cover_each_training_event_once_with_the_state_before_it(n_events):
    pch = small_pch(max_history=10)
    content = torch.randn(40, 12)
    rng = np.random.default_rng(0)
    run = rng.permutation(40)[:n_events]
    values = np.where(np.arange(n_events) % 3 == 0, 5.0, 3.0)
    dataset = data.Dataset([""] * 40, [], [data.Sequence("u", run, values)])
    found = cvr_train.training_examples(pch, content, dataset, data.Split([n_events], [], []))
    assert found.item.tolist() == run.tolist()
    assert found.label.tolist() == (values >= 4).tolist()
    for position in range(n_events):
        # A window holds at most ten events, and moves by five.
        begin = 0 if position < 10 else (position - 5) // 5 * 5
        want = pch.states(content[torch.from_numpy(run[begin:position])][None])[0, -1]
        torch.testing.assert_close(found.user[position], want.detach(), rtol=0, atol=1e-5)


def test_schedule_rises_then_falls_to_nothing():
    values = [train.schedule(step, 10, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 0.01
