"""PCH (Preference Comprehension): content embeddings -> user and item embeddings.

    content [b,l,C] -> adaptor (MLP) -> [b,l,D]; a learned start token goes before it -> [b,l+1,D]
                    -> causal transformer, pre-LN -> [b,l+1,D] -> norm, projection -> [b,l+1,E]

One set of weights is both user tower and item tower (variant 1 of the LEARN paper). The user embedding is the
output at the last item, or at the start token if the history is empty. The item embedding is the output at the item in
the sequence [start, item]. With `item_tower` = "adapted", it is the adapted content itself, of length 1, states have no
projection, so E is D, and a norm follows the inputs: an item that training seldom meets keeps more of its content
(TRAINING.md).

Towers with `PchConfig.actions` also read what the user did with each item of a history: `actions` [b,l] holds 0 for an
unknown action, else 1 + the action's position in that setting, and a learned vector per action is added to the adapted
item. That of 0 is zero, so a history without actions has the same states as in towers without actions. An item alone
has no action.

With `PchConfig.skip_dim`, both embeddings end with S more numbers, which go past the transformer (`content_skip`): E is
then `embedding_dim`, and what `adapt` gives of an item has these S numbers after its D.

Three methods run the same layers, and tests check that they agree:
- `states` computes every position, for training.
- `last` computes only what the last position needs: in the last layer, one query and one feed-forward row.
- `alone` computes many items, each in a sequence of its own. The start token attends only to itself, so its keys and
  values are the same for all items and are computed once.

Padding is on the right, so the causal mask already hides it from every real position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.data.actions import ACTIONS
from learn.models.content_skip import ContentSkip


@dataclass(frozen=True)
class PchConfig:
    """Sizes of the towers. The defaults are those of the shipped bundle, which reads actions as well."""

    content_dim: int = 384
    adaptor_hidden: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    ffn: int = 256
    out_dim: int = 64
    max_history: int = 80
    # The paper's adaptor is one linear map; with a small C it has too few parameters to tell the items apart.
    adaptor: Literal["mlp", "linear"] = "mlp"
    # LEARN's variants of the item tower in training. In serving, each item is always computed alone.
    # "sequence" (1): targets are read as a sequence. "alone" (2): each target alone. "content" (3): no PCH for items.
    # "adapted", which is ours: no transformer for items, but the adaptor.
    item_tower: Literal["sequence", "alone", "content", "adapted"] = "sequence"
    positions: Literal["none", "learned"] = "none"
    # "unit": outputs have length 1, and training divides scores by a temperature. "raw": scores are plain dot products.
    output: Literal["unit", "raw"] = "unit"
    dropout: float = 0.1
    # The actions that the user tower tells apart, some of `ACTIONS`.
    actions: tuple[str, ...] = ()
    # How many whitened components of the content both embeddings have beside the towers' own numbers. 0: none.
    skip_dim: int = 0

    def __post_init__(self) -> None:
        # A list, from a TOML file or a saved table, becomes a tuple.
        object.__setattr__(self, "actions", tuple(self.actions))
        unknown = [name for name in self.actions if name not in ACTIONS]
        if unknown:
            raise ValueError(f"actions has {', '.join(map(repr, unknown))}, but must be some of {', '.join(ACTIONS)}")
        if self.skip_dim < 0:
            raise ValueError(f"skip_dim is {self.skip_dim}; expected 0 (no skip) or more")
        if self.item_tower == "adapted" and self.out_dim != self.width:
            raise ValueError(
                f'out_dim is {self.out_dim} and width is {self.width}, but with item_tower = "adapted" the adapted '
                "content is the item embedding: make them equal"
            )
        if len(set(self.actions)) != len(self.actions):
            raise ValueError(f"actions is {list(self.actions)}, but each action may be named only once")

    def recorded(self) -> dict[str, Any]:
        """The sizes as checkpoints and studies have them: without `actions` and `skip_dim` where there are none.

        So both still match those that were written before there were these settings.
        """
        return {name: value for name, value in asdict(self).items() if value or name not in ("actions", "skip_dim")}

    @property
    def embedding_dim(self) -> int:
        """The size of a user or an item embedding."""
        return self.out_dim + self.skip_dim

    @property
    def adapted_dim(self) -> int:
        """The size of what `Pch.adapt` gives of an item."""
        return self.width + self.skip_dim

    def action_number(self, name: str) -> int:
        """The number by which `Pch` knows an action; 0 for an unknown action and for one that is not in `actions`."""
        return 1 + self.actions.index(name) if name in self.actions else 0

    def action_numbers(self, actions: Tensor) -> Tensor | None:
        """The numbers by which `Pch` knows these actions, given as in `Sequence.actions`; None if it reads none."""
        if not self.actions:
            return None
        known = [0, *(self.action_number(name) for name in ACTIONS)]
        return torch.tensor(known, device=actions.device)[actions.long()]


class Block(nn.Module):
    """One pre-LN transformer layer whose queries and keys may come from different positions."""

    def __init__(self, config: PchConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_ffn = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[b,k,D] -> keys and values, each [b,heads,k,D/heads]."""
        key, value = self.key_value(self.norm_attention(x)).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the new states of the positions in `x` [b,q,D]; `mask` is added to the scores [b,heads,q,k]."""
        query = self._split(self.query(self.norm_attention(x))) * query_scale(x.shape[-1], self.heads)
        scores = query @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_ffn(x)))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def query_scale(width: int, heads: int) -> float:
    """The factor of attention scores, 1 / sqrt(width of a head)."""
    return (width // heads) ** -0.5


def causal_mask(query_index: Tensor, key_index: Tensor) -> Tensor:
    """A causal mask to add to scores: 0 where the key is not after the query, -inf elsewhere. Shapes broadcast."""
    hidden = torch.tensor(float("-inf"), device=query_index.device)
    return torch.where(key_index <= query_index, torch.zeros_like(hidden), hidden)


def centred(rows: Tensor) -> Tensor:
    """Subtracts each row's mean from rows [...,D], which does not change the result of a LayerNorm."""
    return rows - rows.mean(dim=-1, keepdim=True)


class Pch(nn.Module):
    """User and item tower, with shared weights; see the module's docs for shapes."""

    def __init__(self, config: PchConfig) -> None:
        super().__init__()
        self.config = config
        self.adaptor = _adaptor(config)
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(config.max_history + 1, config.width) * 0.02)
        is_adapted = config.item_tower == "adapted"
        # The length of adapted content is free where only its direction is the item embedding, so inputs get a length.
        self.norm_in = nn.LayerNorm(config.width, elementwise_affine=False) if is_adapted else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.projection = nn.Identity() if is_adapted else nn.Linear(config.width, config.out_dim)
        self.actions = None
        if config.actions:
            self.actions = nn.Embedding(1 + len(config.actions), config.width, padding_idx=0)
            with torch.no_grad():
                self.actions.weight.mul_(0.02)
        self.skip = ContentSkip(config.content_dim, config.skip_dim) if config.skip_dim else None

    def attach(self, skip: ContentSkip) -> None:
        """Adds a skip to towers that were trained without one, or replaces theirs."""
        self.skip, self.config = skip, replace(self.config, skip_dim=skip.linear.out_features)

    def detach(self) -> None:
        """Takes the skip away."""
        self.skip, self.config = None, replace(self.config, skip_dim=0)

    def content_layers(self) -> list[nn.Linear]:
        """The layers that read content embeddings, into which a standardisation can be folded."""
        return [self.adaptor[0], *([] if self.skip is None else [self.skip.linear])]

    def adapt(self, content: Tensor) -> Tensor:
        """Content embeddings [...,C] -> inputs of the transformer, [...,D], and the directions of the skip, [...,S]."""
        adapted = self.adaptor(content)
        return adapted if self.skip is None else torch.cat([adapted, self.skip(content)], dim=-1)

    def states(self, content: Tensor, actions: Tensor | None = None) -> Tensor:
        """Content [b,l,C], actions [b,l] -> the output at the start token and at every item, [b,l+1,E]."""
        return self.states_from_adapted(self.adapt(content), actions)

    def states_from_adapted(self, items: Tensor, actions: Tensor | None = None) -> Tensor:
        """Like `states`, for items [b,l,D+S] that have already been through `adapt`."""
        x = self._embed(items, actions)
        mask = self._causal_mask(x)
        for block in self.blocks:
            x = block(x, *block.keys_values(x), mask)
        return self._finished(x, items)

    def _finished(self, x: Tensor, items: Tensor) -> Tensor:
        """The last layer's output [b,l+1,D] -> the states, each with the items that it has read in its skip."""
        states = self.output(self._project(x))
        if self.skip is None:
            return states
        read = self._directions(items).cumsum(dim=1)
        return self.skip.joined(states, F.pad(read, (0, 0, 1, 0)))

    def last(self, content: Tensor, mask: Tensor, actions: Tensor | None = None) -> Tensor:
        """Content [b,l,C], mask [b,l] (1 = item, 0 = padding on the right) -> the output at the last item, [b,E]."""
        return self.last_from_adapted(self.adapt(content), mask, actions)

    def last_from_adapted(self, items: Tensor, mask: Tensor, actions: Tensor | None = None) -> Tensor:
        """Like `last`, for items [b,l,D+S] that have already been through `adapt`."""
        x = self._embed(items, actions)
        causal = self._causal_mask(x)
        *earlier, final = self.blocks
        for block in earlier:
            x = block(x, *block.keys_values(x), causal)
        n_items = mask.sum(dim=1)  # [b]; the start token is at 0, so the last item is at n_items
        last_index = n_items[:, None, None].expand(-1, 1, x.shape[-1])
        index = torch.arange(x.shape[1], device=x.device)
        up_to_last = causal_mask(n_items[:, None, None, None], index[None, None, None, :])  # [b,1,1,l+1]
        last = final(x.gather(1, last_index), *final.keys_values(x), up_to_last)  # [b,1,D]
        state = self.output(self._project(last)).squeeze(1)
        if self.skip is None:
            return state
        return self.skip.joined(state, (self._directions(items) * mask[..., None]).sum(dim=1))

    def alone(self, content: Tensor) -> Tensor:
        """Content [n,C] -> for each item, the output at the item of the sequence [start, item], [n,E]."""
        return self.alone_from_adapted(self.adapt(content))

    def alone_from_adapted(self, items: Tensor) -> Tensor:
        """Like `alone`, for items [n,D+S] that have already been through `adapt`."""
        return self.with_skip(self.output(self.alone_before_output(items)), items)

    def with_skip(self, tower: Tensor, items: Tensor) -> Tensor:
        """The tower's part of item embeddings [n,...] and the items' adapted content [n,D+S] -> [n,E]."""
        return tower if self.skip is None else self.skip.joined(tower, self._directions(items))

    def alone_before_output(self, items: Tensor) -> Tensor:
        """Like `alone`, for items [n,D+S] from `adapt`, but only the tower's part and without `output`."""
        if self.config.item_tower == "adapted":
            # The server caches adapted content without its mean, so that it is this vector but for its length.
            return centred(self._inputs(items))
        x = self._inputs(items)[:, None]  # [n,1,D]
        if self.positions is not None:
            x = x + self.positions[1:2]
        x = self.dropout(x)
        shared = (x.shape[0], -1, -1, -1)
        for block, (start_key, start_value) in zip(self.blocks, self.start_keys_values(), strict=True):
            key, value = block.keys_values(x)
            pair_key = torch.cat([start_key.expand(shared), key], dim=2)  # [n,heads,2,D/heads]
            pair_value = torch.cat([start_value.expand(shared), value], dim=2)
            x = block(x, pair_key, pair_value, None)
        return self._project(x).squeeze(1)

    def start_keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the start token, one pair [1,heads,1,D/heads] per layer."""
        x = self.start[None, None]  # [1,1,D]
        if self.positions is not None:
            x = x + self.positions[:1]
        x = self.dropout(x)
        pairs = []
        for block in self.blocks:
            pairs.append(block.keys_values(x))
            x = block(x, *pairs[-1], None)
        return pairs

    def _inputs(self, items: Tensor) -> Tensor:
        return items[..., : self.config.width]

    def _directions(self, items: Tensor) -> Tensor:
        return items[..., self.config.width :]

    def _embed(self, items: Tensor, actions: Tensor | None) -> Tensor:
        items = self._inputs(items)
        if actions is not None:
            if self.actions is None:
                raise ValueError("these towers read no actions; leave `actions` out, or set PchConfig.actions")
            items = items + self.actions(actions)
        x = torch.cat([self.start.expand(items.shape[0], 1, -1), items], dim=1)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        return self.dropout(x if self.norm_in is None else self.norm_in(x))

    def _causal_mask(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1], device=x.device)
        return causal_mask(index[:, None], index[None, :])  # [l+1,l+1]

    def _project(self, x: Tensor) -> Tensor:
        return self.projection(self.norm_out(x))

    def output(self, raw: Tensor) -> Tensor:
        """Turns projected states into embeddings: scales them to length 1, unless `config.output` is "raw"."""
        return F.normalize(raw, dim=-1) if self.config.output == "unit" else raw


def _adaptor(config: PchConfig) -> nn.Sequential:
    """C -> D. The first module is always a linear layer, into which a standardisation can be folded."""
    if config.adaptor == "linear":
        return nn.Sequential(nn.Linear(config.content_dim, config.width))
    first, second = config.adaptor_hidden, config.width
    return nn.Sequential(nn.Linear(config.content_dim, first), nn.GELU(), nn.Linear(first, second))
