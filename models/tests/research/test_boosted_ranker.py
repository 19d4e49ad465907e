from __future__ import annotations

import numpy as np
import pytest
import torch

from research.ranking.boosted_ranker import Boosted, BoostedTrial
from research.ranking.model_inputs import Inputs, Widths

WIDTHS = Widths(users=5, items=7, numeric=2)
SMALL = Boosted((BoostedTrial(4, 1.0),), min_data_in_leaf=10)


def inputs(n, extra=0, seed=0):
    """The label depends on one simple feature and, if there are extra features, on one of these."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, high, (n,), generator=g) for high in (5, 7)]
    numeric, more = torch.randn(n, 2, generator=g), torch.randn(n, extra, generator=g)
    logit = 2 * numeric[:, 0] + (3 * more[:, 1] if extra else 0)
    return Inputs(*ids, numeric, more, (torch.rand(n, generator=g) < torch.sigmoid(logit)).float())


def log_loss(scores, part):
    return float(torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(scores), part.label.double()))


def test_an_arm_adds_trees_to_the_scores_of_the_starting_point():
    start = SMALL.start(inputs(2000, seed=1), inputs(500, seed=2), WIDTHS, seed=1)
    assert start.n_trees > 0
    train, validation, test = (inputs(n, 3, seed) for n, seed in ((2000, 3), (500, 4), (500, 5)))
    fitted = SMALL.fit(start, train, validation, seed=1)
    assert fitted.chosen["trees"] > 0
    plain = Inputs(test.user, test.item, test.numeric, test.extra[:, :0], test.label)
    assert log_loss(fitted.scores(test), test) < log_loss(start.raw(plain), test) - 0.1
    again = SMALL.fit(start, train, validation, seed=1)
    np.testing.assert_array_equal(fitted.scores(test), again.scores(test))


def test_no_tree_is_added_if_none_lowers_the_validation_loss():
    start = SMALL.start(inputs(2000, seed=1), inputs(500, seed=2), WIDTHS, seed=1)
    train, validation = inputs(300, seed=6), inputs(300, seed=7)
    # The labels to learn from are the opposite of those of validation.
    wrong = Inputs(train.user, train.item, train.numeric, train.extra, 1 - train.label)
    fitted = SMALL.fit(start, wrong, validation, seed=1)
    assert fitted.chosen["trees"] == 0
    np.testing.assert_array_equal(fitted.scores(validation), start.raw(validation))


def test_the_trial_that_is_best_on_validation_is_kept():
    train, validation = inputs(2000, 3, seed=8), inputs(500, 3, seed=9)
    model = Boosted((BoostedTrial(4, 1e9), BoostedTrial(4, 1.0)), rounds=20, min_data_in_leaf=10)
    start = model.start(inputs(500, seed=1), inputs(200, seed=2), WIDTHS, seed=1)
    assert model.fit(start, train, validation, seed=1).chosen["lambda_l2"] == 1.0
    with pytest.raises(ValueError, match="no trials"):
        Boosted(()).start(train, validation, WIDTHS, seed=1)
