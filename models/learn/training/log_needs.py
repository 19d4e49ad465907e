"""What training needs of a log, checked before anything is encoded or trained."""

from __future__ import annotations

import numpy as np

from learn.data import PreparedSequences, Split
from learn.data.actions import number
from learn.data.dataset import Sequences
from learn.training.cvr_config import CvrTrainConfig
from learn.training.cvr_events import check_labels, clicks, labels


def check_actions(sequences: PreparedSequences, wanted: tuple[str, ...]) -> None:
    """Raises ValueError if the log does not say which events are the actions that the towers are to read."""
    if not wanted:
        return
    meta, asked = sequences.meta, f"pch.actions is {list(wanted)}, but "
    if not meta.has_actions and not meta.has_values:
        raise ValueError(f"{asked}the log has neither a column `action` nor values; leave pch.actions out")
    if not meta.has_actions and sequences.thresholds.liked_from is None:
        raise ValueError(
            f"{asked}the log has no column `action`: say from which value on a user likes an item (actions.liked_from "
            "and actions.disliked_to in --config), or leave pch.actions out"
        )
    found = sequences.actions_that_occur()
    missing = [name for name in wanted if number(name) not in found]
    if missing:
        raise ValueError(
            f"{asked}no event of the log is {' or '.join(map(repr, missing))}, so the towers could not learn what that "
            "means: leave it out of pch.actions"
        )


def check_liked(sequences: PreparedSequences, config: CvrTrainConfig) -> None:
    """Raises ValueError if "liked" histories would be other ones than `learn features` makes of the same log."""
    if config.history == "liked" and sequences.meta.has_actions and not config.conversions:
        raise ValueError(
            'cvr.history is "liked", and the log has a column `action`, by which callers and `learn features` see what '
            "is liked: say in cvr.conversions which actions are conversions, or leave the column out"
        )
    known = sequences.thresholds.liked_from
    if config.history == "liked" and not sequences.meta.has_actions and known not in (None, config.liked_from):
        raise ValueError(
            f'cvr.history is "liked", by cvr.liked_from = {config.liked_from:g}, but callers and `learn features` go '
            f"by actions.liked_from = {known:g}: give both the same value"
        )


def check_both_labels(sequences: Sequences, split: Split, config: CvrTrainConfig) -> None:
    """Raises ValueError if all events are conversions or none is, in the log or in one of its parts."""
    if config.task == "click":
        return  # Every event is positive, and negatives are drawn.
    n_events = n_liked = 0
    for sequence in sequences:
        n_events += len(sequence.items)
        n_liked += int(labels(config, sequence.values, sequence.actions).sum())
    if n_liked in (0, n_events):
        raise ValueError(
            f"{n_liked:,} of {n_events:,} events have {config.conversion()}, but a CVR head learns from both labels: "
            "give the log a `value` column, or set another cvr.liked_from in --config, or cvr.conversions for a log "
            'with actions, or cvr.task = "click", which needs neither'
        )
    if config.task == "click_and_conversion":
        shown = _n_only_shown(sequences, config)
        if not 0 < shown < n_events:
            raise ValueError(
                f"{shown:,} of {n_events:,} events have an action of cvr.impressions = {list(config.impressions)}, but "
                'cvr.task = "click_and_conversion" learns from items that were only shown and from others; without '
                'impressions in the log, cvr.task = "conversion" learns from what it has'
            )
    if config.task == "click_and_conversion" or config.conversions:
        _check_one_row_per_item(sequences, config)
    check_labels(sequences, split, config, "hold out other events, or set another value")


def _check_one_row_per_item(sequences: Sequences, config: CvrTrainConfig) -> None:
    """A label is that of one row: a view and its click would be a negative and a positive for the same impression."""
    for sequence in sequences:
        _items, counts = np.unique(sequence.items, return_counts=True)
        if counts.size and counts.max() > 1:
            told = 'cvr.task = "click_and_conversion"' if config.task == "click_and_conversion" else "cvr.conversions"
            raise ValueError(
                f"with {told}, a row of the log is one impression with the strongest action that followed, but user "
                f"{sequence.user!r} has {counts.max()} rows of one item: keep one row for each user and item"
            )


def _n_only_shown(sequences: Sequences, config: CvrTrainConfig) -> int:
    """How many events are impressions without a click."""
    return sum(int((clicks(config, sequence.actions) == 0).sum()) for sequence in sequences)
