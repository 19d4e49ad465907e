"""Reads `expected_models.toml`: the models that the report waits for, in the order of its tables."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from research.record_files import Strict

FILE = Path(__file__).with_name("expected_models.toml")


class Model(Strict):
    """A model of a study and its label in the report."""

    id: str
    label: str


class Ablation(Model):
    """A changed model, and the question that the change answers.

    `study` is the one that waits for it, in the words of the claims. `budget` is set where the model was trained for so
    short a time that its figures show the time and not the model. It says why, with the placeholders {steps} and
    {users} for the settings of the run.
    """

    question: str
    study: Literal["main", "main-by-time"] = "main"
    budget: str = ""


class ExpectedModels(Strict):
    """The file. `remarks` has a person's remarks on questions."""

    rivals: list[str]
    models: list[Model]
    ablations: list[Ablation]
    remarks: dict[str, str]

    def label(self, model: str) -> str:
        """The label of a model without a run."""
        return next((known.label for known in (*self.models, *self.ablations) if known.id == model), f"`{model}`")

    def budget(self, model: str, config: Mapping[str, Any]) -> str:
        """Why the budget decides over this model, in the numbers of a run's config; "" if it does not."""
        reason = next((known.budget for known in self.ablations if known.id == model), "")
        training = config.get("train", {})
        return reason.format(steps=f"{training.get('steps', 0):,}", users=training.get("users", 0)) if reason else ""


@cache
def expected_models() -> ExpectedModels:
    """The content of the file."""
    return ExpectedModels.model_validate(tomllib.loads(FILE.read_text(encoding="utf-8")))
