"""Reads `expected_models.toml`: the models that the report waits for, in the order of its tables."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

from research.record_files import Strict

FILE = Path(__file__).with_name("expected_models.toml")


class Model(Strict):
    """A model of a study and its label in the report."""

    id: str
    label: str


class Ablation(Model):
    """A changed model, and the question that the change answers."""

    question: str


class ExpectedModels(Strict):
    """The file. `remarks` has a person's remarks on questions."""

    rivals: list[str]
    models: list[Model]
    ablations: list[Ablation]
    remarks: dict[str, str]

    def label(self, model: str) -> str:
        """The label of a model without a run."""
        return next((known.label for known in (*self.models, *self.ablations) if known.id == model), f"`{model}`")


@cache
def expected_models() -> ExpectedModels:
    """The content of the file."""
    return ExpectedModels.model_validate(tomllib.loads(FILE.read_text(encoding="utf-8")))
