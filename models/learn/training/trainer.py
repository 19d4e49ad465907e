"""One optimiser step of any recommender of this package or of `research`.

Each step draws a batch of users and a window of each user's training events. There are two losses, each with a weight
in the config: `next_item` predicts the next event from every state; `align` cuts each sequence in two and aligns the
parts, as LEARN does. REPORT.md says which of them helps.

Several processes (`torchrun`) share a step. Every process draws the same batch and the same candidates, embeds its own
part of the candidates, and computes the losses of its own users against all of them; then the gradients are summed. The
result equals that of one process except for rounding and dropout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn.data import Dataset, Split
from learn.evaluation.full_ranking import popularity
from learn.models.recommender import Recommender, Windows
from learn.padding import pad
from learn.training import data_parallel, losses
from learn.training.sampling import SAMPLERS, target_shares, window
from learn.training.train_config import TrainConfig

# Users whose events are counted at once.
USERS_AT_ONCE = 1 << 15
# Windows up to this length are not worth a group each.
SHORT = 8


@dataclass(frozen=True)
class Batch:
    """Windows of b users: item (catalogue indices), time and action [b,l], padded on the right; length [b]."""

    item: Tensor
    time: Tensor
    length: Tensor
    action: Tensor

    def rows(self, chosen: slice | Tensor) -> Batch:
        """The batch of the users in `chosen`."""
        return Batch(self.item[chosen], self.time[chosen], self.length[chosen], self.action[chosen])

    def real(self) -> Tensor:
        """[b,l]: True for events, False for padding."""
        return torch.arange(self.item.shape[1], device=self.item.device)[None] < self.length[:, None]

    def whole(self) -> tuple[Tensor, int]:
        """All users as one group; see `by_length`."""
        return torch.arange(len(self.item), device=self.item.device), self.item.shape[1]

    def by_length(self) -> list[tuple[Tensor, int]]:
        """All users in groups of similar lengths: their rows, and how many columns their events need, two if there are.

        A group has the lengths from one power of two to the next, so at most half of it is padding; the shortest
        windows, of up to `SHORT` events, are one group.
        """
        power = torch.log2(self.length.clamp_min(SHORT).double()).ceil()
        rows = [(power == of).nonzero().squeeze(1) for of in torch.unique(power)]
        fewest = min(2, self.item.shape[1])
        return [(group, max(fewest, int(self.length[group].max()))) for group in rows]


class Trainer:
    """The state of a training run."""

    def __init__(self, config: TrainConfig, model: Recommender, dataset: Dataset, split: Split) -> None:
        self.config, self.model, self.dataset, self.n_train = config, model, dataset, np.asarray(split.n_train)
        self.device = next(model.parameters()).device
        self.users = np.flatnonzero(self.n_train >= 2)
        if not len(self.users):
            raise ValueError("no user has two events to train on")
        weights = self.n_train[self.users].astype(np.float64) ** config.user_exponent
        self.user_probability = weights / weights.sum()
        self._cumulative = np.cumsum(self.user_probability)
        counts = popularity(dataset, split)
        self.pool = np.flatnonzero(counts > 0) if not config.unseen_negatives else np.arange(len(counts))
        # [I]: the share of each item in the targets of each loss.
        self.next_frequency, self.align_frequency = self._frequencies()
        self.rng = np.random.default_rng(config.seed)
        self.scale = 1.0 / config.temperature
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6
        )
        compiled = partial(torch.compile, dynamic=True) if config.compile else lambda method: method
        self.states, self.states_and_items = compiled(model.states), compiled(model.states_and_items)

    def _frequencies(self) -> tuple[Tensor, Tensor]:
        size, t = self.model.max_history + 1, self.config.n_targets
        # The shares depend on the number of events alone, and many users have equally many.
        shares_of = lru_cache(maxsize=10_000)(partial(target_shares, size=size, has_start=self.model.has_start))
        following, aligned = np.zeros((2, len(self.dataset.item_ids)))
        for begin in range(0, len(self.users), USERS_AT_ONCE):
            chunk = slice(begin, begin + USERS_AT_ONCE)
            users, n_events = self.users[chunk], self.n_train[self.users[chunk]]
            items = np.concatenate(
                [self.dataset.sequences[u].items[:n] for u, n in zip(users.tolist(), n_events.tolist(), strict=True)]
            )
            probability = np.repeat(self.user_probability[chunk], n_events)
            as_next = np.concatenate([shares_of(n) for n in n_events.tolist()])
            # Treats targets as drawn uniformly. They are drawn soon after a random cut, but that changes little.
            as_target = np.repeat(np.minimum(t, n_events - 1) / n_events, n_events)
            following += np.bincount(items, probability * as_next, minlength=len(following))
            aligned += np.bincount(items, probability * as_target, minlength=len(aligned))
        return tuple(torch.from_numpy(found / found.sum()).float().to(self.device) for found in (following, aligned))

    def step(self, number: int) -> dict[str, float]:
        """Does one optimiser step; returns its losses."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(number, self.config.warmup, self.config.steps)
        users = self.draw_users()
        parts = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            if self.config.next_weight:
                parts["next"] = self.config.next_weight * self.next_item(users)
            if self.config.align_weight:
                parts["align"] = self.config.align_weight * self.align(users)
        self.optimizer.zero_grad()
        sum(parts.values()).backward()
        data_parallel.sum_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {name: data_parallel.summed(part) for name, part in parts.items()}

    def draw_users(self) -> np.ndarray:
        """The users of a step, without repetition."""
        n_users = min(self.config.users, len(self.users))
        if 2 * n_users > len(self.users):
            return self.rng.choice(self.users, size=n_users, replace=False, p=self.user_probability)
        # Repeated draws are left out until there are enough. `choice` would go through millions of users in each step.
        drawn: dict[int, None] = {}
        while len(drawn) < n_users:
            points = self.rng.random(n_users - len(drawn)) * self._cumulative[-1]
            drawn |= dict.fromkeys(np.searchsorted(self._cumulative, points, side="right").tolist())
        return self.users[list(drawn)]

    def next_item(self, users: np.ndarray) -> Tensor:
        """Predicts the next item from every state, with each candidate embedded alone. Returns this process's share."""
        size = self.model.max_history + 1
        bounds = [window(self.rng, int(self.n_train[user]), size) for user in users]
        batch = self._with_hidden_actions(self._pack([np.arange(*bound) for bound in bounds], users))
        asked = batch.real()
        # A window cut from the middle of a sequence must not teach that sequences begin there.
        starts = torch.tensor([begin > 0 for begin, _ in bounds], device=self.device)
        asked[:, 0] &= ~starts & self.model.has_start
        candidate = self._candidates(batch.item[asked])
        share = data_parallel.share(len(users))
        mine, asked_mine = batch.rows(share), asked[share]
        log_inclusion = self._log_inclusion(candidate, mine.item, asked_mine, int(asked.sum()))
        if self.config.own_items == "masked":
            self._mask_own(log_inclusion, candidate, users[share])
        own_candidates = candidate[data_parallel.share(len(candidate))]
        # Groups differ in number and size from step to step, and code is compiled anew for each.
        groups = [mine.whole()] if self.config.compile else mine.by_length()
        windows = [_without_the_last(mine.rows(group), size) for group, size in groups]
        states, keys = self.states_and_items(windows, own_candidates)
        keys = data_parallel.gathered(keys.float(), len(candidate))
        # Users in the order of their groups. The columns that a group leaves out are padding, which nobody asks for.
        order = torch.cat([group for group, _ in groups])
        asked_ordered = asked_mine[order]
        state = torch.cat(
            [found[asked_mine[group, :size]] for found, (group, size) in zip(states, groups, strict=True)]
        )
        target = torch.searchsorted(candidate, mine.item[order][asked_ordered])
        questions = losses.Questions(state, order[asked_ordered.nonzero()[:, 0]], target)
        total = losses.catalogue_softmax(questions, losses.Candidates(keys, log_inclusion), self.scale, reduction="sum")
        return total / asked.sum()

    @property
    def _n_uniform(self) -> int:
        return 0 if self.config.candidates == "batch" else self.config.n_uniform

    def _candidates(self, target: Tensor) -> Tensor:
        """The candidates of a step as sorted catalogue indices [c]."""
        if self.config.candidates == "full":
            return torch.from_numpy(self.pool).to(self.device)
        uniform = torch.from_numpy(self.rng.choice(self.pool, size=self._n_uniform)).to(self.device)
        return torch.unique(torch.cat([target, uniform]))

    def _log_inclusion(self, candidate: Tensor, item: Tensor, asked: Tensor, n_targets: int) -> Tensor:
        """[b,c] for users with windows item [b,l]: how likely each candidate is, given that the user is in the batch.

        Candidates were drawn uniformly, or as targets of the batch. The targets of the user are candidates with
        certainty, and the others were drawn by the other users, whose targets are what remains of `n_targets`. Only
        with `own_items` = "marginal", those of the user count as draws of others.
        """
        config, n_own = self.config, asked.sum(dim=1)
        if config.candidates == "full" or not config.log_q:
            return torch.zeros(len(item), len(candidate), device=self.device)
        n_draws = n_targets - (torch.zeros_like(n_own) if config.own_items == "marginal" else n_own)
        log_inclusion = losses.inclusion_log_probability(
            self.next_frequency[candidate], n_draws, self._n_uniform, len(self.pool)
        )
        if config.own_items == "certain":
            place = torch.searchsorted(candidate, item.contiguous())
            log_inclusion[asked.nonzero()[:, 0], place[asked]] = 0.0
        return log_inclusion

    def _mask_own(self, log_inclusion: Tensor, candidate: Tensor, users: np.ndarray) -> None:
        """Every training event of a user is a positive in one window or another, so none is a negative in any."""
        own = [self.dataset.sequences[user].items[: int(self.n_train[user])] for user in users]
        row = torch.from_numpy(np.repeat(np.arange(len(own)), [len(items) for items in own])).to(self.device)
        item = torch.from_numpy(np.concatenate(own).astype(np.int64)).to(self.device)
        place = torch.searchsorted(candidate, item).clamp(max=len(candidate) - 1)
        is_candidate = candidate[place] == item
        log_inclusion[row[is_candidate], place[is_candidate]] = math.inf

    def align(self, users: np.ndarray) -> Tensor:
        """LEARN's alignment: cuts each sequence at a random time and aligns the history before it with the targets."""
        longest, sample = self.model.max_history, SAMPLERS[self.config.align_sampling]
        # A user without history has a state as well, if the model has a start token.
        shortest = 0 if self.model.has_start else 1
        histories, targets, chosen = [], [], []
        for user in users:
            n_events = int(self.n_train[user])
            cut = int(self.rng.integers(shortest, n_events))
            histories.append(sample(self.rng, cut, 2 * longest, longest))
            targets.append(cut + self._positions_after(n_events - cut))
            chosen.append(self._states_before(shortest, len(histories[-1])))
        own = data_parallel.share(len(users))
        past, future = self._with_hidden_actions(self._pack(histories, users)).rows(own), self._pack(targets, users)
        states = self.states(past.item, _with_request(past), past.action)  # [b,l+1,E]
        at = torch.from_numpy(np.stack(chosen)[own]).to(self.device)[:, :, None].expand(-1, -1, states.shape[-1])
        key = self.model.target_keys(future.item, _with_request(future))  # [all b,t,E]
        log_frequency = self.align_frequency.clamp_min(1e-9).log()[future.item]
        if not self.config.log_q:
            log_frequency = torch.zeros_like(log_frequency)
        targets_of_all = losses.Targets(key, future.item, log_frequency, future.real())
        return losses.alignment(states.gather(1, at), targets_of_all, self.scale, own)

    def _states_before(self, shortest: int, n_history: int) -> np.ndarray:
        """The states of the alignment loss, [h] from `shortest` to `n_history`: the one at the cut, and random ones."""
        h = self.config.n_states
        first = max(shortest, n_history - h + 1) if self.config.align_span == "near" else shortest
        states = self.rng.integers(first, n_history + 1, size=h)
        states[0] = n_history
        return states

    def _positions_after(self, n_after: int) -> np.ndarray:
        """The targets of the alignment loss among the `n_after` events after the cut: at most t of the next 4 t."""
        t, n = self.config.n_targets, min(4 * self.config.n_targets, n_after)
        positions = SAMPLERS[self.config.align_sampling](self.rng, n, 2 * t, t)
        # The second stage favours high positions, which are the newest of a history, but the farthest of the targets.
        return n - 1 - positions[::-1] if self.config.align_span == "near" else positions

    def _pack(self, positions: list[np.ndarray], users: np.ndarray) -> Batch:
        """A batch of these positions of each user's sequence."""
        sequences = [self.dataset.sequences[user] for user in users]
        items = [s.items[p] for s, p in zip(sequences, positions, strict=True)]
        times = [s.timestamps[p] for s, p in zip(sequences, positions, strict=True)]
        actions = [s.actions[p] for s, p in zip(sequences, positions, strict=True)]
        length = torch.tensor([len(p) for p in positions], device=self.device)
        item, time, action = (torch.from_numpy(pad(rows)[0]).to(self.device) for rows in (items, times, actions))
        return Batch(item, time, length, action)

    def _with_hidden_actions(self, batch: Batch) -> Batch:
        if not getattr(self.model.config, "actions", ()) or self.config.hide_actions == 0.0:
            return batch
        hidden = torch.from_numpy(self.rng.random(len(batch.length)) < self.config.hide_actions).to(self.device)
        return replace(batch, action=batch.action.masked_fill(hidden[:, None], 0))


def _without_the_last(batch: Batch, size: int) -> Windows:
    """The first `size` events of each window, without the last of them, which no state reads."""
    return Windows(batch.item[:, : size - 1], batch.time[:, :size], batch.action[:, : size - 1])


def _with_request(batch: Batch) -> Tensor:
    """Times [b,l+1]: those of the batch, and the time of the request, which is taken to be that of the last event."""
    return torch.cat([batch.time, batch.time.amax(dim=1, keepdim=True)], dim=1)


def schedule(step: int, warmup: int, steps: int) -> float:
    """The learning rate's factor at `step`: linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay applies to matrices, not to biases, norms and the start token."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
