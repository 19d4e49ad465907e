"""Trains the towers further, together with the CVR head, and with next-item prediction as their second loss.

The head's loss teaches the towers what users like; next-item prediction, as in `trainer`, keeps what they
retrieve. The towers have a learning rate and a weight decay of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from learn.data import Dataset, Split
from learn.evaluation.full_ranking import ITEM_CHUNK
from learn.models.cvr import CvrHead
from learn.models.pch import Pch
from learn.models.recommender import Learn, Recommender
from learn.training import losses
from learn.training.best_weights import BestWeights, train_epochs
from learn.training.cvr_config import CvrTrainConfig
from learn.training.cvr_events import Examples, Stacked, Window, batches, stack
from learn.training.train_config import TrainConfig
from learn.training.trainer import Trainer


@dataclass(frozen=True)
class TuneData:
    """What the tuning reads: the windows of the training events and, for next-item prediction, the log itself."""

    windows: list[Window]
    content: Tensor
    dataset: Dataset
    split: Split


def tune(
    config: CvrTrainConfig,
    next_item: TrainConfig,
    head: CvrHead,
    pch: Pch,
    data: TuneData,
    validate: Callable[[], float],
) -> int:
    """Trains `head` and `pch` in place and leaves them with their best weights; returns the epoch that these are of.

    Epoch 0 is the head on the towers as they came. `validate` measures the current weights of both; `pch` takes raw
    content before and after, and whenever it is called.
    """
    best = BestWeights([head, pch], validate())
    towers = _LastBlock(pch, data.content) if config.tune_layers == "last" else _Whole(pch, data.content)
    trainer = Trainer(next_item, towers, data.dataset, data.split) if config.tune_next_weight else None
    groups = [
        {"params": towers.tuned(), "lr": config.tune_learning_rate, "weight_decay": config.tune_weight_decay},
        {
            "params": list(head.parameters()),
            "lr": config.tune_head_learning_rate,
            "weight_decay": config.weight_decay,
        },
    ]
    optimizer = torch.optim.AdamW(groups)

    def train_epoch() -> None:
        towers.begin()
        head.train()
        order = torch.randperm(len(data.windows)).tolist()
        for batch in batches([data.windows[index] for index in order], config.tune_windows):
            loss = _window_loss(config, head, towers, batch)
            if trainer is not None:
                loss = loss + config.tune_next_weight * trainer.next_item(trainer.draw_users())
            step(optimizer, loss)
        towers.end()

    epochs = tqdm(range(1, config.tune_epochs + 1), desc="tune towers", unit="epoch")
    return train_epochs(best, epochs, train_epoch, validate)


def head_loss(config: CvrTrainConfig, outcome: tuple[Tensor, Tensor | None], events: Examples | Stacked) -> Tensor:
    """Cross entropy and, with a weight, the order within users; `outcome` is that of the head for these events."""
    logit, click = outcome
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    loss = cross_entropy(logit, events.label)
    if click is not None:
        loss = loss + cross_entropy(click, events.click)
    if config.within_user_weight:
        preference = events.value if config.pairs == "value" else events.label
        loss = loss + config.within_user_weight * losses.within_user(logit, preference, events.owner)
    return loss


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimiser, with the gradients of each group clipped."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def _window_loss(config: CvrTrainConfig, head: CvrHead, towers: Recommender, batch: list[Window]) -> Tensor:
    read = stack(batch)
    distinct, place = torch.unique(read.item, return_inverse=True)
    item = towers.item_embeddings(distinct)[place]
    # Towers of this package do not read times.
    states = towers.states(read.history, read.history, read.actions)
    return head_loss(config, head.outcome(read.pick(states), item, torch.arange(len(item))), read)


class _Whole(Learn):
    """All layers of the towers, on standardised content, because the first layer learns badly from raw content."""

    def __init__(self, pch: Pch, content: Tensor) -> None:
        super().__init__(pch, content, "scale")

    def tuned(self) -> list[nn.Parameter]:
        return list(self.pch.parameters())

    def begin(self) -> None:
        """Makes `pch` take standardised content, until `end`."""
        for layer in self.pch.content_layers():
            self.standardisation.unfold_from(layer)
        self.train()

    def end(self) -> None:
        for layer in self.pch.content_layers():
            self.standardisation.fold_into(layer)
        self.eval()


class _LastBlock(Recommender):
    """The last block, and the norm and projection after it; what comes before stays, so items are adapted once."""

    has_start = True

    def __init__(self, pch: Pch, content: Tensor) -> None:
        super().__init__()
        self.pch, self.config, self.max_history = pch, pch.config, pch.config.max_history
        with torch.no_grad():
            adapted = torch.cat([pch.adapt(rows.float()) for rows in content.split(ITEM_CHUNK)])
            self.register_buffer("adapted", adapted, persistent=False)

    def states(self, items: Tensor, times: Tensor, actions: Tensor | None = None) -> Tensor:
        read = None if actions is None else self.config.action_numbers(actions)
        return self.pch.states_from_adapted(self.adapted[items], read)

    def item_embeddings(self, items: Tensor) -> Tensor:
        return self.pch.alone_from_adapted(self.adapted[items])

    def tuned(self) -> list[nn.Parameter]:
        parts = (self.pch.blocks[-1], self.pch.norm_out, self.pch.projection)
        return [parameter for part in parts for parameter in part.parameters()]

    def begin(self) -> None:
        self.train()

    def end(self) -> None:
        self.eval()
