"""LEARN's towers with relative positions and, optionally, time gaps, as HSTU has them.

    scores of a head = scaled q k^T + by_distance[position of q - position of k] + by_time[bucket of the time gap]

Both biases are learned, for each layer and head; the start token has position 0. They are 0 at the start, so that
training begins with the states of the towers without them.

With `time_gaps`, the gap is that of HSTU: from the key's event to the event to be predicted, in HSTU's buckets. So the
model knows the time of the request, which SASRec and the other towers do not. The start token is no event and has no
gap. An item alone is read as a history of one event at the moment of its request: its own gap is 0.

For studies only: the served graphs have no input for times, and no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.models.pch import Block, Pch, PchConfig
from learn.models.recommender import Learn, Recommender
from research.baselines.hstu import N_BUCKETS, time_buckets


@dataclass(frozen=True)
class RelativePchConfig(PchConfig):
    """Sizes of the towers, and whether they also read the gap between each event and the request."""

    time_gaps: Literal["none", "request"] = "none"


class RelativeBlock(Block):
    """A layer of the towers with its biases. Its caller adds `bias` to the mask of a whole sequence."""

    def __init__(self, config: RelativePchConfig) -> None:
        super().__init__(config)
        # One dimension each, because the trainer lets the weights of tables decay, and a bias should not decay.
        self.by_distance = nn.Parameter(torch.zeros((config.max_history + 1) * config.heads))
        self.by_time = nn.Parameter(torch.zeros(N_BUCKETS * config.heads)) if config.time_gaps == "request" else None

    def bias(self, length: int, buckets: Tensor | None) -> Tensor:
        """The bias of each query and key among the start token and l items, [heads,l+1,l+1] or [b,heads,l+1,l+1].

        `buckets` [b,l,l] are those of the items' time gaps; None if the towers read no times.
        """
        index = torch.arange(length + 1, device=self.by_distance.device)
        bias = self._per_head(self.by_distance, (index[:, None] - index[None, :]).clamp(min=0))
        if self.by_time is None:
            return bias
        return bias + F.pad(self._per_head(self.by_time, buckets), (1, 0, 1, 0))

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As `Block`. Without a mask, the one query is the last key of the sequence [start] or [start, item]."""
        if mask is None:
            n_items = key.shape[2] - 1
            no_gap = torch.zeros(1, n_items, n_items, dtype=torch.int64, device=key.device)
            mask = self.bias(n_items, no_gap)[..., -1:, :]
        return super().forward(x, key, value, mask)

    def _per_head(self, table: Tensor, index: Tensor) -> Tensor:
        """Entries of a table, [...,q,k] -> [...,heads,q,k]."""
        return F.embedding(index, table.unflatten(0, (-1, self.heads))).movedim(-1, -3)


class RelativePch(Pch):
    """The towers of LEARN made of `RelativeBlock`; `times` [b,l+1] are those of `Recommender`."""

    config: RelativePchConfig

    def __init__(self, config: RelativePchConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(RelativeBlock(config) for _ in range(config.layers))

    def states_from_adapted(self, items: Tensor, actions: Tensor | None = None, times: Tensor | None = None) -> Tensor:
        """As in `Pch`. With time gaps, state j depends on the times of the first j events and of the one after them.

        Raises ValueError if the towers read time gaps and `times` is None.
        """
        buckets = self._buckets(times)
        x = self._embed(items, actions)
        causal = self._causal_mask(x)
        for block in self.blocks:
            x = block(x, *block.keys_values(x), causal + block.bias(items.shape[1], buckets))
        return self._finished(x, items)

    def last_from_adapted(
        self, items: Tensor, mask: Tensor, actions: Tensor | None = None, times: Tensor | None = None
    ) -> Tensor:
        """As in `Pch`, but every state is computed: a study has no need for the shortcut of a server."""
        states = self.states_from_adapted(items, actions, times)
        last = mask.sum(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
        return states.gather(1, last).squeeze(1)

    def _buckets(self, times: Tensor | None) -> Tensor | None:
        if self.config.time_gaps == "none":
            return None
        if times is None:
            raise ValueError('towers with time_gaps = "request" read times, but none were given; give `times` [b,l+1]')
        return time_buckets(times)


class RelativeLearn(Learn):
    """LEARN with `RelativePch` as its towers, which get the times that other towers do not read."""

    pch: RelativePch

    def last(self, items: Tensor, times: Tensor, length: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state after the last event of each user."""
        return Recommender.last(self, items, times, length, actions)

    def _tower_states(self, inputs: Tensor, times: Tensor, actions: Tensor | None) -> Tensor:
        return self.pch.states_from_adapted(inputs, self._tower_actions(actions), times)
