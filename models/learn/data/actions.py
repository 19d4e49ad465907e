"""What users can do with items, and how it is read from the values of a log that does not say it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

# In the order of the enum Action of the wire contract.
ACTIONS = ("view", "click", "like", "dislike", "share", "cart", "purchase", "skip")
# The name of an action that is not known.
UNSPECIFIED = "unspecified"
# Actions that say that a user likes an item.
LIKED = ("like", "share", "cart", "purchase")


def number(name: str) -> int:
    """The number of an action in a prepared folder: 0 if it is not known, else 1 + its position in `ACTIONS`."""
    return 0 if name in ("", UNSPECIFIED) else 1 + ACTIONS.index(name)


@dataclass(frozen=True)
class ActionThresholds:
    """Which actions the values of a log stand for, in a log that has no actions of its own.

    A value of `liked_from` or more is a like, one of `disliked_to` or less a dislike, and one between them a click.
    Without `liked_from`, values say nothing. Both are on the log's own scale, and are compared in fp32, as prepared
    folders store values. Training and `learn features` read values through this class, and callers of a server have to
    send the same actions.
    """

    liked_from: float | None = None
    disliked_to: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; expected a number")
        if self.disliked_to is None:
            return
        if self.liked_from is None:
            raise ValueError(f"disliked_to is {self.disliked_to:g}, but there is no liked_from; give both, or neither")
        if self.disliked_to >= self.liked_from:
            raise ValueError(f"disliked_to is {self.disliked_to:g}; expected less than liked_from, {self.liked_from:g}")

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """The number of the action of each value, uint8 of the same shape."""
        values = np.asarray(values, np.float32)
        if self.liked_from is None:
            return np.zeros(values.shape, np.uint8)
        found = np.full(values.shape, number("click"), np.uint8)
        if self.disliked_to is not None:
            found[values <= np.float32(self.disliked_to)] = number("dislike")
        found[values >= np.float32(self.liked_from)] = number("like")
        return found

    def sql(self, value: str) -> str:
        """The same as an SQL expression, for an expression of the value."""
        if self.liked_from is None:
            return "CAST(0 AS UTINYINT)"
        cases = [f"WHEN CAST({value} AS FLOAT) >= CAST({self.liked_from!r} AS FLOAT) THEN {number('like')}"]
        if self.disliked_to is not None:
            cases.append(f"WHEN CAST({value} AS FLOAT) <= CAST({self.disliked_to!r} AS FLOAT) THEN {number('dislike')}")
        return f"CAST(CASE {' '.join(cases)} ELSE {number('click')} END AS UTINYINT)"
