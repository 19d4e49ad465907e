"""The settings of the CVR stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from learn.data.actions import ACTIONS

History = Literal["all", "liked"]
Task = Literal["conversion", "click", "click_and_conversion"]
LIKED_FROM = 4.0


@dataclass(frozen=True)
class CvrTrainConfig:
    """One run of the CVR stage. `configs/shipped.toml` has what differs for the shipped bundle."""

    seed: int = 1
    # Epochs of the head on frozen towers.
    epochs: int = 8
    batch: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    # "conversion": which of the items that a user met were liked. "click": which items a user meets at all, for a log
    # that says no more; then every event is positive, and the negatives are drawn from the catalogue.
    # "click_and_conversion": both, for a log with impressions (ESMM; Ma et al., SIGIR 2018), a row for each, with the
    # strongest action that followed. The head learns whether an
    # item that was shown is clicked, and whether it is clicked and converts; `cvr` of the bundle is the probability of
    # a conversion after a click.
    task: Task = "conversion"
    # "click_and_conversion": actions of events in which an item was only shown. They are rows of the log like others,
    # so histories have them too: let the towers tell them apart, by `pch.actions`.
    impressions: tuple[str, ...] = ("view", "skip")
    # "click": negatives per event, items that the user has not met, drawn by how often they occur in training. The
    # probability that the head gives is that of a click among so many.
    negatives: int = 4
    # An event with this value or a higher one counts as a conversion: 4 for star ratings, 1 where values are 0 and 1.
    liked_from: float = LIKED_FROM
    # Actions that count as a conversion instead, for a log with a column of actions: ["purchase"], for example. The log
    # has one row for a user and an item then, with the strongest action. An item
    # is then liked, for `history`, if its action is one of `learn.data.actions.LIKED`, as in `learn features`.
    conversions: tuple[str, ...] = ()
    # Which of a user's earlier items the user tower reads. Choose the one that callers will send in production.
    history: History = "all"
    # Weight of `losses.within_user`, which rewards the right order among one user's events, beside the cross entropy.
    within_user_weight: float = 0.0
    # Which of two events is the better one in that loss: by "label", a conversion and one that is none; by "value", the
    # one with the higher value, so that 5 stars are better than 4, and 3 better than 1.
    pairs: Literal["label", "value"] = "value"
    # With that weight, a batch has this many events of each of its users, if the user has them.
    events_per_user: int = 16
    # Whether the towers are trained further, with the head, once the head was trained on frozen towers. That changes
    # what the towers retrieve: evaluate them again.
    tune_towers: bool = False
    # "last": the last block and what follows it. "all": every layer, also the adaptor, which costs several times more.
    tune_layers: Literal["last", "all"] = "all"
    tune_epochs: int = 8
    # Of the towers; the head keeps its own rate and decay. Towers overfit within an epoch or two at 3e-4.
    tune_learning_rate: float = 3e-4
    tune_weight_decay: float = 0.01
    # The head's learning rate while the towers are tuned.
    tune_head_learning_rate: float = 1e-3
    # Weight of next-item prediction, the towers' own loss, which keeps what they retrieve.
    tune_next_weight: float = 0.0
    # Windows per step; a window has up to `max_history` items, and their events.
    tune_windows: int = 16

    def __post_init__(self) -> None:
        for name in ("conversions", "impressions"):
            unknown = [action for action in getattr(self, name) if action not in ACTIONS]
            if unknown:
                raise ValueError(f"{name} has {unknown[0]!r}, but must be some of {', '.join(ACTIONS)}")
        for name in ("batch", "events_per_user", "tune_windows", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("within_user_weight", "tune_next_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")

    def conversion(self) -> str:
        """What makes an event a conversion, for messages."""
        if self.conversions:
            return f"an action of cvr.conversions = {list(self.conversions)}"
        return f"a value of cvr.liked_from = {self.liked_from:g} or more"
