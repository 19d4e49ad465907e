"""How long a run is: from the log to steps, when a run ends before its last step, and what to change next time.

One epoch is as many steps as it takes for the windows of these steps to hold as many events as training has:

    steps per epoch = events that training has / (users per step x expected events in the window of a drawn user)

Users with fewer than two training events are never drawn and do not count. The window of a user with n training events
holds min(n, max_history + 1) of them, and users are drawn in proportion to n ** user_exponent (`trainer`). So after one
epoch an event has been a target about once on average; events of users with long histories have been one less often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from learn.training.train_config import TrainConfig

# The validation metric that decides which weights are best, and whether training goes on.
FIGURE = "ndcg_at_10"
# If FIGURE rose by more than this share in the last quarter of a run, the run was too short. Less may be noise.
STILL_RISING = 0.02

Ending = Literal["steps", "patience", "target", "max_minutes"]
Curve = Sequence[Mapping[str, float]]


def steps_per_epoch(config: TrainConfig, n_train: Sequence[int], max_history: int) -> float:
    """The steps of one epoch as the head of this file defines it. n_train [U]: the training events of each user."""
    n_events = np.asarray(n_train, dtype=np.float64)
    n_events = n_events[n_events >= 2]
    if not len(n_events):
        raise ValueError("no user has two events to train on")
    probability = n_events**config.user_exponent
    per_window = probability @ np.minimum(n_events, max_history + 1) / probability.sum()
    return n_events.sum() / (min(config.users, len(n_events)) * per_window)


def planned(config: TrainConfig, n_train: Sequence[int], max_history: int) -> TrainConfig:
    """The settings of a run on this log, with its steps and everything that follows from them.

    `epochs` becomes what the steps are. `max_history` is that of the model. What was planned before stays as it is.
    """
    per_epoch = steps_per_epoch(config, n_train, max_history)
    steps = config.steps or max(1, math.ceil(config.epochs * per_epoch))
    return replace(config.with_steps(steps), epochs=round(steps / per_epoch, 3))


def affordable_steps(config: TrainConfig, step: int, seconds: float) -> int:
    """How many steps a run has that did `step` steps in `seconds`: its planned ones, or fewer to keep `max_minutes`.

    Asked for after each step, so that the learning rate falls to its end within the time that there is.
    """
    if config.max_minutes is None or not step:
        return config.steps
    left = 60.0 * config.max_minutes - seconds
    return max(step, min(config.steps, step + int(left * step / max(seconds, 1e-9))))


def early_ending(config: TrainConfig, curve: Curve) -> Ending | None:
    """Why a run ends after the last check of `curve` although steps are left; None if it goes on."""
    figures = [record[FIGURE] for record in curve if record.get(FIGURE) is not None]
    if not figures:
        return None
    if config.target is not None and figures[-1] >= config.target:
        return "target"
    n_since_best = len(figures) - 1 - int(np.argmax(figures))
    return "patience" if config.patience and n_since_best >= config.patience else None


def ending(config: TrainConfig, curve: Curve) -> Ending:
    """Why a run with this curve ended."""
    early = early_ending(config, curve)
    if early is not None:
        return early
    return "steps" if curve[-1]["step"] >= config.steps else "max_minutes"


def best_step(curve: Curve) -> int | None:
    """The step of the first check with the best figure; None without validation events."""
    measured = [record for record in curve if record.get(FIGURE) is not None]
    return int(max(measured, key=lambda record: record[FIGURE])["step"]) if measured else None


def warnings(config: TrainConfig, curve: Curve) -> list[str]:
    """What the learning curve of a finished run says against its length, and which setting to change.

    `config` is planned. A curve with fewer than two checks says nothing.
    """
    measured = [record for record in curve if record.get(FIGURE) is not None]
    if len(measured) < 2 or (ended := ending(config, measured)) == "target":
        return []
    best, last = best_step(measured), int(measured[-1]["step"])
    n_planned = last if ended == "max_minutes" else config.steps
    if best == last:
        before = max((record[FIGURE] for record in measured if record["step"] <= 0.75 * last), default=0.0)
        gain = measured[-1][FIGURE] / before - 1.0 if before else 0.0
        if gain <= STILL_RISING:
            return []
        setting = "train.max_minutes" if ended == "max_minutes" else "train.epochs (or train.steps, where it is set)"
        return [
            f"validation was still improving at the last check (step {last}): NDCG@10 rose by {gain:.0%} in the last "
            f"quarter of the run; raise {setting}"
        ]
    if best >= n_planned / 2:
        return []
    why = "its learning rate had hardly fallen by then"
    if best <= 2 * (config.warmup or 0):
        why = f"its warm-up of {config.warmup} steps was just over"
    return [
        f"the best check was step {best} of {n_planned}, far back: {why}; plan about {2 * best} steps (train.steps, or "
        f"train.epochs times {2 * best / n_planned:.2g})"
    ]
