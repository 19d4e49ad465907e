"""Trains any recommender of this package or of `research`.

Each step draws a batch of users and a window of each user's training events. There are two losses, each with a weight
in the config: `next_item` predicts the next event from every state; `align` cuts each sequence in two and aligns the
parts, as LEARN does. REPORT.md says which of them helps.

Several processes (`torchrun`) share the users of a step. Every process draws the same batch and the same candidates,
and computes the losses of its own users against all candidates; then the gradients are summed. The result equals that
of one process except for rounding and dropout.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learn.atomic_file import replacing
from learn.data import Dataset, Split
from learn.evaluation.full_ranking import metrics, popularity
from learn.evaluation.retrieval import retrieve
from learn.models.recommender import Recommender
from learn.padding import pad
from learn.training import data_parallel, losses
from learn.training.best_weights import BestWeights
from learn.training.sampling import SAMPLERS, target_shares, window

# The validation metric that decides which weights are best.
FIGURE = "ndcg_at_10"


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


@dataclass(frozen=True)
class Batch:
    """Windows of b users: item (catalogue indices), time and action [b,l], padded on the right; length [b]."""

    item: Tensor
    time: Tensor
    length: Tensor
    action: Tensor

    def rows(self, chosen: slice) -> Batch:
        """The batch of the users in `chosen`."""
        return Batch(self.item[chosen], self.time[chosen], self.length[chosen], self.action[chosen])

    def real(self) -> Tensor:
        """[b,l]: True for events, False for padding."""
        return torch.arange(self.item.shape[1], device=self.item.device)[None] < self.length[:, None]


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
        counts = popularity(dataset, split)
        self.pool = np.flatnonzero(counts > 0) if not config.unseen_negatives else np.arange(len(counts))
        # [I]: the share of each item in the targets of each loss.
        self.next_frequency, self.align_frequency = self._frequencies()
        self.rng = np.random.default_rng(config.seed)
        self.scale = 1.0 / config.temperature
        self.optimizer = torch.optim.AdamW(
            _groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6
        )
        self.states = torch.compile(model.states, dynamic=True) if config.compile else model.states

    def _frequencies(self) -> tuple[Tensor, Tensor]:
        size, t = self.model.max_history + 1, self.config.n_targets
        following, aligned = np.zeros((2, len(self.dataset.item_ids)))
        for user, probability in zip(self.users.tolist(), self.user_probability.tolist(), strict=True):
            n_events = int(self.n_train[user])
            items = self.dataset.sequences[user].items[:n_events]
            np.add.at(following, items, probability * target_shares(n_events, size, self.model.has_start))
            # Treats targets as drawn uniformly. They are drawn soon after a random cut, but that changes little.
            np.add.at(aligned, items, probability * min(t, n_events - 1) / n_events)
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
        """The users of a step."""
        n_users = min(self.config.users, len(self.users))
        return self.rng.choice(self.users, size=n_users, replace=False, p=self.user_probability)

    def next_item(self, users: np.ndarray) -> Tensor:
        """Predicts the next item from every state, with each candidate embedded alone. Returns this process's share."""
        size = self.model.max_history + 1
        bounds = [window(self.rng, int(self.n_train[user]), size) for user in users]
        batch = self._with_hidden_actions(self._pack([np.arange(*bound) for bound in bounds], users))
        asked = batch.real()
        # A window cut from the middle of a sequence must not teach that sequences begin there.
        starts = torch.tensor([begin > 0 for begin, _ in bounds], device=self.device)
        asked[:, 0] &= ~starts & self.model.has_start
        candidate, log_inclusion = self._candidates(batch.item[asked])
        own = data_parallel.share(len(users))
        mine, asked_mine = batch.rows(own), asked[own]
        states = self.states(mine.item[:, :-1], mine.time, mine.action[:, :-1])[asked_mine]  # [q,E]
        position = torch.searchsorted(candidate, mine.item[asked_mine])
        keys = self.model.item_embeddings(candidate)
        total = losses.catalogue_softmax(states, keys, position, log_inclusion, self.scale, reduction="sum")
        return total / asked.sum()

    def _candidates(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates: sorted catalogue indices [c], and the log of the probability that each is drawn [c]."""
        n_uniform = self.config.n_uniform
        if self.config.candidates == "full":
            return torch.from_numpy(self.pool).to(self.device), torch.zeros(len(self.pool), device=self.device)
        if self.config.candidates == "batch":
            n_uniform = 0
        uniform = torch.from_numpy(self.rng.choice(self.pool, size=n_uniform)).to(self.device)
        candidate = torch.unique(torch.cat([target, uniform]))
        if not self.config.log_q:
            return candidate, torch.zeros(len(candidate), device=self.device)
        return candidate, losses.inclusion_log_probability(
            self.next_frequency[candidate], len(target), n_uniform, len(self.pool)
        )

    def align(self, users: np.ndarray) -> Tensor:
        """LEARN's alignment: cuts each sequence at a random time and aligns the history before it with the targets."""
        h, t, longest = self.config.n_states, self.config.n_targets, self.model.max_history
        sample = SAMPLERS[self.config.align_sampling]
        histories, targets, chosen = [], [], []
        for user in users:
            n_events = int(self.n_train[user])
            cut = int(self.rng.integers(1, n_events))
            histories.append(sample(self.rng, cut, 2 * longest, longest))
            # Targets come soon after the cut: both stages sample from the next 4 t events.
            targets.append(cut + sample(self.rng, min(4 * t, n_events - cut), 2 * t, t))
            chosen.append(self.rng.integers(1, len(histories[-1]) + 1, size=h))
            chosen[-1][0] = len(histories[-1])
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


def train(
    config: TrainConfig, model: Recommender, dataset: Dataset, split: Split, folder: Path
) -> list[dict[str, float]]:
    """Trains `model` in place and returns one record per check, which are also written to `folder`/train.jsonl.

    Keeps the weights of the check with the best NDCG@10; without validation events, those of the last step. Continues
    from `folder`/checkpoint.pt if that belongs to the same config, model, content, data and split.
    """
    if config.check_every < 1 or config.steps < 1:
        raise ValueError(f"steps and check_every are at least 1, got {config.steps} and {config.check_every}")
    torch.manual_seed(config.seed)
    trainer = Trainer(config, model, dataset, split)
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress.resumed(trainer, folder / "checkpoint.pt", _identity(config, model, dataset, split))
    begin = time.monotonic() - progress.seconds
    bar = tqdm(
        total=config.steps, initial=progress.step, desc="train", unit="step", disable=not data_parallel.is_first()
    )
    for number in range(progress.step, config.steps):
        parts = trainer.step(number)
        bar.update()
        if (number + 1) % config.check_every and number + 1 != config.steps:
            continue
        record = {"step": number + 1, "seconds": round(time.monotonic() - begin, 1)}
        record |= {f"loss_{name}": value for name, value in parts.items()}
        if split.validation:
            record |= metrics(retrieve(model, dataset, split.validation).rank)
        progress.note(record)
        if data_parallel.is_first():
            progress.save(trainer, folder / "checkpoint.pt")
            _write_curve(folder / "train.jsonl", config, progress.curve)
        bar.set_postfix(loss=f"{sum(parts.values()):.3f}", ndcg10=f"{record.get('ndcg_at_10', 0):.4f}")
    bar.close()
    progress.best.restore()
    model.eval()
    return progress.curve


@dataclass
class _Progress:
    """What a run needs to continue after an interruption. `identity` says which run it is."""

    identity: str
    step: int
    seconds: float
    curve: list[dict[str, float]]
    best: BestWeights

    @staticmethod
    def resumed(trainer: Trainer, path: Path, identity: str) -> _Progress:
        """The progress in the checkpoint, if it belongs to the same run; else that of a new run."""
        if path.is_file():
            saved = torch.load(path, map_location=trainer.device, weights_only=False)
            if saved.get("identity") == identity:
                trainer.model.load_state_dict(saved["model"])
                trainer.optimizer.load_state_dict(saved["optimizer"])
                trainer.rng.bit_generator.state = saved["rng"]
                torch.set_rng_state(saved["torch_rng"].cpu())
                best = BestWeights([trainer.model], max(past.get(FIGURE, -1.0) for past in saved["curve"]))
                best.weights = [saved["best"]]
                return _Progress(identity, saved["step"], saved["seconds"], saved["curve"], best)
        return _Progress(identity, 0, 0.0, [], BestWeights([trainer.model]))

    def note(self, record: dict[str, float]) -> None:
        """Adds a record to the curve, and keeps the weights if they are the best so far."""
        if FIGURE in record:
            self.best.offer(record[FIGURE])
        else:
            self.best.take()
        self.curve.append(record)
        self.step, self.seconds = int(record["step"]), record["seconds"]

    def save(self, trainer: Trainer, path: Path) -> None:
        """Writes the checkpoint atomically."""
        state = {
            "identity": self.identity,
            "model": trainer.model.state_dict(),
            "best": self.best.weights[0],
        }
        state |= {"optimizer": trainer.optimizer.state_dict(), "rng": trainer.rng.bit_generator.state}
        state |= {"torch_rng": torch.get_rng_state(), "step": self.step, "seconds": self.seconds, "curve": self.curve}
        with replacing(path) as partial:
            torch.save(state, partial)


def _identity(config: TrainConfig, model: Recommender, dataset: Dataset, split: Split) -> str:
    """SHA-256 over everything that the result of a run depends on, before its first step."""
    found = hashlib.sha256(json.dumps([config.recorded(), model.settings()]).encode())
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        found.update(name.encode() + value.detach().cpu().numpy().tobytes())
    reads_actions = bool(getattr(model.config, "actions", ()))
    for sequence, n_train in zip(dataset.sequences, split.n_train, strict=True):
        found.update(np.array([n_train, *sequence.items[:n_train], *sequence.timestamps[:n_train]], "<i8").tobytes())
        if reads_actions:
            found.update(sequence.actions[:n_train].tobytes())
    found.update(np.array([(event.user, event.position) for event in split.validation], "<i8").tobytes())
    return found.hexdigest()


def _write_curve(path: Path, config: TrainConfig, curve: list[dict[str, float]]) -> None:
    lines = [json.dumps({"config": asdict(config)}), *(json.dumps(record) for record in curve)]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n")
