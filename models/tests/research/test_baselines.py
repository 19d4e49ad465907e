"""The baselines: their initial values and formulas, and that every kind of arm is built and trained."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from learn import data
from learn.evaluation.full_ranking import popularity
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer
from research.baselines import item_to_item
from research.baselines.hstu import Hstu, HstuConfig
from research.baselines.item_to_item import EaseConfig, ItemKnnConfig
from research.baselines.sasrec_text import SasRecTextConfig, sasrec_text
from research.baselines.unisrec import MixtureAdaptor, UniSRecConfig, unisrec
from research.retrieval.arms import ITEM_TO_ITEM, SIZES, Arm, Inputs, build, content_name, fit_item_to_item

# Sizes that are as small as they can be, by kind.
SMALL = {
    "sasrec": {"width": 8, "max_history": 6},
    "hstu": {"width": 8, "max_history": 6, "time_bias": True},
    "id-towers": {"width": 8, "heads": 2, "ffn": 8, "out_dim": 8, "max_history": 6},
    "sasrec-text": {"width": 8, "max_history": 6, "adaptor_hidden": 8},
    "unisrec": {"width": 8, "max_history": 6, "experts": 2},
    "learn": {"width": 8, "heads": 2, "ffn": 8, "out_dim": 8, "max_history": 6, "adaptor_hidden": 8},
    "learn-relative": {"width": 8, "heads": 2, "ffn": 8, "out_dim": 8, "max_history": 6, "time_gaps": "request"},
}


def dataset_of(histories, n_items):
    sequences = []
    for user, items in enumerate(histories):
        length = len(items)
        sequences.append(data.Sequence(str(user), np.array(items), np.ones(length), np.arange(length)))
    return data.Dataset([str(item) for item in range(n_items)], [], sequences)


def random_dataset():
    rng = np.random.default_rng(0)
    return dataset_of([rng.permutation(25)[: 6 + user] for user in range(8)], 25)


@pytest.fixture
def inputs(tmp_path):
    np.save(tmp_path / "content.npy", np.random.default_rng(1).normal(size=(25, 12)).astype(np.float16))
    return Inputs(random_dataset(), {"minilm": tmp_path / "content.npy"}, {})


# HSTU


def test_hstu_begins_with_the_values_of_the_published_code():
    model = Hstu(HstuConfig(width=64, layers=2, max_history=100, time_bias=True), 5000)
    assert model.table.abs().max() <= 0.04
    # A normal distribution that is cut at two standard deviations has 0.88 of the deviation.
    assert model.table.std().item() == pytest.approx(0.02 * 0.8796, rel=0.02)
    assert model.positions.std().item() == pytest.approx(math.sqrt(2 / (100 + 64)), rel=0.05)
    for block in model.blocks:
        assert block.uvqk.bias is None and block.uvqk.weight.std().item() == pytest.approx(0.02, rel=0.03)
        bound = math.sqrt(6 / (64 + 64))
        assert 0.98 * bound < block.out.weight.abs().max() <= bound
        assert not list(block.norm.parameters()) and block.norm.eps == 1e-6
        for bias in (block.by_distance, block.by_time):
            assert bias.std().item() == pytest.approx(0.02, rel=0.3)


def test_padding_behind_a_history_does_not_change_hstu():
    """It divides by the longest history and not by the length of the batch, so the two must not be mixed up."""
    model = Hstu(HstuConfig(width=8, max_history=9, time_bias=True), 30).eval()
    items, times = torch.randint(30, (2, 4)), torch.arange(10).repeat(2, 1) * 1000
    alone = model.states(items, times[:, :5])
    padded = model.states(F.pad(items, (0, 5)), times)
    torch.testing.assert_close(padded[:, :5], alone, rtol=0, atol=1e-6)


# Text


@pytest.mark.parametrize("kind", ["sasrec-text", "unisrec"])
def test_items_that_training_never_met_get_vectors_from_their_text_alone(kind, inputs):
    """Two items with the same text are the same item to a model over text, whether training met one of them or not."""
    content = np.load(inputs.content["minilm"])
    content[24] = content[3]
    np.save(inputs.content["minilm"], content)
    dataset = dataset_of([[0, 1, 2, 3, 4, 5], [3, 2, 1, 6, 7, 8], [5, 3, 6, 2, 1, 9]], 25)
    model = build(Arm(kind, kind, sizes=SMALL[kind], standardise="scale"), Inputs(dataset, inputs.content, {}))
    trainer = Trainer(TrainConfig(steps=3, users=3, warmup=1), model, dataset, data.Split([6, 6, 6], [], []))
    for number in range(3):
        trainer.step(number)
    model.eval()
    vectors = model.item_embeddings(torch.arange(25))
    torch.testing.assert_close(vectors[24], vectors[3], rtol=0, atol=1e-6)
    assert (vectors[20] - vectors[3]).abs().max() > 1e-3
    times = torch.zeros(1, 3, dtype=torch.int64)
    met, new = (model.states(torch.tensor([[5, item]]), times) for item in (3, 24))
    torch.testing.assert_close(met, new, rtol=0, atol=1e-6)
    assert popularity(dataset, data.Split([6, 6, 6], [], []))[24] == 0


@pytest.mark.parametrize("adaptor", ["mlp", "linear"])
def test_the_item_vector_of_sasrec_over_text_is_its_adapted_content(adaptor):
    content = torch.randn(20, 12)
    model = sasrec_text(SasRecTextConfig(width=8, max_history=6, adaptor=adaptor), content, "none").eval()
    items = torch.tensor([4, 7])
    adapted = model.adaptor(content[items])
    torch.testing.assert_close(model.item_embeddings(items), F.normalize(adapted, dim=-1))
    got = model.states(items[None], torch.zeros(1, 3, dtype=torch.int64))
    torch.testing.assert_close(got, model.encoder(adapted[None]))


def perturbed_adaptor():
    adaptor = MixtureAdaptor(12, UniSRecConfig(width=8, experts=3, adaptor_dropout=0.0))
    with torch.no_grad():
        for parameter in adaptor.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adaptor


def test_the_gate_of_the_mixture_sums_to_one_and_is_noisy_only_in_training():
    adaptor, content = perturbed_adaptor(), torch.randn(5, 12)
    for adaptor_in_mode in (adaptor.train(), adaptor.eval()):
        gate = adaptor_in_mode.gate(content)
        assert gate.shape == (5, 3) and gate.min() > 0
        torch.testing.assert_close(gate.sum(dim=-1), torch.ones(5))
    assert torch.equal(adaptor.eval().gate(content), adaptor.gate(content))
    adaptor.train()
    assert not torch.allclose(adaptor.gate(content), adaptor.gate(content), atol=1e-3)


def test_a_new_mixture_weighs_its_experts_equally():
    adaptor = MixtureAdaptor(12, UniSRecConfig(width=8, experts=4)).eval()
    torch.testing.assert_close(adaptor.gate(torch.randn(5, 12)), torch.full((5, 4), 0.25))


def test_the_mixture_matches_its_formula_expert_by_expert():
    adaptor, content = perturbed_adaptor().eval(), torch.randn(5, 12)
    gate = (content @ adaptor.to_gate).softmax(dim=-1)
    want = torch.zeros(5, 8)
    for expert in range(3):
        want += gate[:, expert, None] * ((content - adaptor.shift[expert]) @ adaptor.weight[expert].T)
    torch.testing.assert_close(adaptor(content), want, rtol=0, atol=1e-5)


def test_all_parts_of_unisrec_get_a_gradient(inputs):
    dataset = inputs.dataset
    model = unisrec(UniSRecConfig(width=8, max_history=6), torch.randn(25, 12), "scale")
    trainer = Trainer(TrainConfig(steps=2, users=4, warmup=1), model, dataset, data.Split([6] * 8, [], []))
    trainer.step(0)
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum()]
    assert without == []


# EASE and ItemKNN

# Three users; item 3 is never met in training.
HISTORIES = [[0, 1, 2], [0, 1], [0, 2]]
GRAM = [[3, 2, 2, 0], [2, 2, 1, 0], [2, 1, 2, 0], [0, 0, 0, 0]]


def small_gram():
    return item_to_item.gram_matrix(dataset_of(HISTORIES, 4), data.Split([3, 2, 2], [], []))


def test_the_gram_matrix_counts_users_and_not_events():
    assert small_gram().tolist() == GRAM
    repeated = dataset_of([[0, 1, 2, 0, 1], [0, 1, 0], [0, 2]], 4)
    assert item_to_item.gram_matrix(repeated, data.Split([5, 3, 2], [], [])).tolist() == GRAM
    # The last event is held out.
    assert item_to_item.gram_matrix(repeated, data.Split([5, 3, 1], [], []))[0, 2] == 1


def test_ease_matches_a_hand_worked_inverse():
    """G + I = [[4,2,2],[2,3,1],[2,1,3]] has determinant 16 and P = [[8,-4,-4],[-4,8,0],[-4,0,8]] / 16."""
    weight = item_to_item.ease_weights(small_gram(), 1.0)
    want = [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(weight, torch.tensor(want), rtol=0, atol=1e-6)


def test_ease_minimises_its_loss_under_a_zero_diagonal():
    """Steck's objective |X - X B|^2 + l2 |B|^2, for which a descent from any other B would end at the closed form."""
    generator = torch.Generator().manual_seed(3)
    seen = (torch.rand(40, 7, generator=generator) < 0.4).double()
    weight = item_to_item.ease_weights((seen.T @ seen).float(), 5.0).double()
    assert weight.diagonal().abs().max() == 0
    gradient = -2 * seen.T @ (seen - seen @ weight) + 2 * 5.0 * weight
    # On the diagonal, the constraint holds it.
    off_diagonal = gradient - torch.diag(gradient.diagonal())
    assert off_diagonal.abs().max() < 1e-3 < gradient.diagonal().abs().min()


def test_item_knn_matches_hand_computed_cosines():
    weight = item_to_item.knn_weights(small_gram(), 10, 0.0)
    assert weight[0, 1].item() == pytest.approx(2 / math.sqrt(3 * 2))
    assert weight[1, 2].item() == pytest.approx(1 / 2)
    assert weight.diagonal().abs().max() == 0 and weight[3].abs().max() == 0 and weight[:, 3].abs().max() == 0
    shrunk = item_to_item.knn_weights(small_gram(), 10, 4.0)
    assert shrunk[1, 2].item() == pytest.approx(1 / (2 + 4))


def test_item_knn_keeps_the_nearest_neighbours_of_each_target():
    """Items 1 and 2 are both most similar to item 0; item 0 has both at the same distance and keeps one of them."""
    weight = item_to_item.knn_weights(small_gram(), 1, 0.0)
    assert (weight > 0).sum(dim=0).tolist() == [1, 1, 1, 0]
    assert weight[0, 1] > 0 and weight[0, 2] > 0


def test_a_score_is_the_sum_over_the_distinct_items_of_the_whole_history():
    dataset = dataset_of([[0, 1, 0, 2, 4, 3]], 6)
    weight = torch.zeros(6, 6)
    # Items 3 and 5 get 2 + 1 and 2.5; were item 0 counted twice, item 5 would get 5 and come first.
    weight[0, 3], weight[4, 3] = 2.0, 1.0
    weight[0, 5] = 2.5
    ranking = item_to_item.rank(weight, dataset, [data.Event(0, 5)])
    assert ranking.rank.tolist() == [1] and set(ranking.top[0].tolist()) - {-1} == {3, 5}


@pytest.mark.parametrize("arm", [Arm("ease", "EASE"), Arm("item-knn", "ItemKNN")], ids=lambda arm: arm.kind)
def test_the_best_setting_on_validation_is_kept_and_every_trial_is_recorded(arm, inputs):
    split = data.split(inputs.dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    fitted = fit_item_to_item(arm, inputs.dataset, split)
    figures = [trial.metrics["ndcg_at_10"] for trial in fitted.trials]
    assert len(figures) == {"ease": 6, "item-knn": 9}[arm.kind]
    assert figures[fitted.best] == max(figures) and fitted.best == figures.index(max(figures))
    chosen = fitted.trials[fitted.best].settings
    gram = item_to_item.gram_matrix(inputs.dataset, split)
    weights = {"ease": item_to_item.ease_weights, "item-knn": item_to_item.knn_weights}[arm.kind]
    assert torch.equal(fitted.weight, weights(gram, *chosen.values()))
    assert len(fitted.rank(inputs.dataset, split.test).rank) == 16
    # The test events have no say.
    blind = fit_item_to_item(arm, inputs.dataset, data.Split(split.n_train, split.validation, []))
    assert torch.equal(blind.weight, fitted.weight)


def test_a_grid_needs_validation_events_and_values_in_range():
    dataset, split = dataset_of(HISTORIES, 4), data.Split([3, 2, 2], [], [])
    with pytest.raises(ValueError, match="no validation event to choose one of 6 settings by"):
        item_to_item.fit_best(EaseConfig(), dataset, split)
    assert item_to_item.fit_best(EaseConfig(l2=(1.0,)), dataset, split).weight[0, 1] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"l2 is \[0.0\]; expected at least one value, and none below 0.001"):
        EaseConfig(l2=(0.0,))
    with pytest.raises(ValueError, match=r"neighbours is \[\]"):
        ItemKnnConfig(neighbours=())


# Arms


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_every_kind_that_is_trained_is_built_and_takes_two_steps(kind, inputs):
    arm = Arm(kind, kind, sizes=SMALL[kind], ids="separate" if kind == "learn" else "none")
    torch.manual_seed(0)
    model = build(arm, inputs)
    before = {name: value.clone() for name, value in model.named_parameters()}
    split = data.split(inputs.dataset.sequences, data.SplitConfig(n_test=2, n_validation=1))
    trainer = Trainer(TrainConfig(steps=2, users=4, warmup=1, n_uniform=8), model, inputs.dataset, split)
    losses = [trainer.step(number)["next"] for number in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert (content_name(arm, inputs) == "content") == (kind in ("learn", "learn-relative", "sasrec-text", "unisrec"))


def test_these_tests_cover_every_kind():
    assert set(SIZES) - {"lora"} == {*SMALL, *ITEM_TO_ITEM}
