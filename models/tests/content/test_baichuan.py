"""The converted Baichuan model against an independent reference that computes on the packed layout, row by row."""

from __future__ import annotations

import json
import math

import pytest
import torch
from baichuan_checkpoint import CONFIG, random_checkpoint

from learn.content import baichuan


def reference(state, ids):
    """Token ids [s] -> last hidden states [s,D] in float64, straight from the packed layout."""
    state = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
    n_heads, width = CONFIG["num_attention_heads"], CONFIG["hidden_size"]
    dim = width // n_heads

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * state[name]

    def rotated(x, position):
        # Values i and i + dim/2 form a pair, which is rotated by the angle position / 10000^(2i/dim).
        out = x.clone()
        for i in range(dim // 2):
            angle = position / 10000 ** (2 * i / dim)
            left, right = x[i], x[i + dim // 2]
            out[i] = left * math.cos(angle) - right * math.sin(angle)
            out[i + dim // 2] = right * math.cos(angle) + left * math.sin(angle)
        return out

    x = state["embed_tokens.weight"][ids]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        packed = norm(x, prefix + "input_layernorm.weight") @ state[prefix + "self_attn.W_pack.weight"].T
        mixed = torch.zeros_like(x)
        for head in range(n_heads):
            columns = slice(head * dim, (head + 1) * dim)
            query, key, value = (packed[:, part * width :][:, columns] for part in range(3))
            query = torch.stack([rotated(row, position) for position, row in enumerate(query)])
            key = torch.stack([rotated(row, position) for position, row in enumerate(key)])
            for position in range(len(ids)):
                scores = key[: position + 1] @ query[position] / math.sqrt(dim)
                mixed[position, columns] = scores.softmax(0) @ value[: position + 1]
        x = x + mixed @ state[prefix + "self_attn.o_proj.weight"].T
        y = norm(x, prefix + "post_attention_layernorm.weight")
        gate = y @ state[prefix + "mlp.gate_proj.weight"].T
        x = (
            x
            + (gate * gate.sigmoid() * (y @ state[prefix + "mlp.up_proj.weight"].T))
            @ state[prefix + "mlp.down_proj.weight"].T
        )
    return norm(x, "norm.weight")


@pytest.fixture
def loaded(tmp_path):
    """The checkpoint, and the model loaded from its file."""
    state = random_checkpoint()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(state, tmp_path / "pytorch_model.bin")
    return state, baichuan.load(tmp_path, [tmp_path / "pytorch_model.bin"], torch.float32).eval()


@pytest.mark.parametrize("n_tokens", [1, 2, 9])
def test_the_converted_llama_matches_the_packed_layout(loaded, n_tokens):
    state, model = loaded
    ids = torch.randint(1, CONFIG["vocab_size"], (n_tokens,))
    with torch.no_grad():
        got = model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(got, reference(state, ids).float(), atol=2e-5, rtol=1e-5)


def test_w_pack_is_split_into_query_key_and_value_and_the_head_is_dropped():
    packed = torch.arange(3 * 4 * 4.0).reshape(12, 4)
    state = baichuan.llama_state(
        {
            "model.layers.7.self_attn.W_pack.weight": packed,
            "lm_head.weight": torch.ones(2, 4),
            "model.layers.7.self_attn.rotary_emb.inv_freq": torch.ones(2),
            "model.norm.weight": torch.ones(4),
        }
    )
    assert {name: tensor.shape for name, tensor in state.items()} == {
        "layers.7.self_attn.q_proj.weight": (4, 4),
        "layers.7.self_attn.k_proj.weight": (4, 4),
        "layers.7.self_attn.v_proj.weight": (4, 4),
        "norm.weight": (4,),
    }
    assert state["layers.7.self_attn.k_proj.weight"].tolist() == packed[4:8].tolist()


def test_a_checkpoint_that_is_not_baichuan_7b_is_refused():
    with pytest.raises(ValueError, match="ALiBi"):
        baichuan.llama_config({name: value for name, value in CONFIG.items() if name != "max_position_embeddings"})
    with pytest.raises(ValueError, match="lacks hidden_act"):
        baichuan.llama_config({name: value for name, value in CONFIG.items() if name != "hidden_act"})
    with pytest.raises(ValueError, match=r"W_pack.weight has the shape \[8, 4\], expected \[3\*D,D\]"):
        baichuan.llama_state({"model.layers.0.self_attn.W_pack.weight": torch.ones(8, 4)})
    with pytest.raises(ValueError, match=r"transformer\.wte is not a tensor of a Baichuan"):
        baichuan.llama_state({"transformer.wte": torch.ones(2)})
