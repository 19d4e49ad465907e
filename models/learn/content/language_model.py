"""A folder with a language model -> the model in memory, and the files that it depends on.

Read without running code from the folder, and without a network:

    model.safetensors                        one file (so does pytorch_model.bin)
    model.safetensors.index.json + shards    several (so does pytorch_model.bin.index.json)
    NAME.gguf                                quantized or not, opened up by transformers; its architectures only
    config.json of a Baichuan                through `baichuan`
    the two files of all-MiniLM-L6-v2        no config.json: set-up fetches those, `minilm` knows the sizes

Encoders and decoder-only models are fine; what needs a second input (T5, BART) is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertModel

from learn.content import baichuan, minilm

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# What a checkpoint may lack: these take no part in the last hidden states.
_UNUSED = ("pooler.", "lm_head.", "score.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory with what is known of it. `files` hold weights, and the config where there is one."""

    name: str
    model: nn.Module
    pad_id: int
    weights: tuple[Path, ...]
    config: Path | None


def read(folder: Path, dtype: str) -> Checkpoint:
    """`dtype` is a name of DTYPES. Raises FileNotFoundError or ValueError, each with the path and the reason."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    files = weight_files(folder)
    config = config_file(folder)
    if config is None and files[0].suffix != ".gguf":
        return Checkpoint(minilm.NAME, _minilm(files[0], DTYPES[dtype]), minilm.PAD_ID, files, None)
    raw = {} if config is None else _config(config)
    load = baichuan.load if baichuan.is_baichuan(raw) else _auto
    try:
        model = load(folder, files, DTYPES[dtype])
    except (ValueError, OSError):
        raise
    except Exception as error:  # Each format's reader has errors of its own, and no two share a parent.
        raise ValueError(f"{folder}: its weights cannot be read: {error}") from error
    pad_id = getattr(model.config, "pad_token_id", None)
    return Checkpoint(folder.resolve().name, model, pad_id if pad_id is not None else 0, files, config)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files with the weights, in the order of their names; raises FileNotFoundError where one is missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            files = tuple(folder / file for file in sorted(set(_index(index).values())))
            return _all_there(files)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise ValueError(f"{folder}: {len(ggufs)} GGUF files, expected one: {', '.join(path.name for path in ggufs)}")
    if ggufs:
        return (ggufs[0],)
    raise FileNotFoundError(
        f"{folder} holds no model.safetensors (or shards with their index, or a .gguf file); "
        "`make setup` fetches the default encoder"
    )


def config_file(folder: Path) -> Path | None:
    """The model's config.json, or None in a folder that has none."""
    path = folder / CONFIG
    return path if path.is_file() else None


def tokenizer_file(folder: Path) -> Path:
    """Raises FileNotFoundError with what to do about it."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; `make setup` fetches that of the default encoder, and "
            "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) makes one from older files"
        )
    return path


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no index of shards: {error!r}") from error


def _all_there(files: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is named by the index of shards and is missing")
    return files


def _auto(folder: Path, files: tuple[Path, ...], dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"gguf_file": files[0].name} if files[0].suffix == ".gguf" else {}
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
    )
    # transformers fills what is missing with random numbers and goes on.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED))
    if missing:
        raise ValueError(f"{folder}: lacks {len(missing)} tensors of its model, the first is {missing[0]}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{folder}: {model.config.model_type} has an encoder and a decoder; expected one of the two")
    return model


def _minilm(weights: Path, dtype: torch.dtype) -> nn.Module:
    model = BertModel(minilm.config(), add_pooling_layer=False)
    missing, _unused = model.load_state_dict(load_file(weights), strict=False)
    if missing:
        raise ValueError(f"{weights}: lacks {len(missing)} tensors of all-MiniLM-L6-v2, the first is {missing[0]}")
    return model.to(dtype)
