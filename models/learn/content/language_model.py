"""A folder with a language model -> the model in memory, and the files that it depends on.

No code from the folder is run, and the network is not used. The supported formats are:

    model.safetensors                        one file (or pytorch_model.bin)
    model.safetensors.index.json + shards    several (or pytorch_model.bin.index.json)
    NAME.gguf                                quantized or not, if transformers can read the architecture
    config.json of a Baichuan                with any weights above except GGUF; see `baichuan`
    the two files of all-MiniLM-L6-v2        without config.json, as set-up fetches them; see `minilm`

Encoder-only and decoder-only models are supported; encoder-decoder models (T5, BART) are rejected.
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
# Tensors that a checkpoint may lack, because the last hidden states do not depend on them.
_UNUSED = ("pooler.", "lm_head.", "score.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, with the files that it was loaded from; `config` is None if there is no config.json."""

    name: str
    model: nn.Module
    pad_id: int
    weights: tuple[Path, ...]
    config: Path | None


def read(folder: Path, dtype: str) -> Checkpoint:
    """Loads the model; `dtype` is a key of DTYPES.

    Raises FileNotFoundError, OSError or ValueError if the model cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    files = weight_files(folder)
    config = config_file(folder)
    if config is None and files[0].suffix != ".gguf":
        return Checkpoint(minilm.NAME, _load_minilm(files[0], DTYPES[dtype]), minilm.PAD_ID, files, None)
    raw = {} if config is None else _read_config(config)
    load = baichuan.load if baichuan.is_baichuan(raw) else _load_with_transformers
    try:
        model = load(folder, files, DTYPES[dtype])
    except (ValueError, OSError):
        raise
    except Exception as error:  # Each format's reader has its own errors, without a common base class.
        raise ValueError(f"{folder}: the weights cannot be read: {error}") from error
    pad_id = getattr(model.config, "pad_token_id", None)
    return Checkpoint(folder.resolve().name, model, pad_id if pad_id is not None else 0, files, config)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights files, sorted by name. Raises FileNotFoundError if one is missing, ValueError if ambiguous."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return (folder / name,)
        if index.is_file():
            files = tuple(folder / file for file in sorted(set(_read_index(index).values())))
            return _require_files(files)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) > 1:
        raise ValueError(f"{folder}: {len(ggufs)} GGUF files, expected one: {', '.join(path.name for path in ggufs)}")
    if ggufs:
        return (ggufs[0],)
    raise FileNotFoundError(
        f"{folder} has no model.safetensors (or shards with their index, or a .gguf file); "
        "`make setup` fetches the default encoder"
    )


def config_file(folder: Path) -> Path | None:
    """The path of config.json, or None if the folder has none."""
    path = folder / CONFIG
    return path if path.is_file() else None


def tokenizer_file(folder: Path) -> Path:
    """The path of tokenizer.json. Raises FileNotFoundError if it is missing."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; `make setup` fetches the one of the default encoder, and "
            "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) creates one from older files"
        )
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {error!r}") from error


def _require_files(files: tuple[Path, ...]) -> tuple[Path, ...]:
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, but the index of shards names it; copy it into the folder")
    return files


def _load_with_transformers(folder: Path, files: tuple[Path, ...], dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"gguf_file": files[0].name} if files[0].suffix == ".gguf" else {}
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype, output_loading_info=True, **options
    )
    # transformers would silently fill missing tensors with random numbers.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED))
    if missing:
        raise ValueError(f"{folder}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{folder}: {model.config.model_type} is an encoder-decoder model; use an encoder-only or decoder-only one"
        )
    return model


def _load_minilm(weights: Path, dtype: torch.dtype) -> nn.Module:
    model = BertModel(minilm.config(), add_pooling_layer=False)
    missing, _unused = model.load_state_dict(load_file(weights), strict=False)
    if missing:
        raise ValueError(
            f"{weights}: the file lacks {len(missing)} tensors of all-MiniLM-L6-v2, the first is {missing[0]}"
        )
    return model.to(dtype)
