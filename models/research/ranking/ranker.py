"""The ranking model of the study: DCN-V2 over ids and simple features, with or without what LEARN adds.

    user row -> embedding [d], item row -> embedding [d], numeric [F], extra [X] -> concatenated, x0 [D]
    x0 -> cross layers -> [D]
    x0 -> MLP ----------> [H], both -> linear -> logit

A cross layer is x_{l+1} = x0 * (W_l x_l + b_l) + x_l; the cross part and the deep part are parallel (Wang et al.,
WWW 2021, "DCN V2", equations 1 and 4). The arms of the study differ in `extra`.

Training is as in production: an existing model without extra features is trained further (`Ranker.widened`). All its
weights are kept and the new inputs have no influence at first, so every arm starts from the same scores.

`Dcn` is what a study knows of it: its sizes and its grid of trials.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learn.training.best_weights import BestWeights, train_epochs
from research.ranking.model_inputs import Fitted, Inputs, Widths


@dataclass(frozen=True)
class RankerConfig:
    """Sizes of DCN-V2 and how it is trained."""

    id_dim: int = 16
    # Rows of each id table, including row 0 for unknown ids; with more ids than rows, ids share rows.
    id_rows: int = 100_000
    cross_layers: int = 2
    deep: tuple[int, ...] = (64, 32)
    dropout: float = 0.1
    # Share of training events whose id is replaced by row 0, so that row 0 learns to stand for unknown ids.
    id_dropout: float = 0.05
    batch: int = 512
    epochs: int = 30
    # Training stops after this many epochs without a lower validation loss.
    patience: int = 3


@dataclass(frozen=True)
class Trial:
    """The hyperparameters that are tuned: every arm tries the same list and keeps the best on validation."""

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


# AdamW multiplies weights by 1 - learning_rate * weight_decay per step. With 1 as the largest decay, 43 of 50 runs
# chose it, so the grid goes on to where nothing more can be gained.
TRIALS = tuple(Trial(rate, decay) for rate in (3e-5, 1e-4, 3e-4, 1e-3) for decay in (0.01, 0.1, 1.0, 10.0, 100.0))


class Ranker(nn.Module):
    """Inputs -> logit [n]."""

    def __init__(self, config: RankerConfig, widths: Widths) -> None:
        super().__init__()
        self.config, self.widths = config, widths
        self.user = nn.Embedding(widths.users, config.id_dim)
        self.item = nn.Embedding(widths.items, config.id_dim)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.01)
        width = 2 * config.id_dim + widths.numeric + widths.extra
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(config.cross_layers))
        sizes = [width, *config.deep]
        self.deep = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        # One output layer per part, so that a widened model can keep both.
        self.out_cross = nn.Linear(width, 1)
        self.out_deep = nn.Linear(sizes[-1], 1, bias=False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [n]."""
        start = torch.cat(
            [self.user(self._hidden(inputs.user)), self.item(self._hidden(inputs.item)), inputs.numeric, inputs.extra],
            dim=-1,
        )
        crossed = start
        for layer in self.cross:
            crossed = start * layer(crossed) + crossed
        deep = start
        for layer in self.deep:
            deep = self.dropout(F.relu(layer(deep)))
        return (self.out_cross(crossed) + self.out_deep(deep)).squeeze(-1)

    def _hidden(self, rows: Tensor) -> Tensor:
        if not self.training or not self.config.id_dropout:
            return rows
        return rows.masked_fill(torch.rand(rows.shape) < self.config.id_dropout, 0)

    @torch.no_grad()
    def widened(self, extra: int) -> Ranker:
        """A model with `extra` more features at the end of its inputs that gives the same scores.

        New columns start at 0, so a new feature changes nothing at first. New rows of a cross layer keep their random
        start, because a product of two zeros would have no gradient.
        """
        wide = Ranker(self.config, replace(self.widths, extra=self.widths.extra + extra))
        fresh = wide.state_dict()
        for name, old in self.state_dict().items():
            grown = fresh[name]
            if grown.ndim == 2 and grown.shape[1] != old.shape[1]:
                grown[: old.shape[0], old.shape[1] :] = 0.0
            grown[tuple(slice(size) for size in old.shape)] = old
        wide.load_state_dict(fresh)
        return wide


@dataclass(frozen=True)
class Fit:
    """A trained ranker and its lowest mean log loss on validation, in nats."""

    model: Ranker
    validation_loss: float
    epochs: int


def fit(start: Ranker, train: Inputs, validation: Inputs, trial: Trial, seed: int) -> Fit:
    """Trains a copy of `start` with early stopping; returns the weights of the best epoch, which can be epoch 0."""
    torch.manual_seed(seed)
    model = copy.deepcopy(start)
    config = model.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.learning_rate, weight_decay=trial.weight_decay)

    def train_epoch() -> None:
        model.train()
        for rows in torch.randperm(len(train)).split(config.batch):
            chosen = train.take(rows)
            loss = F.binary_cross_entropy_with_logits(model(chosen), chosen.label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    best = BestWeights([model], figure=-log_loss(model, validation))
    epochs = range(1, config.epochs + 1)
    best_epoch = train_epochs(best, epochs, train_epoch, lambda: -log_loss(model, validation), config.patience)
    return Fit(model.eval(), -best.figure, best_epoch)


def best_fit(
    start: Ranker, train: Inputs, validation: Inputs, trials: tuple[Trial, ...], seed: int
) -> tuple[Fit, Trial]:
    """Fits every trial and returns the one with the lowest validation loss; in a tie, the earlier one."""
    if not trials:
        raise ValueError("no trials: at least one learning rate and weight decay are needed")
    fits = [fit(start, train, validation, trial, seed) for trial in trials]
    chosen = int(np.argmin([found.validation_loss for found in fits]))
    return fits[chosen], trials[chosen]


@torch.inference_mode()
def scores(model: Ranker, inputs: Inputs) -> np.ndarray:
    """Logits [n] in inference mode."""
    model.eval()
    return torch.cat([model(inputs.take(rows)) for rows in torch.arange(len(inputs)).split(8192)]).numpy()


@torch.inference_mode()
def log_loss(model: Ranker, inputs: Inputs) -> float:
    """Mean binary cross entropy in nats."""
    logits = torch.from_numpy(scores(model, inputs))
    return float(F.binary_cross_entropy_with_logits(logits, inputs.label))


@dataclass(frozen=True)
class Dcn:
    """DCN-V2 as the ranking model of a study. The starting point and every arm try all trials."""

    name = "dcn"
    sizes: RankerConfig = field(default_factory=RankerConfig)
    trials: tuple[Trial, ...] = TRIALS

    def start(self, train: Inputs, validation: Inputs, widths: Widths, seed: int) -> Ranker:
        """Trains the model without extra features that every arm starts from."""
        torch.manual_seed(seed)
        return best_fit(Ranker(self.sizes, widths), train, validation, self.trials, seed)[0].model

    def fit(self, start: Ranker, train: Inputs, validation: Inputs, seed: int) -> Fitted:
        """Trains one arm further from the starting point."""
        torch.manual_seed(seed)
        wide = start.widened(train.extra.shape[1])
        best, trial = best_fit(wide, train, validation, self.trials, seed)
        chosen = asdict(trial) | {"epochs": best.epochs, "validation_log_loss": best.validation_loss}
        return Fitted(chosen, lambda inputs: scores(best.model, inputs))
