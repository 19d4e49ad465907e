"""The models of a study: how a TOML file describes each of them (an arm), and how it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from learn import data
from learn.content import ceg
from learn.content.standardise import Method, fit
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import ContentMean, Ids, IdTowers, Learn, Recommender
from learn.run_settings import EncoderSettings
from learn.toml_config import strict
from learn.training_run import Prompts
from research.baselines.hstu import Hstu, HstuConfig
from research.baselines.item_to_item import EaseConfig, Fitted, ItemKnnConfig, fit_best
from research.baselines.lora import LoraEncoder, LoraSizes
from research.baselines.relative_towers import RelativeLearn, RelativePch, RelativePchConfig
from research.baselines.sasrec import SasRec, SasRecConfig
from research.baselines.sasrec_text import SasRecTextConfig, sasrec_text
from research.baselines.unisrec import UniSRecConfig, unisrec

Kind = Literal[
    "popularity",
    "ease",
    "item-knn",
    "content-mean",
    "sasrec",
    "hstu",
    "id-towers",
    "sasrec-text",
    "unisrec",
    "learn",
    "learn-relative",
    "lora",
]


@dataclass(frozen=True)
class Arm:
    """One model of a study as its TOML describes it. `sizes` and `train` override single values of the defaults."""

    kind: Kind
    label: str
    family: Literal["baseline", "learn", "ablation"] = "baseline"
    sizes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    # The name of the content in the study, how its embeddings are standardised, and whether ids are learned too.
    content: str = "minilm"
    standardise: Method = "whiten"
    ids: Ids = "none"
    # The probability that an item loses its id in training; only for models with text as well.
    id_dropout: float = 0.0
    # The numbers of EASE's factors beside the model's own vectors (`ease_skip`); 0 for none.
    ease_dim: int = 0
    # The model that an ablation is compared with, and the question that it answers.
    reference: str = ""
    question: str = ""
    # Only the first `n_seeds` seeds of the study.
    n_seeds: int | None = None

    def shown(self) -> dict[str, str | None]:
        """What a report says of the model. A run records it, but does not depend on it."""
        reference, question = self.reference or None, self.question or None
        return {"label": self.label, "family": self.family, "reference": reference, "question": question}


@dataclass(frozen=True)
class Content:
    """What content embeddings are made from: the encoder, and whether texts contain keywords."""

    encoder: str
    keywords: bool = False


# For "ease" and "item-knn", the grid that is tried on validation.
SIZES = {
    "ease": EaseConfig,
    "item-knn": ItemKnnConfig,
    "sasrec": SasRecConfig,
    "hstu": HstuConfig,
    "id-towers": PchConfig,
    "sasrec-text": SasRecTextConfig,
    "unisrec": UniSRecConfig,
    "learn": PchConfig,
    "learn-relative": RelativePchConfig,
    "lora": LoraSizes,
}
# Kinds that are computed from counts: `fit_item_to_item` builds them, and not `build`.
ITEM_TO_ITEM = ("ease", "item-knn")
# Kinds whose result is the same for every seed.
WITHOUT_RANDOMNESS = ("popularity", *ITEM_TO_ITEM, "content-mean")
# Kinds that read content embeddings.
WITH_CONTENT = ("content-mean", "sasrec-text", "unisrec", "learn", "learn-relative")

# Kinds of trained models that can have EASE's factors beside their vectors (`Arm.ease_dim`).
WITH_EASE = ("sasrec", "hstu", "id-towers", "sasrec-text", "unisrec", "learn", "learn-relative")


@dataclass(frozen=True)
class Inputs:
    """What all runs of a study read: the prepared data and, by name of content, a file [I,C] and the encoder's folder.

    The name of a file contains the digest of the weights, tokenizer and texts that it was made from.
    """

    dataset: data.Dataset
    content: Mapping[str, Path]
    encoders: Mapping[str, Path]


def fit_item_to_item(arm: Arm, dataset: data.Dataset, split: data.Split) -> Fitted:
    """The matrix of an arm of a kind in `ITEM_TO_ITEM`: every setting of its grid is tried on validation."""
    return fit_best(strict(SIZES[arm.kind], arm.sizes, "sizes"), dataset, split)


def build(arm: Arm, inputs: Inputs) -> Recommender:
    """The model of an arm with random weights, for the kinds that are trained and for "content-mean"."""
    n_items = len(inputs.dataset.item_ids)
    if arm.kind == "sasrec":
        return SasRec(strict(SasRecConfig, arm.sizes, "sizes"), n_items)
    if arm.kind == "hstu":
        return Hstu(strict(HstuConfig, arm.sizes, "sizes"), n_items)
    if arm.kind == "content-mean":
        content = content_of(arm, inputs)
        return ContentMean(fit(content, arm.standardise).apply(content), PchConfig().max_history)
    if arm.kind == "sasrec-text":
        return sasrec_text(strict(SasRecTextConfig, arm.sizes, "sizes"), content_of(arm, inputs), arm.standardise)
    if arm.kind == "unisrec":
        return unisrec(strict(UniSRecConfig, arm.sizes, "sizes"), content_of(arm, inputs), arm.standardise)
    if arm.kind == "lora":
        sizes = strict(LoraSizes, arm.sizes, "sizes")
        encoder = ceg.load(inputs.encoders[arm.content], EncoderSettings.max_tokens)
        return LoraEncoder(sizes, encoder, Prompts(inputs.dataset.texts))
    sizes = strict(SIZES[arm.kind], arm.sizes, "sizes")
    if arm.kind == "id-towers":
        return IdTowers(Pch(sizes), n_items)
    content = content_of(arm, inputs)
    # Variant 3 has no item tower, so the user tower's outputs have to be in the space of the content embeddings.
    out_dim = content.shape[1] if sizes.item_tower == "content" else sizes.out_dim
    # The skip is attached to the trained towers (`study`).
    sizes = replace(sizes, content_dim=content.shape[1], out_dim=out_dim, skip_dim=0)
    if isinstance(sizes, RelativePchConfig):
        return RelativeLearn(RelativePch(sizes), content, arm.standardise, arm.ids, arm.id_dropout)
    return Learn(Pch(sizes), content, arm.standardise, arm.ids, arm.id_dropout)


def content_name(arm: Arm, inputs: Inputs) -> str | None:
    """The name of the content that the model reads, with its digest; None if it reads none."""
    return inputs.content[arm.content].stem if arm.kind in WITH_CONTENT else None


def content_of(arm: Arm, inputs: Inputs) -> Tensor:
    """The content embeddings that the model reads, fp32 [I,C], as the encoder gave them."""
    return torch.from_numpy(np.load(inputs.content[arm.content]).astype(np.float32))
