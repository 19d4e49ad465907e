from __future__ import annotations

import pytest
import torch
from torch import nn

from learn.content.standardise import fit


def content():
    mixing = torch.randn(6, 6)
    return torch.randn(400, 6) @ mixing * 0.1 + torch.linspace(-2, 3, 6)


def test_scale_gives_mean_zero_and_variance_one():
    table = content()
    out = fit(table, "scale").apply(table)
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.std(dim=0), torch.ones(6), rtol=0, atol=1e-5)


def test_whitening_gives_unit_covariance_without_a_rotation():
    table = content()
    standardisation = fit(table, "whiten")
    torch.testing.assert_close(torch.cov(standardisation.apply(table).T), torch.eye(6), rtol=0, atol=1e-3)
    # ZCA is the symmetric whitening map, so entry j keeps its meaning.
    torch.testing.assert_close(standardisation.matrix, standardisation.matrix.T, rtol=0, atol=1e-5)


def test_whitening_does_not_amplify_a_direction_without_variance():
    table = torch.cat([content(), torch.full((400, 1), 0.5)], dim=1)
    assert fit(table, "whiten").apply(table).abs().max() < 100


def test_none_changes_nothing():
    table = content()
    torch.testing.assert_close(fit(table, "none").apply(table), table)


@pytest.mark.parametrize("method", ["none", "scale", "whiten"])
def test_folding_into_a_layer_and_unfolding_keep_its_output(method):
    table, layer = content(), nn.Linear(6, 4)
    standardisation = fit(table, method)
    want = layer(standardisation.apply(table))
    standardisation.fold_into(layer)
    torch.testing.assert_close(layer(table), want, rtol=0, atol=2e-5)
    standardisation.unfold_from(layer)
    torch.testing.assert_close(layer(standardisation.apply(table)), want, rtol=0, atol=2e-4)
