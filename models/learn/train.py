"""Trains the towers on frozen content embeddings.

One step: a batch of users, a window of each one's training events. `catalogue_softmax` asks every state for the next
item; `alignment` cuts the sequence in two and aligns the parts, as LEARN does. Their weights are in the config, because
which of them helps what is served is a question for measurement (models/README.md holds the answer so far).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from learn import losses
from learn.data import Dataset, Event, Split
from learn.evaluate import metrics, popularity, tower_ranks
from learn.pch import Pch, PchConfig
from learn.sampling import two_stage, window


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are those of the shipped bundle."""

    seed: int = 1
    steps: int = 400
    users: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 40
    temperature: float = 0.05
    # Uniform candidates beside the batch's own targets.
    n_uniform: int = 1024
    next_weight: float = 1.0
    align_weight: float = 0.0
    # Sizes of the alignment loss: states and targets a user, and the most events that either side reads.
    n_states: int = 10
    n_targets: int = 10
    # Users are drawn by (number of events) ** this: 0 = every user alike, 1 = every event alike.
    user_exponent: float = 0.5
    check_every: int = 100


@dataclass(frozen=True)
class Batch:
    """Windows: item [b,l] catalogue indices, padded on the right; length [b]."""

    item: Tensor
    length: Tensor


class Trainer:
    """State of a run."""

    def __init__(self, config: TrainConfig, pch: Pch, content: Tensor, dataset: Dataset, split: Split) -> None:
        self.config, self.pch, self.content = config, pch, content
        self.sequences = [s.items[:n] for s, n in zip(dataset.sequences, split.n_train, strict=True)]
        self.users = np.array([user for user, items in enumerate(self.sequences) if len(items) >= 2])
        weights = np.array([len(self.sequences[user]) for user in self.users], dtype=np.float64)
        self.user_probability = weights**config.user_exponent / (weights**config.user_exponent).sum()
        counts = torch.from_numpy(popularity(dataset, split))
        self.frequency = counts / counts.sum()
        self.rng = np.random.default_rng(config.seed)
        self.scale = 1.0 / config.temperature if pch.config.output == "unit" else 1.0
        self.optimizer = torch.optim.AdamW(
            _groups(pch, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6
        )

    def step(self, number: int) -> dict[str, float]:
        """One optimiser step; returns its losses."""
        self.pch.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(number, self.config.warmup, self.config.steps)
        n_users = min(self.config.users, len(self.users))
        users = self.rng.choice(self.users, size=n_users, replace=False, p=self.user_probability)
        parts = {}
        if self.config.next_weight:
            parts["next"] = self.config.next_weight * self.next_item(users)
        if self.config.align_weight:
            parts["align"] = self.config.align_weight * self.align(users)
        total = sum(parts.values())
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.pch.parameters(), 1.0)
        self.optimizer.step()
        return {name: float(part.detach()) for name, part in parts.items()}

    def next_item(self, users: np.ndarray) -> Tensor:
        """Every state predicts the item after it, among the batch's targets and a uniform sample, each alone."""
        size = self.pch.config.max_history + 1
        runs = [self.sequences[user] for user in users]
        bounds = [window(self.rng, len(run), size) for run in runs]
        batch = pack([run[begin:end] for run, (begin, end) in zip(runs, bounds, strict=True)])
        states = self.pch.states(self.content[batch.item[:, :-1]])  # [b,l,E]: start token and all but the last item
        real = torch.arange(batch.item.shape[1])[None] < batch.length[:, None]  # [b,l]
        # A window cut from the middle of a sequence must not teach that sequences begin there.
        real[torch.tensor([begin > 0 for begin, _ in bounds]), 0] = False
        target = batch.item[real]
        n_items = len(self.content)
        uniform = torch.from_numpy(self.rng.integers(n_items, size=self.config.n_uniform))
        candidate, position = torch.unique(torch.cat([target, uniform]), return_inverse=True)
        log_inclusion = losses.inclusion_log_probability(self.frequency, len(target), self.config.n_uniform)
        return losses.catalogue_softmax(
            states[real],
            self.pch.alone(self.content[candidate]),
            position[: len(target)],
            log_inclusion[candidate],
            self.scale,
        )

    def align(self, users: np.ndarray) -> Tensor:
        """LEARN's variant 1: a cut in time, history read on one side, the target sequence on the other."""
        h, t = self.config.n_states, self.config.n_targets
        longest = self.pch.config.max_history
        histories, targets, chosen = [], [], []
        for user in users:
            items = self.sequences[user]
            cut = int(self.rng.integers(1, len(items)))
            before = items[:cut][two_stage(self.rng, cut, 2 * longest, longest)]
            # Targets are what comes soon: the two stages work on the next 4 t events.
            after = items[cut : cut + 4 * t]
            histories.append(before)
            targets.append(after[two_stage(self.rng, len(after), 2 * t, t)])
            chosen.append(self.rng.integers(1, len(before) + 1, size=h))
            chosen[-1][0] = len(before)
        past, future = pack(histories), pack(targets)
        states = self.pch.states(self.content[past.item])  # [b,l+1,E]
        at = torch.from_numpy(np.stack(chosen))[:, :, None].expand(-1, -1, states.shape[-1])
        key = self.pch.states(self.content[future.item])[:, 1:]  # [b,t,E]
        present = torch.arange(future.item.shape[1])[None] < future.length[:, None]
        log_frequency = self.frequency.clamp_min(1e-9).log()[future.item]
        return losses.alignment(states.gather(1, at), key, future.item, log_frequency, present, self.scale)


def pack(runs: list[np.ndarray]) -> Batch:
    """Ragged item runs -> a batch padded on the right with item 0."""
    length = torch.tensor([len(run) for run in runs])
    item = torch.zeros(len(runs), int(length.max()), dtype=torch.int64)
    for row, run in enumerate(runs):
        item[row, : len(run)] = torch.from_numpy(run)
    return Batch(item, length)


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _groups(pch: Pch, weight_decay: float) -> list[dict]:
    """Only matrices decay; biases, norms and the start token do not."""
    matrices = [p for p in pch.parameters() if p.ndim >= 2]
    others = [p for p in pch.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def train(
    config: TrainConfig, pch_config: PchConfig, content: Tensor, dataset: Dataset, split: Split, log: Path
) -> Pch:
    """Trains towers and writes a JSON line a check to `log`. The last step's weights are returned: no early stop."""
    torch.manual_seed(config.seed)
    pch = Pch(pch_config)
    pch.standardise(content)
    trainer = Trainer(config, pch, content, dataset, split)
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("w") as file, tqdm(total=config.steps, desc="train towers", unit="step") as progress:
        file.write(json.dumps({"config": asdict(config), "pch": asdict(pch_config)}) + "\n")
        for number in range(config.steps):
            parts = trainer.step(number)
            progress.update()
            if (number + 1) % config.check_every == 0 or number + 1 == config.steps:
                record = {"step": number + 1, "seconds": round(time.monotonic() - begin, 1), **parts}
                record |= check(pch, content, dataset, split.validation)
                file.write(json.dumps(record) + "\n")
                file.flush()
                progress.set_postfix(loss=f"{sum(parts.values()):.3f}", hr10=f"{record.get('hr_at_10', 0):.4f}")
    pch.fold_standardisation()
    return pch.eval()


def check(pch: Pch, content: Tensor, dataset: Dataset, events: list[Event]) -> dict[str, float]:
    """Metrics on validation events; nothing if there are none."""
    return metrics(tower_ranks(pch, content, dataset, events)) if events else {}
