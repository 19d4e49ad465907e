"""The second ranking model of the study: LightGBM, which most teams that rank without a neural network use.

As with DCN-V2, every arm continues from one starting point, a model without extra features that was trained on the
towers' part: its raw scores are the scores that an arm's trees are added to (`init_score`). If no tree lowers the
validation loss, there is none, and the arm scores as the starting point does.

Trees read no ids: they would learn thousands of ids by heart, most of which have a handful of events. What is known of
a user and an item is in the statistics of `features`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import lightgbm
import numpy as np
import torch
import torch.nn.functional as F

from research.ranking.model_inputs import Fitted, Inputs, Widths


@dataclass(frozen=True)
class BoostedTrial:
    """The hyperparameters that are tuned: every arm tries the same list and keeps the best on validation."""

    num_leaves: int
    lambda_l2: float


TRIALS = tuple(BoostedTrial(leaves, l2) for leaves in (4, 8, 16, 32, 64) for l2 in (0.1, 1.0, 10.0, 100.0))


@dataclass(frozen=True)
class Trees:
    """A model and how many of its trees are used; none if `booster` is None."""

    booster: lightgbm.Booster | None
    n_trees: int
    validation_loss: float

    def raw(self, inputs: Inputs) -> np.ndarray:
        """What the trees add to the logits [n]."""
        if self.booster is None:
            return np.zeros(len(inputs))
        return self.booster.predict(_columns(inputs), raw_score=True, num_iteration=self.n_trees)


@dataclass(frozen=True)
class Boosted:
    """LightGBM as the ranking model of a study."""

    name = "lightgbm"
    trials: tuple[BoostedTrial, ...] = TRIALS
    learning_rate: float = 0.05
    rounds: int = 1000
    # Training stops after this many trees without a lower validation loss.
    patience: int = 30
    min_data_in_leaf: int = 50
    # Shares of the columns and of the events that a tree sees.
    feature_fraction: float = 0.5
    bagging_fraction: float = 0.8

    def start(self, train: Inputs, validation: Inputs, widths: Widths, seed: int) -> Trees:
        """Trains the model without extra features that every arm starts from."""
        zeros = [np.zeros(len(part)) for part in (train, validation)]
        return self._best(_table(train, zeros[0]), _table(validation, zeros[1]), seed)[0]

    def fit(self, start: Trees, train: Inputs, validation: Inputs, seed: int) -> Fitted:
        """Trains one arm further from the starting point."""
        tables = [_table(part, start.raw(_plain(part))) for part in (train, validation)]
        best, trial = self._best(*tables, seed)
        chosen = asdict(trial) | {"trees": best.n_trees, "validation_log_loss": best.validation_loss}
        return Fitted(chosen, lambda inputs: start.raw(_plain(inputs)) + best.raw(inputs))

    def _best(self, train: lightgbm.Dataset, validation: lightgbm.Dataset, seed: int) -> tuple[Trees, BoostedTrial]:
        if not self.trials:
            raise ValueError("no trials: at least one number of leaves and lambda are needed")
        fits = [self._grow(train, validation, trial, seed) for trial in self.trials]
        chosen = int(np.argmin([found.validation_loss for found in fits]))
        return fits[chosen], self.trials[chosen]

    def _grow(self, train: lightgbm.Dataset, validation: lightgbm.Dataset, trial: BoostedTrial, seed: int) -> Trees:
        settings = {
            "objective": "binary",
            "learning_rate": self.learning_rate,
            "min_data_in_leaf": self.min_data_in_leaf,
            "feature_fraction": self.feature_fraction,
            "bagging_fraction": self.bagging_fraction,
            "bagging_freq": 1,
            # The given scores are the start; without any, the prior is learned like the rest.
            "boost_from_average": False,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": torch.get_num_threads(),
            "verbosity": -1,
        } | asdict(trial)
        stop = lightgbm.early_stopping(self.patience, verbose=False)
        booster = lightgbm.train(settings, train, self.rounds, [validation], callbacks=[stop])
        given = validation.get_init_score()
        added = booster.predict(validation.get_data(), raw_score=True, num_iteration=booster.best_iteration)
        losses = [_log_loss(logits, validation.get_label()) for logits in (given, given + added)]
        return Trees(booster, booster.best_iteration, losses[1]) if losses[1] < losses[0] else Trees(None, 0, losses[0])


def _table(inputs: Inputs, given: np.ndarray) -> lightgbm.Dataset:
    """The inputs with the scores that trees are added to; trials share it, so columns are divided into bins once."""
    return lightgbm.Dataset(_columns(inputs), inputs.label.numpy(), init_score=given, free_raw_data=False)


def _columns(inputs: Inputs) -> np.ndarray:
    return np.concatenate([inputs.numeric.numpy(), inputs.extra.numpy()], axis=1)


def _plain(inputs: Inputs) -> Inputs:
    return Inputs(inputs.user, inputs.item, inputs.numeric, inputs.extra[:, :0], inputs.label)


def _log_loss(logits: np.ndarray, label: np.ndarray) -> float:
    return float(F.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(label).double()))
