"""A checkpoint of Baichuan2-7B -> a `LlamaModel`, without running any code from the checkpoint.

The model is a Llama in another layout: the projections of queries, keys and values are one matrix `W_pack` [3*D,D], in
that order, and the output head is a "NormHead", which scales its rows to length 1. Everything else (RMSNorm before each
part, rotary positions on halves, SwiGLU without biases, no grouped queries) is as in Llama, under the same names.
Source of the layout: config.json and modeling_baichuan.py of baichuan-inc/Baichuan2-7B-Base.

The 13B models use ALiBi instead of rotary positions, so they cannot be loaded as a Llama and are rejected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

_PACKED = ".self_attn.W_pack.weight"
_QUERY_KEY_VALUE = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight")
_PREFIX = "model."
# The head predicts tokens, which we do not need; rotary frequencies are computed from the config.
_UNUSED = ("lm_head.weight", ".rotary_emb.inv_freq")


def is_baichuan(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a Baichuan model."""
    return config.get("model_type") == "baichuan"


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Converts Baichuan's config.json. Raises ValueError if the model cannot be a Llama or a setting is missing."""
    if "max_position_embeddings" not in config:
        raise ValueError("this Baichuan uses ALiBi (13B) and cannot be loaded as a Llama; use a 7B model")
    shared_names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
    )
    missing = [name for name in shared_names if name not in config]
    if missing:
        raise ValueError(f"the Baichuan config.json lacks {missing[0]}")
    tokens = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in config}
    return LlamaConfig(**{name: config[name] for name in shared_names}, **tokens)


def llama_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a Baichuan state dict to that of a `LlamaModel`, without the head. Parts of `W_pack` are views."""
    converted = {}
    for name, tensor in state.items():
        if name.endswith(_UNUSED):
            continue
        if not name.startswith(_PREFIX):
            raise ValueError(f"{name} is not a tensor of a Baichuan checkpoint")
        name = name.removeprefix(_PREFIX)
        if name.endswith(_PACKED):
            layer = name.removesuffix(_PACKED)
            converted |= {
                layer + part: rows for part, rows in zip(_QUERY_KEY_VALUE, _split_packed(name, tensor), strict=True)
            }
        else:
            converted[name] = tensor
    return converted


def _split_packed(name: str, packed: Tensor) -> tuple[Tensor, ...]:
    if packed.ndim != 2 or packed.shape[0] != 3 * packed.shape[1]:
        raise ValueError(f"{name} has the shape {list(packed.shape)}, expected [3*D,D]")
    return packed.chunk(3, dim=0)


def load(folder: Path, files: Sequence[Path], dtype: torch.dtype) -> LlamaModel:
    """Loads the model in `dtype`. Files are read one by one, so memory holds the model and one file."""
    config = llama_config(json.loads((folder / "config.json").read_text()))
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaModel(config)
    finally:
        torch.set_default_dtype(default_dtype)
    missing = set(model.state_dict())
    for path in files:
        state = llama_state(_read_state(path))
        unknown = sorted(set(state) - missing)
        if unknown:
            raise ValueError(f"{path}: {unknown[0]} is not a tensor of this model, or an earlier file has it too")
        model.load_state_dict(state, strict=False)
        missing -= set(state)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are in no weights file, the first is {sorted(missing)[0]}")
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
