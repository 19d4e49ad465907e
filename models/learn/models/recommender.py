"""The interface of all retrieval models: users and items are vectors, scored by dot product.

Trainer, evaluation and study use only this interface. Items are catalogue indices, so a model may look them up in an
embedding table, in a table of content embeddings, or in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.content.content_table import GatheredContent, standardised
from learn.content.standardise import Method, Standardisation, fit, fits_in_memory, sampled_mean
from learn.models.content_skip import ContentSkip
from learn.models.pch import Pch, PchConfig

# "scaffold": separate vectors in training, and the model is served without them, from text alone.
Ids = Literal["none", "tied", "separate", "scaffold"]


class Windows(NamedTuple):
    """What `Recommender.states` reads of b users."""

    items: Tensor
    times: Tensor
    actions: Tensor | None = None


class Recommender(nn.Module, ABC):
    """A sequence model over a catalogue of I items.

    `items` [b,l] are catalogue indices, oldest first, padded on the right. `times` [b,l+1] are the timestamps
    of those events in seconds and, last, that of the request; models without a notion of time ignore it. `actions`
    [b,l] are numbered as in `Sequence.actions`; models that read no actions ignore them, too.
    """

    # Whether the state before the first event was trained, so that a user without history can be served.
    has_start: ClassVar[bool] = False
    max_history: int
    # A dataclass. Every model that is trained must have one.
    config: Any

    @abstractmethod
    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """Items [b,l] -> [b,l+1,E]: state j has read the first j events and predicts the next one."""

    @abstractmethod
    def item_embeddings(self, items: Tensor) -> Tensor:
        """Items [n] -> the served embedding of each item, [n,E]."""

    def states_and_items(self, groups: Sequence[Windows], candidates: Tensor) -> tuple[list[Tensor], Tensor]:
        """`states` of each group and `item_embeddings` of candidates [c], for models that can share work between them.

        Users are in groups of about equally long windows, so that little of a group is padding.
        """
        return [self.states(*windows) for windows in groups], self.item_embeddings(candidates)

    def target_keys(self, items: Tensor, times: Tensor) -> Tensor:
        """Targets [b,t] of each user -> their embeddings in the alignment loss, [b,t,E]; by default the served ones."""
        return self.item_embeddings(items.flatten()).unflatten(0, items.shape)

    def last(self, items: Tensor, times: Tensor, length: Tensor, actions: Tensor | None = None) -> Tensor:
        """The state after the last event of each user, [b,E]; `length` [b] counts events without padding."""
        states = self.states(items, times, actions)
        at = length[:, None, None].expand(-1, 1, states.shape[-1])
        return states.gather(1, at).squeeze(1)

    def settings(self) -> dict[str, Any]:
        """Everything that defines the model apart from its weights and buffers, as values for JSON.

        Checkpoints are found by it, so a setting that is added later must be left out where it has no effect.
        """
        return self.config.recorded() if isinstance(self.config, PchConfig) else asdict(self.config)

    def finish(self) -> None:
        """Called once after training, to fold into the weights what only training keeps apart."""


class Learn(Recommender):
    """LEARN: PCH over frozen content embeddings, in two towers that share their weights.

    With `ids`, every item also has learned vectors that do not depend on its text. They are added to the input of the
    tower and to the item embedding. The paper does not have them, so their results are labelled LEARN+ID. In training,
    each of these vectors is left out with the probability `id_dropout`, independently of the others and anew for every
    occurrence of an item, so that text alone is trained, too.

    `content` [I,C] is fp32 or fp16. If it is too large for memory, it stays where it is, and may be a memory map; the
    rows of each batch are gathered from it (`content_table`).
    """

    has_start = True
    content: Tensor | GatheredContent

    def __init__(
        self, pch: Pch, content: Tensor, method: Method = "scale", ids: Ids = "none", id_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.pch, self.max_history = pch, pch.config.max_history
        self.standardisation = fit(content, method)
        _keep_content(self, standardised(content, self.standardisation))
        self.ids = None if ids == "none" else IdTables(len(content), pch.config, ids)
        if not 0.0 <= id_dropout <= 1.0:
            raise ValueError(f"id_dropout is {id_dropout}; expected a share from 0 to 1")
        self.id_dropout = 0.0 if self.ids is None else id_dropout

    @property
    def config(self) -> PchConfig:
        """The sizes of the towers."""
        return self.pch.config

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """PCH over the adapted content of the items, and the actions that it reads; `times` is not read."""
        return self._tower_states(self._tower_inputs(items), times, actions)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """What `PchConfig.item_tower` says; variant 3 uses the content embedding itself, scaled to length 1."""
        if self.pch.config.item_tower == "content":
            return F.normalize(self.content[items], dim=-1)
        return self._embeddings(items, self._tower_inputs(items))

    def states_and_items(self, groups: Sequence[Windows], candidates: Tensor) -> tuple[list[Tensor], Tensor]:
        """Adapts every item once: most items of a batch are candidates, too, and the adaptor is half of a step."""
        if self.pch.config.item_tower == "content":
            return super().states_and_items(groups, candidates)
        parts = [windows.items.flatten() for windows in groups] + [candidates]
        *read, own = self._tower_inputs(torch.cat(parts)).split([len(part) for part in parts])
        states = [
            self._tower_states(inputs.unflatten(0, windows.items.shape), windows.times, windows.actions)
            for inputs, windows in zip(read, groups, strict=True)
        ]
        return states, self._embeddings(candidates, own)

    def target_keys(self, items: Tensor, times: Tensor) -> Tensor:
        """Variant 1 reads the whole target sequence causally; the others compute each item alone.

        A target has no action yet, as in serving.
        """
        if self.pch.config.item_tower == "sequence":
            return self.states(items, times)[:, 1:]
        return super().target_keys(items, times)

    def last(self, items: Tensor, times: Tensor, length: Tensor, actions: Tensor | None = None) -> Tensor:
        """As in serving, the last layer is computed only at the last item of each user; `times` is not read."""
        mask = (torch.arange(items.shape[1], device=items.device)[None] < length[:, None]).long()
        return self.pch.last_from_adapted(self._tower_inputs(items), mask, self._tower_actions(actions))

    def settings(self) -> dict[str, Any]:
        """Also names the content by its digest where it is too large for a buffer; see `Recommender.settings`."""
        found, content = super().settings(), getattr(self, "content", None)
        if self.id_dropout:
            found |= {"id_dropout": self.id_dropout}
        # Their weights are those of "separate", but validation ranks without them.
        if self.ids is not None and not self.ids.are_served:
            found |= {"ids": "scaffold"}
        return found | {"content": content.digest()} if isinstance(content, GatheredContent) else found

    def load_towers(self, weights: dict[str, Tensor]) -> None:
        """Loads weights of towers that take raw content, such as the result of another run's `finish`.

        Their content skip is left out, because this run fits its own.
        """
        self.pch.load_state_dict({name: value for name, value in weights.items() if not name.startswith("skip.")})
        self.standardisation.unfold_from(self.pch.adaptor[0])

    def attach(self, skip: ContentSkip) -> None:
        """Adds a skip of raw content, which is on the CPU, to the towers, and moves it to their device."""
        # The standardisation stays on the CPU, whatever the device of the model.
        self.standardisation.unfold_from(skip.linear)
        self.pch.attach(skip.to(self.pch.start.device))

    def finish(self) -> None:
        """Changes `pch` to take raw content, as served. The recommender itself cannot be used afterwards."""
        for layer in self.pch.content_layers():
            self.standardisation.fold_into(layer)
        del self.content

    def _tower_states(self, inputs: Tensor, times: Tensor, actions: Tensor | None) -> Tensor:
        return self.pch.states_from_adapted(inputs, self._tower_actions(actions))

    def _embeddings(self, items: Tensor, inputs: Tensor) -> Tensor:
        raw = self.pch.alone_before_output(inputs)
        if self._reads_ids:
            raw = raw + self._kept(self.ids.outputs(items))
        return self.pch.with_skip(self.pch.output(raw), inputs)

    def _tower_inputs(self, items: Tensor) -> Tensor:
        """Items [...] -> [...,D+S]. Each distinct item is adapted once, as histories share many of their items."""
        distinct, place = torch.unique(items, return_inverse=True)
        adapted = self.pch.adapt(self.content[distinct])[place]
        if not self._reads_ids:
            return adapted
        return adapted + F.pad(self._kept(self.ids.inputs(items)), (0, self.pch.config.skip_dim))

    @property
    def _reads_ids(self) -> bool:
        return self.ids is not None and (self.training or self.ids.are_served)

    def _kept(self, vectors: Tensor) -> Tensor:
        """Id vectors [...,D], some of them 0 in training. The others are not scaled up: an item has its id or not."""
        if not self.training or not self.id_dropout:
            return vectors
        return vectors * (torch.rand(vectors.shape[:-1], device=vectors.device) >= self.id_dropout)[..., None]

    def _tower_actions(self, actions: Tensor | None) -> Tensor | None:
        return None if actions is None else self.config.action_numbers(actions)


class IdTables(nn.Module):
    """Learned vectors of every item, for the input and the output of a tower.

    "tied": one vector for both, as in SASRec, so input and output must have the same width. "separate" and "scaffold":
    one for each; they are initialised small, so text dominates at first and for items that are never trained on.
    """

    def __init__(self, n_items: int, config: PchConfig, ids: Ids) -> None:
        super().__init__()
        if ids == "tied" and config.width != config.out_dim:
            sizes = f"width {config.width}, out_dim {config.out_dim}"
            raise ValueError(
                f"tied ids need towers as wide as their output, got {sizes}; make them equal or use separate ids"
            )
        self.are_served = ids != "scaffold"
        self.scale = config.width**0.5 if ids == "tied" else 1.0
        self.first = nn.Parameter(torch.randn(n_items, config.width) * 0.02)
        self.second = None if ids == "tied" else nn.Parameter(torch.randn(n_items, config.out_dim) * 0.02)

    def inputs(self, items: Tensor) -> Tensor:
        """Items [...] -> what the tower's inputs receive, [...,D]."""
        return self.first[items] * self.scale

    def outputs(self, items: Tensor) -> Tensor:
        """Items [...] -> what the item embeddings receive, [...,E]."""
        return self.inputs(items) if self.second is None else self.second[items]


class IdTowers(Recommender):
    """The towers of LEARN over learned item vectors instead of content: LEARN without text."""

    has_start = True

    def __init__(self, pch: Pch, n_items: int) -> None:
        super().__init__()
        self.pch, self.config, self.max_history = pch, pch.config, pch.config.max_history
        # There is no text, so the model has no adaptor.
        self.pch.adaptor = nn.Identity()
        self.ids = IdTables(n_items, pch.config, "tied")

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """PCH over the learned vectors of the items, and the actions that it reads; `times` is not read."""
        read = None if actions is None else self.config.action_numbers(actions)
        return self.pch.states_from_adapted(self.ids.inputs(items), read)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The learned vectors themselves, without a tower."""
        return self.pch.output(self.ids.outputs(items))


class ContentMean(Recommender):
    """A baseline without training: the user is the mean of the content embeddings of the history."""

    content: Tensor | GatheredContent

    def __init__(self, content: Tensor, max_history: int) -> None:
        super().__init__()
        self.max_history = max_history
        # Every prompt begins with the same words, so cosines are informative only once the common mean is removed.
        mean = content.float().mean(dim=0) if fits_in_memory(content) else sampled_mean(content).float()
        one = torch.ones_like(mean)
        centred = standardised(content, Standardisation(mean, torch.diag(one), one))
        _keep_content(self, F.normalize(centred, dim=-1) if isinstance(centred, Tensor) else centred)

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        """State j is the direction of the mean of the first j content embeddings; state 0 is zero."""
        total = self.item_embeddings(items).cumsum(dim=1)
        return F.normalize(F.pad(total, (0, 0, 1, 0)), dim=-1)

    def item_embeddings(self, items: Tensor) -> Tensor:
        """The content embedding itself."""
        found = self.content[items]
        return found if isinstance(self.content, Tensor) else F.normalize(found, dim=-1)


def _keep_content(model: Recommender, content: Tensor | GatheredContent) -> None:
    if isinstance(content, Tensor):
        model.register_buffer("content", content, persistent=False)
    else:
        model.content = content
