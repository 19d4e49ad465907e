"""Training on a small synthetic data set with a rule that every model must find and popularity cannot."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import small_pch, write_movielens

from learn import data
from learn.evaluation import full_ranking, retrieval
from learn.models.cvr import CvrConfig
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import IdTowers, Learn
from learn.training import train_cvr_head, train_recommender
from learn.training.cvr_config import CvrTrainConfig
from learn.training.train_config import TrainConfig
from learn.training.train_cvr_head import CvrData
from learn.training.trainer import Trainer, schedule
from research.baselines.hstu import Hstu, HstuConfig
from research.baselines.sasrec import SasRec, SasRecConfig

N_ITEMS, N_GROUPS = 60, 6
SIZES = PchConfig(content_dim=12, adaptor_hidden=24, width=24, layers=2, heads=2, ffn=32, out_dim=12, max_history=10)


@pytest.fixture
def world(tmp_path):
    """Each user rates films of one of six groups of ten; the embedding of a film tells its group, with noise."""
    rng = np.random.default_rng(3)
    movies = [(i + 1, f"Film {i}", f"Group {i % N_GROUPS}") for i in range(N_ITEMS)]
    ratings = []
    for user in range(60):
        films = rng.permutation(np.arange(user % N_GROUPS, N_ITEMS, N_GROUPS))[:9]
        # Films of three of the groups are liked, which is the rule that the CVR head must find.
        ratings += [(user + 1, int(f) + 1, 5.0 if f % N_GROUPS < 3 else 2.0, when) for when, f in enumerate(films)]
    data.write_neutral(*data.read_movielens(write_movielens(tmp_path / "ml", ratings, movies)), tmp_path)
    dataset = data.read_neutral(tmp_path)
    group = torch.nn.functional.one_hot(torch.arange(N_ITEMS) % N_GROUPS, 12).float()
    noise = torch.from_numpy(rng.normal(size=(N_ITEMS, 12)).astype(np.float32))
    content = group + 0.1 * noise
    return torch.nn.functional.normalize(content, dim=-1), dataset


def fit(world, tmp_path, kind="learn", **changes):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    sizes = {"steps": 120, "users": 16, "warmup": 10, "learning_rate": 3e-3, "n_uniform": 16, "check_every": 20}
    config = TrainConfig(**(sizes | changes))
    torch.manual_seed(config.seed)
    model = MODELS[kind](content)
    return model, split, train_recommender.train(config, model, dataset, split, tmp_path / "run")


MODELS = {
    "learn": lambda content: Learn(Pch(SIZES), content),
    "learn-adapted": lambda content: Learn(Pch(replace(SIZES, item_tower="adapted", out_dim=24)), content),
    "learn-id": lambda content: Learn(Pch(SIZES), content, ids="separate"),
    "id-towers": lambda content: IdTowers(Pch(replace(SIZES, out_dim=24)), N_ITEMS),
    "sasrec": lambda content: SasRec(SasRecConfig(width=24, max_history=10), N_ITEMS),
    "hstu": lambda content: Hstu(HstuConfig(width=24, heads=2, max_history=10), N_ITEMS),
    "hstu-time": lambda content: Hstu(HstuConfig(width=24, max_history=10, time_bias=True), N_ITEMS),
}


def hit_rate(model, dataset, split):
    """Returns the share of test events whose target is in the top two.

    Every user has met eight of the ten films of a group, so the two others should come first.
    """
    return (retrieval.retrieve(model, dataset, split.test).rank <= 2).mean()


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_finds_a_planted_rule_that_popularity_cannot(world, tmp_path, kind):
    model, split, curve = fit(world, tmp_path, kind, check_every=2)
    assert curve[-1]["loss_next"] < curve[0]["loss_next"] - 0.2
    assert [record["step"] for record in curve] == list(range(2, 121, 2))
    popular = (full_ranking.popularity_ranks(world[1], split, split.test) <= 2).mean()
    assert hit_rate(model, world[1], split) > 0.8 > 2 * popular


@pytest.mark.parametrize("item_tower", ["sequence", "alone"])
def test_alignment_finds_the_rule_too(world, tmp_path, item_tower):
    MODELS["variant"] = lambda content: Learn(Pch(replace(SIZES, item_tower=item_tower)), content)
    model, split, curve = fit(world, tmp_path, "variant", next_weight=0.0, align_weight=1.0)
    # The loss of one batch is noisy: the state of a user without history can only guess the group.
    assert min(record["loss_align"] for record in curve) < curve[0]["loss_align"] - 0.1
    assert hit_rate(model, world[1], split) > 0.8


@pytest.mark.parametrize("candidates", ["full", "batch"])
def test_training_with_each_set_of_candidates_finds_the_rule(world, tmp_path, candidates):
    model, split, _ = fit(world, tmp_path, candidates=candidates)
    assert hit_rate(model, world[1], split) > 0.8


def test_bf16_training_keeps_fp32_weights_and_gives_similar_losses(world, tmp_path):
    changes = {"steps": 30, "check_every": 30, "align_weight": 0.5}
    model, split, curve = fit(world, tmp_path / "half", precision="bf16", **changes)
    _, _, exact = fit(world, tmp_path / "whole", **changes)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for loss in ("loss_next", "loss_align"):
        assert curve[-1][loss] == pytest.approx(exact[-1][loss], rel=0.1) and curve[-1][loss] != exact[-1][loss]
    assert hit_rate(model, world[1], split) > 0.2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_towers_reach_the_same_loss(world, tmp_path, monkeypatch):
    # There is no dropout, because compiled dropout draws other random numbers.
    MODELS["no-dropout"] = lambda content: Learn(Pch(replace(SIZES, dropout=0.0)), content)
    changes = {"steps": 4, "check_every": 4}
    compile_calls, original_compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile_calls.append(args) or original_compile(*args, **kwargs)
    )
    _, _, compiled = fit(world, tmp_path / "compiled", "no-dropout", compile=True, **changes)
    assert len(compile_calls) == 2  # The states alone, for the alignment, and together with the items.
    _, _, plain = fit(world, tmp_path / "plain", "no-dropout", **changes)
    assert compiled[-1]["loss_next"] == pytest.approx(plain[-1]["loss_next"], rel=1e-4)


@pytest.mark.parametrize("loss", ["next", "align"])
def test_item_frequencies_affect_the_loss_only_with_the_logq_correction(world, loss):
    """With the logQ correction off, skewed item frequencies must leave the loss unchanged."""
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    weights = {"next_weight": float(loss == "next"), "align_weight": float(loss == "align")}
    found = []
    for log_q in (True, False):
        for spread in (1.0, 50.0):
            config = TrainConfig(steps=9, warmup=1, users=16, n_uniform=8, candidates="batch", log_q=log_q, **weights)
            torch.manual_seed(0)
            trainer = Trainer(config, Learn(Pch(replace(SIZES, dropout=0.0)), content), dataset, split)
            # Makes some films far more frequent than others, if `spread` is large.
            factor = torch.linspace(1.0, spread, N_ITEMS)
            trainer.next_frequency, trainer.align_frequency = (
                frequency * factor / (frequency * factor).sum()
                for frequency in (trainer.next_frequency, trainer.align_frequency)
            )
            found.append(trainer.step(0)[loss])
    with_even, with_skewed, without_even, without_skewed = found
    assert with_even != pytest.approx(with_skewed, rel=1e-4)
    assert without_even == without_skewed


@pytest.mark.parametrize("candidates", ["full", "sampled"])
@pytest.mark.parametrize("unseen", [False, True])
def test_an_item_without_training_events_is_a_candidate_only_on_request(world, candidates, unseen):
    content, dataset = world
    # The training part of every user ends before the first user's last two films, so that no training event has them.
    split = data.split(dataset.sequences, data.SplitConfig())
    held_out_items = set(dataset.sequences[0].items[-2:].tolist())
    for user, sequence in enumerate(dataset.sequences):
        split.n_train[user] = next(
            (at for at, item in enumerate(sequence.items) if item in held_out_items), split.n_train[user]
        )
    config = TrainConfig(candidates=candidates, unseen_negatives=unseen, n_uniform=2000)
    trainer = Trainer(config, MODELS["learn"](content), dataset, split)
    met = np.unique(np.concatenate([s.items[:n] for s, n in zip(dataset.sequences, split.n_train, strict=True)]))
    assert len(met) == N_ITEMS - 2
    candidate = trainer._candidates(torch.from_numpy(met[:5]))
    assert candidate.tolist() == (list(range(N_ITEMS)) if unseen else met.tolist())


def test_an_item_is_a_target_as_often_as_the_logq_correction_assumes(world):
    content, dataset = world
    config = TrainConfig(users=4, candidates="batch", align_weight=1.0)
    trainer = Trainer(config, MODELS["learn"](content), dataset, data.split(dataset.sequences, data.SplitConfig()))
    next_targets, packs = [], []
    trainer._candidates = lambda target: (next_targets.append(target), Trainer._candidates(trainer, target))[1]
    trainer._pack = lambda positions, users: (
        packs.append((positions, users)),
        Trainer._pack(trainer, positions, users),
    )[1]
    for _ in range(300):
        users = trainer.rng.choice(trainer.users, size=4, replace=False, p=trainer.user_probability)
        trainer.next_item(users)
        trainer.align(users)
    # Each step packs three times; the last pack holds the targets of the alignment.
    align_targets = [
        dataset.sequences[u].items[p] for positions, users in packs[2::3] for p, u in zip(positions, users, strict=True)
    ]
    for drawn, assumed in (
        (torch.cat(next_targets).numpy(), trainer.next_frequency),
        (np.concatenate(align_targets), trainer.align_frequency),
    ):
        share = np.bincount(drawn, minlength=N_ITEMS) / len(drawn)
        error = np.sqrt(assumed.numpy() / len(drawn)) + 1e-4
        assert (np.abs(share - assumed.numpy()) < 6 * error + 0.15 * assumed.numpy()).all()


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(world, tmp_path):
    weights = [
        fit(world, tmp_path / name, steps=5, seed=seed)[0].state_dict()
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    ]
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pch.projection.weight"], other["pch.projection.weight"])


def test_an_interrupted_run_resumes_to_the_same_weights_and_curve(world, tmp_path, monkeypatch):
    whole, _, curve = fit(world, tmp_path / "whole", steps=8, check_every=2)
    step = Trainer.step

    def interrupted_step(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        fit(world, tmp_path / "cut", steps=8, check_every=2)
    resumed_steps = []
    monkeypatch.setattr(Trainer, "step", lambda self, number: resumed_steps.append(number) or step(self, number))
    resumed, _, curve_again = fit(world, tmp_path / "cut", steps=8, check_every=2)
    assert resumed_steps == [4, 5, 6, 7]
    assert [{**r, "seconds": 0} for r in curve_again] == [{**r, "seconds": 0} for r in curve]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_a_checkpoint_of_another_config_is_not_resumed(world, tmp_path):
    fit(world, tmp_path, steps=4, check_every=2)
    curve = fit(world, tmp_path, steps=6, check_every=2)[2]
    assert [record["step"] for record in curve] == [2, 4, 6]


def test_the_identity_of_a_run_covers_config_model_data_and_split(world):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())

    def identity(config=None, model=MODELS["learn"], content=content, dataset=dataset, split=split):
        torch.manual_seed(1)
        return train_recommender._identity(config or TrainConfig(), model(content), dataset, split)

    sequences = [
        *dataset.sequences[:-1],
        replace(dataset.sequences[-1], timestamps=dataset.sequences[-1].timestamps + 1),
    ]
    others = [
        identity(config=TrainConfig(n_uniform=7)),
        identity(model=lambda content: Learn(Pch(replace(SIZES, item_tower="alone")), content)),
        identity(model=lambda content: Learn(Pch(replace(SIZES, dropout=0.3)), content)),
        identity(model=lambda content: Learn(Pch(SIZES), content, "whiten")),
        identity(content=content + 0.1 * torch.randn(content.shape)),
        identity(dataset=data.Dataset(dataset.item_ids, dataset.texts, sequences)),
        identity(split=data.split(dataset.sequences, data.SplitConfig(n_test=2))),
        identity(split=data.split(dataset.sequences, data.SplitConfig(n_test=2, n_validation=0))),
    ]
    assert identity() == identity() and len({identity(), *others}) == 9


def test_the_weights_of_the_best_check_on_validation_are_kept(world, tmp_path):
    model, split, curve = fit(world, tmp_path, steps=40, check_every=5, learning_rate=0.05)
    best = max(record["ndcg_at_10"] for record in curve)
    found = full_ranking.metrics(retrieval.retrieve(model, world[1], split.validation).rank)["ndcg_at_10"]
    assert found == pytest.approx(best)


def test_training_never_reads_a_held_out_event(world):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    trainer = Trainer(TrainConfig(), MODELS["learn"](content), dataset, split)
    held_out = {(u, int(item)) for u, s in enumerate(dataset.sequences) for item in s.items[-2:]}
    packed = []
    pack = trainer._pack
    trainer._pack = lambda positions, users: packed.append((positions, users)) or pack(positions, users)
    for _ in range(5):
        trainer.next_item(trainer.users[:16])
        trainer.align(trainer.users[:16])
    met = {
        (u, int(dataset.sequences[u].items[p])) for ps, us in packed for u, run in zip(us, ps, strict=True) for p in run
    }
    assert len(packed) == 15 and met and not met & held_out
    assert trainer.next_frequency.sum() == pytest.approx(1.0) == trainer.align_frequency.sum()


def test_what_users_did_with_items_tells_what_they_meet_next_if_the_towers_read_it(tmp_path):
    """The next item is of the group that the last action names; without actions, it could be of either group."""
    rng = np.random.default_rng(0)
    sequences = []
    for user in range(80):
        actions = rng.integers(3, 5, 12).astype(np.uint8)  # like and dislike
        items = [int(rng.integers(N_ITEMS))]
        while len(items) < 12:
            half = N_ITEMS // 2
            item = int(rng.integers(half)) + (half if actions[len(items) - 1] == 4 else 0)
            if item not in items:
                items.append(item)
        sequences.append(data.Sequence(str(user), np.array(items), np.ones(12, np.float32), np.arange(12), actions))
    dataset = data.Dataset([str(i) for i in range(N_ITEMS)], [], sequences)
    content = torch.nn.functional.one_hot(torch.arange(N_ITEMS) * 2 // N_ITEMS, 12).float() + 0.1 * torch.randn(60, 12)
    ranks = {}
    for actions in ((), ("dislike", "like")):
        sizes = replace(SIZES, actions=actions)
        torch.manual_seed(0)
        model = Learn(Pch(sizes), content)
        config = TrainConfig(steps=120, users=16, warmup=5, learning_rate=3e-3, n_uniform=16, check_every=40)
        split = data.split(dataset.sequences, data.SplitConfig())
        train_recommender.train(config, model, dataset, split, tmp_path / str(len(actions)))
        ranks[actions] = np.median(retrieval.retrieve(model, dataset, split.test).rank)
        model.finish()
        served = full_ranking.tower_ranks(model.pch, content, dataset, split.test)
        assert np.median(served) == pytest.approx(ranks[actions], abs=1)
    assert ranks["dislike", "like"] + 3 < ranks[()]


def test_a_data_set_in_which_no_user_has_two_events_is_refused(world):
    content, dataset = world
    with pytest.raises(ValueError, match="no user has two events"):
        Trainer(TrainConfig(), MODELS["learn"](content), dataset, data.Split([1] * 60, [], []))


def test_the_head_learns_which_films_are_liked(world, tmp_path):
    content, dataset = world
    model, split, _ = fit(world, tmp_path, steps=30)
    model.finish()
    pch = model.pch
    config = CvrTrainConfig(epochs=15, batch=64, learning_rate=5e-3)
    sizes = CvrConfig(in_dim=12, fuse_dim=16, mid_dim=8)
    _head, figures = train_cvr_head.train_head(config, sizes, pch, CvrData(content, dataset, split))
    assert figures["cvr_auc"] > 0.9
    assert 0.2 < figures["cvr_base_rate"] < 0.8


@pytest.mark.parametrize("n_events", [1, 2, 4, 5, 9, 10, 14, 15, 16, 31])
def test_head_examples_cover_each_training_event_once_with_the_state_before_it(n_events):
    pch = small_pch(max_history=10)
    content = torch.randn(40, 12)
    rng = np.random.default_rng(0)
    run = rng.permutation(40)[:n_events]
    values = np.where(np.arange(n_events) % 3 == 0, 5.0, 3.0)
    dataset = data.Dataset([""] * 40, [], [data.Sequence("u", run, values, np.arange(n_events))])
    cvr_data = CvrData(content, dataset, data.Split([n_events], [], []))
    found = train_cvr_head.training_examples(pch, cvr_data, CvrTrainConfig())
    assert found.item.tolist() == run.tolist()
    assert found.label.tolist() == (values >= 4).tolist()
    for position in range(n_events):
        # A window holds at most ten events, and moves by five.
        begin = 0 if position < 10 else (position - 5) // 5 * 5
        want = pch.states(content[torch.from_numpy(run[begin:position])][None])[0, -1]
        torch.testing.assert_close(found.user[position], want.detach(), rtol=0, atol=1e-5)


def test_the_learning_rate_schedule_rises_and_then_falls_almost_to_zero():
    values = [schedule(step, 10, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] < 0.01


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_actions_of_a_share_of_the_windows_are_hidden(tmp_path, share, expected):
    rng = np.random.default_rng(0)
    sequences = [
        data.Sequence(
            str(user), rng.permutation(N_ITEMS)[:12], np.ones(12, np.float32), np.arange(12), np.full(12, 3, np.uint8)
        )
        for user in range(400)
    ]
    dataset = data.Dataset([str(i) for i in range(N_ITEMS)], [], sequences)
    model = Learn(Pch(replace(SIZES, actions=("like",))), torch.randn(N_ITEMS, 12))
    config = TrainConfig(steps=1, users=400, n_uniform=16, hide_actions=share)
    trainer = Trainer(config, model, dataset, data.split(dataset.sequences, data.SplitConfig()))
    seen = []
    read = trainer.states_and_items
    trainer.states_and_items = lambda groups, items: seen.extend(groups) or read(groups, items)
    trainer.next_item(trainer.draw_users())
    real = torch.cat([windows.actions[:, 0] for windows in seen])
    assert set(real.tolist()) <= {0, 3}
    assert (real == 0).float().mean().item() == pytest.approx(expected, abs=0.08)


def test_alignment_takes_states_and_targets_near_the_cut_unless_asked_otherwise(world):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())

    def distances(span):
        """The mean distance from the cut of random states before it and of targets after it."""
        config = TrainConfig(users=16, steps=1, align_weight=1.0, n_states=2, n_targets=1, align_span=span)
        trainer = Trainer(config, Learn(Pch(SIZES), content), dataset, split)
        before = [n - trainer._states_before(0, n)[1:] for n in [9] * 400]
        return np.mean(before), np.mean([trainer._positions_after(4) for _ in range(400)])

    (near_states, near_targets), (any_states, any_targets) = distances("near"), distances("any")
    assert near_states == pytest.approx(0.5, abs=0.1) and any_states == pytest.approx(4.5, abs=0.6)
    # Two of four positions are kept, 1 2/3 apart on average; the weights log 10 to log 10,000 take one of them 4 to 1.
    assert near_targets == pytest.approx(3 - any_targets, abs=0.2) and near_targets < 1.3


def test_alignment_trains_the_state_of_a_user_without_history_if_there_is_a_start_token(world):
    content, dataset = world
    split = data.split(dataset.sequences, data.SplitConfig())
    for kind, shortest in (("learn", 0), ("sasrec", 1)):
        trainer = Trainer(TrainConfig(users=60, steps=1, align_weight=1.0), MODELS[kind](content), dataset, split)
        lengths, pack = [], trainer._pack
        trainer._pack = lambda rows, users, lengths=lengths, pack=pack: (
            lengths.append(min(map(len, rows))) or pack(rows, users)
        )
        trainer.align(trainer.draw_users())
        assert lengths[0] == shortest
        assert list(trainer._states_before(shortest, shortest)) == [shortest] * 10
