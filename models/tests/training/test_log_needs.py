"""A log or a setting that training cannot use is refused in one line, before anything is trained."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from learn.data import Sequence, Split
from learn.data.actions import ActionThresholds, number
from learn.training import log_needs
from learn.training.cvr_config import CvrTrainConfig
from learn.training.train_config import TrainConfig


def sequence(items, actions):
    numbers = np.array([number(action) for action in actions], np.uint8)
    return Sequence("u", np.array(items), np.ones(len(items), np.float32), np.arange(len(items)), numbers)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (CvrTrainConfig(task="click_and_conversion", conversions=("purchase",)), 'cvr.task = "click_and_conversion"'),
        (CvrTrainConfig(conversions=("purchase",)), "cvr.conversions"),
    ],
)
def test_a_log_with_several_rows_of_one_impression_is_refused(config, told):
    """The view that was clicked would be a negative, and the click that converted, too."""
    repeated = [sequence([7, 7, 8], ["view", "purchase", "click"])]
    with pytest.raises(ValueError, match=f"with {told}, a row of the log is one .* 'u' has 2 rows of one item"):
        log_needs.check_both_labels(repeated, Split([3], [], []), config)


def test_liked_histories_have_one_threshold():
    sequences = SimpleNamespace(meta=SimpleNamespace(has_actions=False), thresholds=ActionThresholds(4.5, 2.0))
    with pytest.raises(ValueError, match=r"by cvr\.liked_from = 4, but .* actions\.liked_from = 4\.5"):
        log_needs.check_liked(sequences, CvrTrainConfig(history="liked"))
    log_needs.check_liked(sequences, CvrTrainConfig(history="liked", liked_from=4.5))
    log_needs.check_liked(sequences, CvrTrainConfig())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_thresholds_are_numbers(value):
    with pytest.raises(ValueError, match="expected a number"):
        ActionThresholds(value)
    with pytest.raises(ValueError, match="expected a number"):
        ActionThresholds(4.0, value)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_share_of_hidden_actions_is_from_0_to_1(share):
    with pytest.raises(ValueError, match="expected a share from 0 to 1"):
        TrainConfig(hide_actions=share)
