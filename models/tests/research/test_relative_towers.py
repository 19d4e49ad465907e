"""LEARN's towers with relative positions and time gaps: the ways to compute a state agree, and what a state reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learn import data
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import Learn, Windows
from learn.training import content_skip
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer
from research.baselines.hstu import N_BUCKETS
from research.baselines.relative_towers import RelativeBlock, RelativeLearn, RelativePch, RelativePchConfig
from research.retrieval.arms import Arm, Inputs, build, content_name

EXACT = {"rtol": 0, "atol": 2e-6}
N_ITEMS, DAY = 25, 86_400
SIZES = {"width": 8, "heads": 2, "ffn": 8, "out_dim": 6, "max_history": 9, "adaptor_hidden": 8, "dropout": 0.0}
both_gaps = pytest.mark.parametrize("time_gaps", ["none", "request"])


def perturbed(model):
    """The biases are 0 in new towers; with these values, an error in how they are applied would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def recommender(time_gaps, **options):
    pch = RelativePch(RelativePchConfig(content_dim=12, layers=2, time_gaps=time_gaps, **SIZES))
    return perturbed(RelativeLearn(pch, torch.randn(N_ITEMS, 12), **options))


def events(n_users, length):
    """Items [b,l] and times [b,l+1] whose gaps are between a second and two days."""
    return torch.randint(N_ITEMS, (n_users, length)), torch.randint(1, 2 * DAY, (n_users, length + 1)).cumsum(dim=1)


def random_dataset():
    rng = np.random.default_rng(0)
    sequences = []
    for user in range(8):
        length = 6 + user
        times = rng.integers(1, DAY, length).cumsum()
        sequences.append(data.Sequence(str(user), rng.permutation(N_ITEMS)[:length], np.ones(length), times))
    return data.Dataset([str(item) for item in range(N_ITEMS)], [], sequences)


# How states agree


@both_gaps
def test_last_equals_the_state_at_the_last_item(time_gaps):
    model = recommender(time_gaps)
    items, times = events(4, 9)
    length = torch.tensor([5, 0, 9, 1])
    want = model.states(items, times)[torch.arange(4), length]
    torch.testing.assert_close(model.last(items, times, length), want, **EXACT)


@both_gaps
def test_padding_never_changes_a_state(time_gaps):
    model = recommender(time_gaps)
    items, times = events(1, 9)
    padded_items, padded_times = items.clone(), times.clone()
    padded_items[:, 4:], padded_times[:, 5:] = 0, 0
    alone = model.last(items[:, :4], times[:, :5], torch.tensor([4]))
    torch.testing.assert_close(model.last(padded_items, padded_times, torch.tensor([4])), alone, **EXACT)


@both_gaps
def test_an_item_alone_is_a_history_of_one_event_at_the_moment_of_its_request(time_gaps):
    model = recommender(time_gaps)
    items = torch.arange(5)
    at_once = torch.full((5, 2), DAY)
    want = model.states(items[:, None], at_once)[:, 1]
    torch.testing.assert_close(model.item_embeddings(items), want, **EXACT)
    (shared_states,), shared_items = model.states_and_items([Windows(items[:, None], at_once)], items)
    torch.testing.assert_close(shared_states[:, 1], want, **EXACT)
    torch.testing.assert_close(shared_items, want, **EXACT)


def test_new_towers_have_the_states_of_towers_without_biases():
    relative = RelativePch(RelativePchConfig(content_dim=12, time_gaps="request", **SIZES)).eval()
    plain = Pch(PchConfig(content_dim=12, **SIZES)).eval()
    plain.load_state_dict({name: value for name, value in relative.state_dict().items() if ".by_" not in name})
    content, times = torch.randn(3, 7, 12), events(3, 7)[1]
    got = relative.states_from_adapted(relative.adapt(content), times=times)
    torch.testing.assert_close(got, plain.states(content), **EXACT)
    torch.testing.assert_close(relative.alone(content[0]), plain.alone(content[0]), **EXACT)


# What a state reads


@both_gaps
def test_later_events_do_not_change_earlier_states(time_gaps):
    model = recommender(time_gaps)
    items, times = events(2, 7)
    changed_items, changed_times = items.clone(), times.clone()
    changed_items[:, 4] = (changed_items[:, 4] + 1) % N_ITEMS
    # State 4 predicts event 4, so it may read the time of that event, and of none after it.
    changed_times[:, 5:] += 30 * DAY
    before, after = model.states(items, times), model.states(changed_items, changed_times)
    torch.testing.assert_close(before[:, :5], after[:, :5], **EXACT)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-4


def test_a_longer_gap_changes_a_state_only_if_the_towers_read_gaps():
    items, times = events(2, 7)
    later = times.clone()
    later[:, -1] += 30 * DAY
    reads, ignores = recommender("request"), recommender("none")
    assert (reads.states(items, times) - reads.states(items, later))[:, -1].abs().max() > 1e-4
    torch.testing.assert_close(reads.states(items, times)[:, :-1], reads.states(items, later)[:, :-1], **EXACT)
    torch.testing.assert_close(ignores.states(items, times), ignores.states(items, later), rtol=0, atol=0)


def test_the_order_of_earlier_events_changes_a_state_only_through_the_bias_of_the_distance():
    """In one layer, attention without positions is a sum over a set, so the last state forgets the order."""
    model = RelativePch(RelativePchConfig(content_dim=12, layers=1, **SIZES))
    content = torch.randn(1, 4, 12)
    swapped = content[:, [1, 0, 2, 3]]
    torch.testing.assert_close(model.eval().states(content)[:, -1], model.states(swapped)[:, -1], **EXACT)
    perturbed(model)
    assert (model.states(content) - model.states(swapped))[:, -1].abs().max() > 1e-4


def test_the_bias_is_that_of_its_distance_and_bucket_and_the_start_token_has_no_gap():
    sizes = RelativePchConfig(content_dim=12, time_gaps="request", **SIZES)
    block = perturbed(RelativeBlock(sizes))
    buckets = torch.randint(N_BUCKETS, (2, 3, 3))
    bias = block.bias(3, buckets)
    by_distance, by_time = block.by_distance.view(-1, sizes.heads), block.by_time.view(-1, sizes.heads)
    assert bias.shape == (2, sizes.heads, 4, 4)
    torch.testing.assert_close(bias[1, :, 3, 1], by_distance[2] + by_time[buckets[1, 2, 0]])
    torch.testing.assert_close(bias[0, :, 2, 2], by_distance[0] + by_time[buckets[0, 1, 1]])
    torch.testing.assert_close(bias[0, :, 3, 0], by_distance[3])


def test_towers_with_time_gaps_refuse_to_run_without_times():
    pch = recommender("request").pch
    with pytest.raises(ValueError, match="read times, but none were given"):
        pch.states(torch.randn(1, 3, 12))
    assert recommender("none").pch.states(torch.randn(1, 3, 12)).shape == (1, 4, 6)


# Arms


def arm_of(time_gaps, **sizes):
    sizes = SIZES | {"layers": 1, "time_gaps": time_gaps} | sizes
    return Arm("learn-relative", "", sizes=sizes, standardise="scale", ids="scaffold", id_dropout=0.5)


@pytest.fixture
def inputs(tmp_path):
    np.save(tmp_path / "content.npy", np.random.default_rng(1).normal(size=(N_ITEMS, 12)).astype(np.float16))
    return Inputs(random_dataset(), {"minilm": tmp_path / "content.npy"}, {})


@both_gaps
@pytest.mark.parametrize("loss", [{}, {"next_weight": 0.0, "align_weight": 1.0}], ids=["next item", "alignment"])
def test_an_arm_trains_its_biases(time_gaps, loss, inputs):
    arm = arm_of(time_gaps)
    model = build(arm, inputs)
    split = data.split(inputs.dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    trainer = Trainer(TrainConfig(steps=2, users=4, warmup=1, n_uniform=8, **loss), model, inputs.dataset, split)
    losses = [sum(trainer.step(number).values()) for number in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    biases = {name: value for name, value in model.named_parameters() if ".by_" in name}
    assert len(biases) == {"none": 1, "request": 2}[time_gaps]
    assert all(value.abs().sum() > 0 for value in biases.values())
    decays = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decays and not any(id(value) in decays for value in biases.values())
    assert model.settings()["time_gaps"] == time_gaps
    assert content_name(arm, inputs) == "content"


def test_a_content_skip_is_attached_as_to_other_towers(inputs):
    model = build(arm_of("request", skip_dim=5), inputs)
    assert isinstance(model, Learn) and model.config.skip_dim == 0
    perturbed(model)
    split = data.split(inputs.dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    content = torch.from_numpy(np.load(inputs.content["minilm"]).astype(np.float32))
    content_skip.attach(model, content, 5, inputs.dataset, split)
    model.pch.skip.weight.fill_(0.4)
    items, times = events(2, 6)
    states = model.states(items, times)
    assert states.shape == (2, 7, 6 + 5)
    torch.testing.assert_close(model.last(items, times, torch.tensor([4, 6])), states[torch.arange(2), [4, 6]], **EXACT)
    at_once = torch.full((2, 2), DAY)
    want = model.states(items[:, :1], at_once)[:, 1]
    torch.testing.assert_close(model.item_embeddings(items[:, 0]), want, **EXACT)
