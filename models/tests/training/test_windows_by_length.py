"""Windows of similar lengths are read together, which may change nothing but the time that a step takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learn import data
from learn.evaluation import retrieval
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import IdTowers, Learn, Windows
from learn.training.train_config import TrainConfig
from learn.training.trainer import SHORT, Batch, Trainer
from research.baselines.hstu import Hstu, HstuConfig
from research.baselines.relative_towers import RelativeLearn, RelativePch, RelativePchConfig
from research.baselines.sasrec import SasRec, SasRecConfig

N_ITEMS = 80
SIZES = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "out_dim": 16, "adaptor_hidden": 24, "max_history": 40}
SIZES |= {"dropout": 0.0}
CONTENT = torch.randn(N_ITEMS, 12, generator=torch.Generator().manual_seed(3))
MODELS = {
    "learn": lambda: Learn(Pch(PchConfig(content_dim=12, **SIZES)), CONTENT, ids="scaffold"),
    "learn, content as items": lambda: Learn(
        Pch(PchConfig(content_dim=12, item_tower="content", **SIZES | {"out_dim": 12})), CONTENT
    ),
    "learn-relative": lambda: RelativeLearn(
        RelativePch(RelativePchConfig(content_dim=12, time_gaps="request", **SIZES)), CONTENT
    ),
    "id-towers": lambda: IdTowers(Pch(PchConfig(**SIZES)), N_ITEMS),
    "sasrec": lambda: SasRec(SasRecConfig(width=16, max_history=40, dropout=0.0), N_ITEMS),
    "hstu": lambda: Hstu(HstuConfig(width=16, max_history=40, dropout=0.0, time_bias=True), N_ITEMS),
}


@pytest.fixture
def dataset():
    """Forty users with 3 to 60 events."""
    rng = np.random.default_rng(5)
    lengths = np.concatenate([[3, 4, 60], rng.integers(3, 60, size=37)])
    sequences = [
        data.Sequence(
            str(user), rng.permutation(N_ITEMS)[:n], np.ones(n, np.float32), np.cumsum(rng.integers(1, 9**6, n))
        )
        for user, n in enumerate(lengths.tolist())
    ]
    return data.Dataset([str(item) for item in range(N_ITEMS)], [], sequences)


@pytest.mark.parametrize("kind", MODELS)
def test_groups_change_neither_the_loss_nor_its_gradients(dataset, kind, monkeypatch):
    split = data.split(dataset.sequences, data.SplitConfig())

    def step():
        torch.manual_seed(1)
        trainer = Trainer(TrainConfig(steps=1, users=40, n_uniform=16), MODELS[kind](), dataset, split)
        loss = trainer.next_item(trainer.draw_users())
        loss.backward()
        return loss.item(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}

    sizes = []
    grouped = Batch.by_length
    monkeypatch.setattr(Batch, "by_length", lambda batch: sizes.extend(grouped(batch)) or grouped(batch))
    loss, gradients = step()
    assert len(sizes) > 2
    monkeypatch.setattr(Batch, "by_length", lambda batch: [batch.whole()])
    want, want_gradients = step()
    assert loss == pytest.approx(want, rel=1e-5)
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want_gradients[name], rtol=1e-3, atol=1e-5)


def test_compiled_code_reads_all_windows_at_once(dataset, monkeypatch):
    """Code that is compiled for each number and size of groups would be compiled in every step."""
    monkeypatch.setattr(torch, "compile", lambda method, dynamic: method)
    split, seen = data.split(dataset.sequences, data.SplitConfig()), []
    trainer = Trainer(TrainConfig(steps=1, users=40, n_uniform=16, compile=True), MODELS["learn"](), dataset, split)
    read = trainer.states_and_items
    trainer.states_and_items = lambda groups, items: seen.append(len(groups)) or read(groups, items)
    trainer.next_item(trainer.draw_users())
    assert seen == [1]


def test_every_user_is_in_one_group_of_which_at_most_half_is_padding():
    length = torch.tensor([1, 40, 8, 9, 2, 17, 16, 33, 1])
    batch = Batch(*(torch.zeros(9, 40, dtype=torch.int64) for _ in range(2)), length, torch.zeros(9, 40))
    groups = batch.by_length()
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(9))
    for rows, size in groups:
        assert size == length[rows].max()
        assert size <= SHORT or 2 * length[rows].min() > size
    # A window of one event alone is read with a second column, as no model reads windows without columns.
    (group,) = Batch(batch.item[:1], batch.time[:1], length[:1], batch.action[:1]).by_length()
    assert group[1] == 2


@pytest.mark.parametrize("kind", MODELS)
def test_states_of_events_are_in_the_order_of_the_events(dataset, kind, monkeypatch):
    model = MODELS[kind]().eval()
    events = data.split(dataset.sequences, data.SplitConfig()).test
    one_by_one = torch.cat([retrieval.user_states(model, dataset, [event]) for event in events])
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    torch.testing.assert_close(retrieval.user_states(model, dataset, events), one_by_one, rtol=1e-4, atol=1e-5)


def test_learn_reads_several_groups_as_it_reads_each():
    model = MODELS["learn"]().eval()
    groups = [Windows(torch.randint(N_ITEMS, (3, n)), torch.zeros(3, n + 1)) for n in (1, 5)]
    states, items = model.states_and_items(groups, torch.arange(4))
    for windows, found in zip(groups, states, strict=True):
        torch.testing.assert_close(found, model.states(*windows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(items, model.item_embeddings(torch.arange(4)), rtol=1e-4, atol=1e-5)
