"""One TOML file for all settings of a run: what is held out, the towers' sizes, how they and the head are trained.

A file names only what differs from the defaults, as `configs/shipped.toml` does for the shipped bundle. `configs/` has
one file for each published setting.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from learn.content.standardise import Method
from learn.data import SplitConfig, TimeSplitConfig
from learn.data.actions import ActionThresholds
from learn.data.splits import SplitSettings
from learn.models.cvr import CvrConfig
from learn.models.pch import PchConfig
from learn.toml_config import strict
from learn.training.cvr_config import CvrTrainConfig
from learn.training.train_config import TrainConfig


@dataclass(frozen=True)
class PrepareSettings:
    """How `learn prepare` reads and filters the raw files."""

    # At most this many MovieLens tags per item become keywords, only tags from before the split. 0: none.
    max_keywords: int = 0
    # Users and items with fewer events are removed, repeatedly, until all that remain have at least this many.
    min_user_events: int = 0
    min_item_events: int | None = None
    # The item fields that are used as text. None: title, category and brand for public data, all fields for your own.
    text_fields: list[str] | None = None
    memory_mb: int = 1024


@dataclass(frozen=True)
class EncoderSettings:
    """How the frozen language model runs."""

    max_tokens: int = 128
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    # "auto" uses CUDA if it is available; else name a device: "cpu", "cuda:1" and so on.
    device: str = "auto"
    # "int8": the quantised graph that `export` writes also computes the content that towers are trained on. It runs on
    # the CPU. "float": in `dtype`.
    precision: Literal["float", "int8"] = "float"
    # A bundle whose int8 graph is used again, so that the content which servers have cached stays valid. Empty: the
    # graph is made anew, with ranges measured on this run's catalogue.
    int8_from: str = ""
    # dtype of the embeddings on disk.
    storage: Literal["float32", "float16"] = "float32"

    def check(self) -> None:
        """Raises ValueError, naming the setting, for one that the others leave without effect.

        It is called once the options of the command line have replaced what is in the file.
        """
        if self.precision == "float":
            if self.int8_from:
                raise ValueError(
                    f'encoder.int8_from is {self.int8_from!r}, but encoder.precision is "float", so that graph would '
                    'not be used: set encoder.precision = "int8" (--encoder-precision int8), or leave out int8_from'
                )
            return
        if self.dtype != "float32":
            raise ValueError(
                f'encoder.dtype is {self.dtype!r}, but encoder.precision = "int8" starts from float32 and computes '
                "fp32 vectors: leave out encoder.dtype (--dtype)"
            )
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f'encoder.device is {self.device!r}, but encoder.precision = "int8" runs on the CPU: leave out '
                "encoder.device"
            )


@dataclass(frozen=True)
class Settings(SplitSettings):
    """The TOML file."""

    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    # The last events of each user are held out; with `time_split`, everything after a point in time instead.
    split: SplitConfig = field(default_factory=SplitConfig)
    time_split: TimeSplitConfig | None = None
    # For `pch.actions`, if the log has values and no column of actions: from which value on a user likes an item, and
    # up to which one the user dislikes it. What is between them is a click.
    actions: ActionThresholds = field(default_factory=ActionThresholds)
    standardise: Method = "scale"
    # "scaffold": while the towers are trained, every item also has vectors that do not depend on its text. They take up
    # what text cannot explain, such as popularity, and are not served. `id_dropout` is how often an item lacks its own.
    ids: Literal["none", "scaffold"] = "none"
    id_dropout: float = 0.5
    pch: PchConfig = field(default_factory=PchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    head: CvrConfig = field(default_factory=CvrConfig)
    cvr: CvrTrainConfig = field(default_factory=CvrTrainConfig)

    def with_seed(self, seed: int | None) -> Settings:
        """These settings with another seed for towers and head; None changes nothing."""
        if seed is None:
            return self
        return replace(self, train=replace(self.train, seed=seed), cvr=replace(self.cvr, seed=seed))


def read_settings(path: Path | None) -> Settings:
    """Settings from a file, or the defaults if `path` is None. ValueError names the file and every wrong key."""
    if path is None:
        return Settings()
    return read_toml(Settings, path)


def read_toml(kind: type, path: Path):
    """An instance of the dataclass `kind` from a TOML file. ValueError names the file and every wrong key."""
    try:
        return strict(kind, tomllib.loads(path.read_text(encoding="utf-8")), "")
    except ValueError as error:  # tomllib.TOMLDecodeError is a ValueError.
        raise ValueError(f"{path}: {error}") from error
