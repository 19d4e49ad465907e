"""A checkpoint is continued only by the run that it belongs to, also one that an earlier version wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learn.data import Dataset, Sequence, Split
from learn.data.item_text import ItemText
from learn.data.splits import Event
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import IdTowers, Learn
from learn.training import train_recommender
from learn.training.train_config import TrainConfig

N_ITEMS = 5
SIZES = PchConfig(content_dim=6, adaptor_hidden=4, width=4, layers=1, heads=2, ffn=4, out_dim=4, max_history=3)
# What `_identity` of commit c6fdc2b, before towers could read actions, gives for the run below.
BEFORE_ACTIONS = {
    "learn": "d41f4e672ae49a14f1b8a1c179e214da3b86b14974016be0c854ca6c6a460435",
    "id-towers": "f16bcc76cb3c7ee09c47d8a7c28e5db49c71990db2461292d782491810f75d5a",
}


def model_of(kind):
    torch.manual_seed(1)
    model = Learn(Pch(SIZES), torch.randn(N_ITEMS, 6)) if kind == "learn" else IdTowers(Pch(SIZES), N_ITEMS)
    # Weights and content are constants, because random numbers and their sums may differ between machines.
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.fill_(0.5)
    return model


def identity(kind):
    items, values, times = np.array([0, 3, 1, 4]), np.array([5.0, 2.0, 4.0, 1.0]), np.array([10, 20, 30, 40])
    texts, sequences = [ItemText(title="x")] * N_ITEMS, [Sequence("u", items, values, times)]
    dataset = Dataset([str(number) for number in range(N_ITEMS)], texts, sequences)
    # Earlier versions had these numbers for every length, and no other loss.
    config = TrainConfig(seed=1, steps=4, warmup=40, check_every=100, own_items="marginal")
    return train_recommender._identity(config, model_of(kind), dataset, Split([2], [Event(0, 2)], [Event(0, 3)]))


@pytest.mark.parametrize("kind", BEFORE_ACTIONS)
def test_the_identity_of_a_run_is_the_one_of_earlier_versions(kind):
    assert identity(kind) == BEFORE_ACTIONS[kind]


def test_towers_whose_ids_are_not_served_are_another_run():
    served, scaffold = (Learn(Pch(SIZES), torch.zeros(N_ITEMS, 6), ids=ids) for ids in ("separate", "scaffold"))
    assert served.settings() != scaffold.settings()
    with pytest.raises(ValueError, match=r"id_dropout is 1\.5"):
        Learn(Pch(SIZES), torch.zeros(N_ITEMS, 6), ids="scaffold", id_dropout=1.5)


@pytest.mark.parametrize("kind", BEFORE_ACTIONS)
def test_the_settings_that_identify_towers_leave_out_what_they_do_not_have(kind):
    assert model_of(kind).settings() == {
        "content_dim": 6,
        "adaptor_hidden": 4,
        "width": 4,
        "layers": 1,
        "heads": 2,
        "ffn": 4,
        "out_dim": 4,
        "max_history": 3,
        "adaptor": "mlp",
        "item_tower": "sequence",
        "positions": "none",
        "output": "unit",
        "dropout": 0.1,
    }
    towers = Pch(PchConfig(**{**model_of(kind).settings(), "actions": ("like", "view")}))
    assert towers.config.recorded()["actions"] == ("like", "view")
