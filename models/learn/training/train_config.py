"""The settings of a training run of the towers, or of any other recommender."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. The defaults are those of the shipped bundle."""

    seed: int = 1
    steps: int = 600
    users: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 40
    temperature: float = 0.05
    # The candidates of a state: the whole catalogue, the targets of the batch, or these and `n_uniform` random items.
    candidates: Literal["full", "sampled", "batch"] = "sampled"
    n_uniform: int = 1024
    # Whether items without a training event are candidates as well. They are never correct, so training would learn to
    # recognise them by their text and to rank them last, and new items would never be recommended.
    unseen_negatives: bool = False
    # Corrects for how often each candidate is drawn. Without it, in-batch negatives penalise popular items.
    log_q: bool = True
    next_weight: float = 1.0
    align_weight: float = 0.0
    # The alignment loss: the number of states and of targets per user, and how they are sampled beside the cut.
    n_states: int = 10
    n_targets: int = 10
    align_sampling: Literal["two-stage", "uniform", "recent"] = "two-stage"
    # Users are drawn in proportion to (number of events) ** this: 0 weights all users equally, 1 all events.
    user_exponent: float = 0.5
    # The share of windows whose actions are hidden, if the towers read actions: not every caller of a server sends any.
    hide_actions: float = 0.1
    check_every: int = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.hide_actions <= 1.0:
            raise ValueError(f"hide_actions is {self.hide_actions}; expected a share from 0 to 1")

    def recorded(self) -> dict[str, Any]:
        """The settings as checkpoints and results of studies have them: without a `hide_actions` that nobody set.

        So both still match those that were written before there was this setting.
        """
        settings = asdict(self)
        if self.hide_actions == TrainConfig.hide_actions:
            del settings["hide_actions"]
        return settings
