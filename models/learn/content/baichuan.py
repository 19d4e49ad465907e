"""Baichuan2-7B's checkpoint -> a `LlamaModel`, without running code that came with the checkpoint.

The model is a Llama in another layout: the projections of queries, keys and values are one matrix `W_pack` [3*D,D], in
that order, and the output head is a "NormHead", whose rows are scaled to length 1 before they are used. Everything else
(RMSNorm before each part, rotary positions on halves, SwiGLU without biases, no grouped queries) is Llama's, with its
names. Layout: the files config.json and modeling_baichuan.py of baichuan-inc/Baichuan2-7B-Base.

The 13B models use ALiBi in place of rotary positions, so they are no Llama and are refused.
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
_SPLIT = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight")
_BODY = "model."
# The head makes tokens, not embeddings; the frequencies are computed from the config.
_UNUSED = ("lm_head.weight", ".rotary_emb.inv_freq")


def is_baichuan(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this family."""
    return config.get("model_type") == "baichuan"


def llama_config(config: Mapping[str, Any]) -> LlamaConfig:
    """Baichuan's config.json -> Llama's; raises for the models that are no Llama."""
    if "max_position_embeddings" not in config:
        raise ValueError("this Baichuan has no max_position_embeddings: it uses ALiBi (13B), which is no Llama layout")
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
    )
    missing = [name for name in same if name not in config]
    if missing:
        raise ValueError(f"config.json of a Baichuan lacks {missing[0]}")
    tokens = {name: config[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in config}
    return LlamaConfig(**{name: config[name] for name in same}, **tokens)


def llama_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Baichuan state dict -> that of a `LlamaModel` (no head). The parts of `W_pack` are views, not copies."""
    converted = {}
    for name, tensor in state.items():
        if name.endswith(_UNUSED):
            continue
        if not name.startswith(_BODY):
            raise ValueError(f"{name} is no tensor of a Baichuan checkpoint")
        name = name.removeprefix(_BODY)
        if name.endswith(_PACKED):
            layer = name.removesuffix(_PACKED)
            converted |= {layer + part: rows for part, rows in zip(_SPLIT, _thirds(name, tensor), strict=True)}
        else:
            converted[name] = tensor
    return converted


def _thirds(name: str, packed: Tensor) -> tuple[Tensor, ...]:
    if packed.ndim != 2 or packed.shape[0] != 3 * packed.shape[1]:
        raise ValueError(f"{name} has the shape {list(packed.shape)}, expected [3*D,D]")
    return packed.chunk(3, dim=0)


def load(folder: Path, files: Sequence[Path], dtype: torch.dtype) -> LlamaModel:
    """The model in `dtype`. One file is read at a time, so memory holds the model and one file."""
    config = llama_config(json.loads((folder / "config.json").read_text()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = LlamaModel(config)
    finally:
        torch.set_default_dtype(before)
    missing = set(model.state_dict())
    for path in files:
        state = llama_state(_read(path))
        unknown = sorted(set(state) - missing)
        if unknown:
            raise ValueError(f"{path}: {unknown[0]} is a second time here, or no tensor of this model")
        model.load_state_dict(state, strict=False)
        missing -= set(state)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are in no file, the first is {sorted(missing)[0]}")
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
