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
from learn.content.standardise import Method
from learn.models.pch import Pch, PchConfig
from learn.models.recommender import ContentMean, Ids, IdTowers, Learn, Recommender
from learn.run_settings import EncoderSettings
from learn.toml_config import strict
from learn.training_run import Prompts
from research.baselines.hstu import Hstu, HstuConfig
from research.baselines.lora import LoraEncoder, LoraSizes
from research.baselines.sasrec import SasRec, SasRecConfig


@dataclass(frozen=True)
class Arm:
    """One model of a study as its TOML describes it. `sizes` and `train` override single values of the defaults."""

    kind: Literal["popularity", "content-mean", "sasrec", "hstu", "id-towers", "learn", "lora"]
    label: str
    family: Literal["baseline", "learn", "ablation"] = "baseline"
    sizes: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    # The name of the content in the study, how its embeddings are standardised, and whether ids are learned too.
    content: str = "minilm"
    standardise: Method = "whiten"
    ids: Ids = "none"
    # The model that an ablation is compared with, and the question that it answers.
    reference: str = ""
    question: str = ""
    # Only the first `n_seeds` seeds of the study.
    n_seeds: int | None = None


@dataclass(frozen=True)
class Content:
    """What content embeddings are made from: the encoder, and whether texts contain keywords."""

    encoder: str
    keywords: bool = False


SIZES = {
    "sasrec": SasRecConfig,
    "hstu": HstuConfig,
    "id-towers": PchConfig,
    "learn": PchConfig,
    "lora": LoraSizes,
}


@dataclass(frozen=True)
class Inputs:
    """What all runs of a study read: the prepared data and, by name of content, a file [I,C] and the encoder's folder.

    The name of a file contains the digest of the weights, tokenizer and texts that it was made from.
    """

    dataset: data.Dataset
    content: Mapping[str, Path]
    encoders: Mapping[str, Path]


def build(arm: Arm, inputs: Inputs) -> Recommender:
    """The model of an arm with random weights."""
    n_items = len(inputs.dataset.item_ids)
    if arm.kind == "sasrec":
        return SasRec(strict(SasRecConfig, arm.sizes, "sizes"), n_items)
    if arm.kind == "hstu":
        return Hstu(strict(HstuConfig, arm.sizes, "sizes"), n_items)
    if arm.kind == "content-mean":
        return ContentMean(_content(arm, inputs), PchConfig().max_history)
    if arm.kind == "lora":
        sizes = strict(LoraSizes, arm.sizes, "sizes")
        encoder = ceg.load(inputs.encoders[arm.content], EncoderSettings.max_tokens)
        return LoraEncoder(sizes, encoder, Prompts(inputs.dataset.texts))
    sizes = strict(PchConfig, arm.sizes, "sizes")
    if arm.kind == "id-towers":
        return IdTowers(Pch(sizes), n_items)
    content = _content(arm, inputs)
    # Variant 3 has no item tower, so the user tower's outputs have to be in the space of the content embeddings.
    out_dim = content.shape[1] if sizes.item_tower == "content" else sizes.out_dim
    sizes = replace(sizes, content_dim=content.shape[1], out_dim=out_dim)
    return Learn(Pch(sizes), content, arm.standardise, arm.ids)


def content_name(arm: Arm, inputs: Inputs) -> str | None:
    """The name of the content that the model reads, with its digest; None if it reads none."""
    return inputs.content[arm.content].stem if arm.kind in ("content-mean", "learn") else None


def _content(arm: Arm, inputs: Inputs) -> Tensor:
    return torch.from_numpy(np.load(inputs.content[arm.content]).astype(np.float32))
