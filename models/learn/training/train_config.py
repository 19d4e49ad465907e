"""The settings of a training run of the towers, or of any other recommender."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

# What follows from the length of a run, where the settings do not say it.
MOST_WARMUP, N_CHECKS, PATIENCE = 40, 12, 5


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. The defaults are those of the shipped bundle.

    The length follows the log: `epochs` times the steps of one epoch (`run_length`). The learning rate rises for
    `warmup` steps and then falls to 0 along half a cosine over the whole length, also if a run ends before it.
    """

    seed: int = 1
    # The length in steps, whatever the log; 0: from `epochs`.
    steps: int = 0
    users: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    # Steps. None: a tenth of the run, at most 40.
    warmup: int | None = None
    temperature: float = 0.05
    # The candidates of a state: the whole catalogue, the targets of the batch, or these and `n_uniform` random items.
    candidates: Literal["full", "sampled", "batch"] = "sampled"
    n_uniform: int = 1024
    # Whether items without a training event are candidates as well. They are never correct, so training would learn to
    # recognise them by their text and to rank them last, and new items would never be recommended.
    unseen_negatives: bool = False
    # Corrects for how often each candidate is drawn. Without it, in-batch negatives penalise popular items.
    log_q: bool = True
    # The events of a user's own window, which are candidates of that user in every draw. "certain": as such, each
    # counts as one item. "masked": none of the user's training events is a negative. "marginal": as if they had been
    # drawn like the others, so that the rare ones among them count as several or, in-batch, as dozens of items.
    own_items: Literal["certain", "masked", "marginal"] = "masked"
    next_weight: float = 1.0
    align_weight: float = 0.0
    # The alignment loss: the number of states and of targets per user, and how they are sampled beside the cut.
    n_states: int = 10
    n_targets: int = 10
    align_sampling: Literal["two-stage", "uniform", "recent"] = "two-stage"
    # "near": states of the newest events before the cut, and targets soon after it are likelier than later ones. "any":
    # states of any event, and later targets are likelier, as the published weights have it.
    align_span: Literal["near", "any"] = "near"
    # Users are drawn in proportion to (number of events) ** this: 0 weights all users equally, 1 all events.
    user_exponent: float = 0.5
    # The share of windows whose actions are hidden, if the towers read actions: not every caller of a server sends any.
    hide_actions: float = 0.1
    # Steps between two checks on validation. 0: a twelfth of the run.
    check_every: int = 0
    # The most validation events that a check ranks; of more, always the same sample.
    validation_events: int = 20_000
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    # How often the drawn windows cover the training events. Ignored if `steps` is set.
    epochs: float = 14.0
    # The run ends after so many checks in a row without a better NDCG@10 on validation. 0: never. None: 5, or never if
    # `steps` is set.
    patience: int | None = None
    # The longest time. The learning rate falls to its end within it; the last check comes on top.
    max_minutes: float | None = None
    # The run ends once NDCG@10 on validation is at least this.
    target: float | None = None
    # A folder for TensorBoard's files. It changes nothing in the run and is not recorded.
    tensorboard: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.hide_actions <= 1.0:
            raise ValueError(f"hide_actions is {self.hide_actions}; expected a share from 0 to 1")
        if not (self.next_weight or self.align_weight):
            raise ValueError("next_weight and align_weight are both 0, so there is no loss to train with; set one")
        for name in ("steps", "check_every", "warmup", "patience", "n_uniform", "next_weight", "align_weight"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} is {value}; expected 0 or more")
        for name in ("epochs", "max_minutes", "validation_events", "users", "temperature", "n_states", "n_targets"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected more than 0")

    def with_steps(self, steps: int) -> TrainConfig:
        """These settings for a run of `steps` steps, with everything set that follows from the length."""
        patience = 0 if self.steps else PATIENCE
        return replace(
            self,
            steps=steps,
            warmup=min(MOST_WARMUP, math.ceil(steps / 10)) if self.warmup is None else self.warmup,
            check_every=self.check_every or math.ceil(steps / N_CHECKS),
            patience=patience if self.patience is None else self.patience,
        )

    def recorded(self) -> dict[str, Any]:
        """The settings as checkpoints and results of studies have them: without those that nobody set.

        So both still match those that were written before there were these settings. A length in steps is recorded with
        all that follows from it, one in epochs as it is.
        """
        settings = asdict(self.with_steps(self.steps) if self.steps else self)
        unset = {name for name in ("warmup", "patience", "max_minutes", "target") if settings[name] is None}
        unset |= {name for name in ("steps", "check_every") if settings[name] == 0}
        if self.steps:
            unset |= {"epochs"} if settings["patience"] else {"epochs", "patience"}
        for name in unset | {"tensorboard"}:
            del settings[name]
        if self.hide_actions == TrainConfig.hide_actions:
            del settings["hide_actions"]
        if self.validation_events == TrainConfig.validation_events:
            del settings["validation_events"]
        # What every run did before there were these settings.
        if self.own_items == "marginal":
            del settings["own_items"]
        if self.align_span == "any" or not self.align_weight:
            del settings["align_span"]
        return settings
