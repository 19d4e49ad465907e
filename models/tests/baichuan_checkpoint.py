"""A small random checkpoint with the layout of Baichuan2-7B."""

from __future__ import annotations

import math

import torch

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "pad_token_id": 0,
}


def random_checkpoint():
    """Returns all tensors that the files of Baichuan2-7B have, with small sizes."""
    width, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]

    def matrix(rows, columns):
        return torch.randn(rows, columns) / math.sqrt(columns)

    state = {
        "model.embed_tokens.weight": torch.randn(CONFIG["vocab_size"], width),
        "model.norm.weight": 1 + 0.2 * torch.randn(width),
        "lm_head.weight": torch.randn(CONFIG["vocab_size"], width),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        state |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "self_attn.W_pack.weight": matrix(3 * width, width),
                "self_attn.o_proj.weight": matrix(width, width),
                "self_attn.rotary_emb.inv_freq": torch.randn(4),
                "mlp.gate_proj.weight": matrix(ffn, width),
                "mlp.up_proj.weight": matrix(ffn, width),
                "mlp.down_proj.weight": matrix(width, ffn),
                "input_layernorm.weight": 1 + 0.2 * torch.randn(width),
                "post_attention_layernorm.weight": 1 + 0.2 * torch.randn(width),
            }.items()
        }
    return state
