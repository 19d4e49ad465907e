from __future__ import annotations

import numpy as np
import pytest
import torch

from research.ranking import ranker
from research.ranking.model_inputs import Inputs, Widths
from research.ranking.ranker import Dcn, Ranker, RankerConfig, Trial

SMALL = RankerConfig(id_dim=3, deep=(8, 4), dropout=0.0, id_dropout=0.0, batch=64, epochs=20)
WIDTHS = Widths(users=5, items=7, numeric=2)


def inputs(n, extra=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, high, (n,), generator=g) for high in (5, 7)]
    numeric = torch.randn(n, 2, generator=g)
    return Inputs(*ids, numeric, torch.randn(n, extra, generator=g), torch.randint(0, 2, (n,), generator=g).float())


def test_a_cross_layer_matches_a_hand_computed_value():
    model = Ranker(RankerConfig(id_dim=1, cross_layers=1, deep=(1,), dropout=0.0), Widths(2, 2, 1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.user.weight[1], model.item.weight[1] = 2.0, 3.0
        model.cross[0].weight[:] = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        model.cross[0].bias[:] = 0.5
        model.out_cross.weight[:] = 1.0
    x = Inputs(torch.tensor([1]), torch.tensor([1]), torch.tensor([[5.0]]), torch.zeros(1, 0), torch.ones(1))
    # x0 = (2, 3, 5); W x0 + b = (3.5, 5.5, 2.5); x0 * (W x0 + b) + x0 = (9, 19.5, 17.5).
    assert model(x).item() == pytest.approx(46.0)


def test_a_widened_model_starts_with_the_same_scores_and_learns_to_use_the_new_features():
    torch.manual_seed(1)
    start = Ranker(SMALL, WIDTHS).eval()
    wide = start.widened(4).eval()
    plain, with_extra = inputs(50), inputs(50, extra=4)
    np.testing.assert_allclose(ranker.scores(start, plain), ranker.scores(wide, with_extra), atol=1e-6)
    assert wide.widths.extra == 4
    # The label depends on one new column, and on the product of another with a known feature.
    train, validation = inputs(2000, 4, seed=1), inputs(500, 4, seed=2)
    rule = [x.extra[:, 0] + x.extra[:, 1] * x.numeric[:, 0] > 0 for x in (train, validation)]
    train, validation = (
        Inputs(x.user, x.item, x.numeric, x.extra, label.float())
        for x, label in zip((train, validation), rule, strict=True)
    )
    fitted = ranker.fit(wide, train, validation, Trial(1e-2, 0.0), seed=1)
    assert fitted.validation_loss < 0.35 < ranker.log_loss(wide, validation)


def test_ids_and_simple_features_are_learned():
    train, validation = inputs(1500, seed=3), inputs(500, seed=4)
    train, validation = (
        Inputs(x.user, x.item, x.numeric, x.extra, (((x.user + x.item) % 2 == 0) ^ (x.numeric[:, 0] > 1)).float())
        for x in (train, validation)
    )
    torch.manual_seed(1)
    fitted = ranker.fit(Ranker(SMALL, WIDTHS), train, validation, Trial(1e-2, 0.0), seed=1)
    right = (ranker.scores(fitted.model, validation) > 0) == (validation.label.numpy() > 0.5)
    assert right.mean() > 0.9


def test_training_stops_early_and_keeps_the_best_epoch():
    train, validation = inputs(200, seed=5), inputs(200, seed=6)  # labels are noise: nothing can be learned
    torch.manual_seed(1)
    start = Ranker(RankerConfig(id_dim=3, deep=(8,), epochs=50, patience=2, batch=20), WIDTHS)
    with torch.no_grad():
        start.out_cross.weight.zero_()
        start.out_deep.weight.zero_()
    before = {name: value.clone() for name, value in start.state_dict().items()}
    fitted = ranker.fit(start, train, validation, Trial(3e-2, 0.0), seed=1)
    assert fitted.epochs < 10
    assert fitted.validation_loss <= ranker.log_loss(start, validation)
    assert fitted.validation_loss == pytest.approx(ranker.log_loss(fitted.model, validation), abs=1e-6)
    # All arms share `start`, so it must not change.
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


def test_the_trial_that_is_best_on_validation_is_kept():
    train, validation = inputs(1000, seed=7), inputs(300, seed=8)
    train, validation = (
        Inputs(x.user, x.item, x.numeric, x.extra, (x.numeric[:, 1] > 0).float()) for x in (train, validation)
    )
    torch.manual_seed(1)
    trials = (Trial(1e-9, 0.0), Trial(1e-2, 0.0))
    fitted, chosen = ranker.best_fit(Ranker(SMALL, WIDTHS), train, validation, trials, seed=1)
    assert chosen == trials[1] and fitted.validation_loss < 0.3
    with pytest.raises(ValueError, match="no trials"):
        ranker.best_fit(Ranker(SMALL, WIDTHS), train, validation, (), seed=1)


def test_ids_are_hidden_as_row_0_and_only_in_training():
    model = Ranker(RankerConfig(id_dim=3, id_dropout=1.0), WIDTHS)
    rows = torch.arange(1, 5)
    assert model.train()._hidden(rows).tolist() == [0, 0, 0, 0]
    assert model.eval()._hidden(rows).tolist() == [1, 2, 3, 4]


def test_the_grid_has_larger_and_smaller_decays_than_the_ones_that_were_chosen_before():
    decays = sorted({trial.weight_decay for trial in ranker.TRIALS})
    assert decays[0] < 1.0 < decays[-1] and decays.index(1.0) not in (0, len(decays) - 1)


def test_an_arm_without_extra_features_continues_from_the_starting_point():
    train, validation = inputs(400, seed=9), inputs(200, seed=10)
    model = Dcn(SMALL, (Trial(1e-2, 0.0), Trial(1e-9, 0.0)))
    start = model.start(train, validation, WIDTHS, seed=1)
    fitted = model.fit(start, train, validation, seed=1)
    assert fitted.chosen["validation_log_loss"] <= ranker.log_loss(start, validation) + 1e-6
    assert fitted.chosen.keys() == {"learning_rate", "weight_decay", "epochs", "validation_log_loss"}
