"""Folders of every supported kind of language model are read; the models here have random weights."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5Model,
)

from learn.content import ceg, embedding_store, language_model
from learn.content.embedding_store import StoreConfig
from learn.serving import fixture_bundles

PROMPTS = ["a lamp", "a much longer text about a kettle, tea and two cups of water", "tea"]
COMMON = {"vocab_size": fixture_bundles.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = LlamaConfig(
    **COMMON, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2
)
BERT = BertConfig(**COMMON, num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2)


def folder_with_tokenizer(folder):
    folder.mkdir(exist_ok=True)
    fixture_bundles.byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def encode_in_memory(model, folder):
    return ceg.wrap("same", model, folder / "tokenizer.json", 24, 0).encode(PROMPTS)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_decoder_with_a_head_is_read_from_one_file_or_several(tmp_path, n_shards):
    folder = folder_with_tokenizer(tmp_path / "llama")
    model = LlamaForCausalLM(LLAMA).eval()
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=n_bytes // n_shards + 30_000)
    encoder = ceg.load(folder, 24, ceg.LoadConfig(device="cpu"))
    assert len(encoder.weights) == n_shards and encoder.name == "llama"
    np.testing.assert_allclose(encoder.encode(PROMPTS), encode_in_memory(model.model, folder), atol=1e-6)
    # Every weights file is part of the key.
    key = embedding_store.cache_key(encoder, PROMPTS)
    encoder.weights[-1].write_bytes(encoder.weights[-1].read_bytes() + b" ")
    assert embedding_store.cache_key(encoder, PROMPTS) != key


def test_embeddings_of_a_bert_folder_are_stored(tmp_path):
    folder = folder_with_tokenizer(tmp_path / "bert")
    model = BertForMaskedLM(BERT).eval()
    model.save_pretrained(folder)
    encoder = ceg.load(folder, 24, ceg.LoadConfig(device="cpu"))
    got = embedding_store.encode_cached(encoder, PROMPTS, tmp_path / "cache", StoreConfig(title=None))
    np.testing.assert_allclose(got, encode_in_memory(model.bert, folder), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_loaded_in_the_requested_dtype(tmp_path, dtype):
    folder = folder_with_tokenizer(tmp_path / "llama")
    LlamaModel(LLAMA).save_pretrained(folder)
    encoder = ceg.load(folder, 24, ceg.LoadConfig(device="cpu", dtype=dtype))
    assert encoder.dtype == language_model.DTYPES[dtype]
    exact = ceg.load(folder, 24, ceg.LoadConfig(device="cpu")).encode(PROMPTS)
    cosine = (encoder.encode(PROMPTS) * exact).sum(axis=1)
    assert cosine.min() > (0.999 if dtype == "bfloat16" else 0.99999)


def write_gguf(path, model):
    """Writes a Llama in llama.cpp's layout: its own tensor names, queries and keys with interleaved rotary pairs."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in state.items():
        name = name.removesuffix(".weight")
        for hf_name, gguf_name in parts.items():
            if name.endswith(hf_name):
                name = f"blk.{name.split('.')[1]}.{gguf_name}"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-1])
        array = tensor.numpy()
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names.get(name, name)}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_read_and_a_second_one_in_the_folder_is_refused(tmp_path):
    folder = folder_with_tokenizer(tmp_path / "gguf")
    model = LlamaModel(LLAMA).eval()
    write_gguf(folder / "tiny.gguf", model)
    encoder = ceg.load(folder, 24, ceg.LoadConfig(device="cpu"))
    assert encoder.weights == (folder / "tiny.gguf",)
    np.testing.assert_allclose(encoder.encode(PROMPTS), encode_in_memory(model, folder), atol=1e-6)
    (folder / "tiny.gguf").rename(folder / "a.gguf")
    (folder / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"2 GGUF files, expected one: a\.gguf, b\.gguf"):
        ceg.load(folder, 24)


@pytest.mark.parametrize(("kind", "dtype"), [("sharded", "bfloat16"), ("encoder", "float32"), ("gguf", "float16")])
def test_stored_embeddings_are_found_without_loading_the_model(tmp_path, monkeypatch, kind, dtype):
    folder = folder_with_tokenizer(tmp_path / kind)
    if kind == "gguf":
        write_gguf(folder / "tiny.gguf", LlamaModel(LLAMA).eval())
    else:
        model = LlamaModel(LLAMA) if kind == "sharded" else BertModel(BERT)
        model.save_pretrained(folder, max_shard_size=60_000)
    config = ceg.LoadConfig(device="cpu", dtype=dtype)
    source = ceg.EncoderFolder(folder, 24, config)
    assert embedding_store.cache_key(source, PROMPTS) == embedding_store.cache_key(
        ceg.load(folder, 24, config), PROMPTS
    )
    # The identity of the model depends on max_tokens, but not on the dtype.
    others = [ceg.EncoderFolder(folder, 24), ceg.EncoderFolder(folder, 25, config)]
    same, longer = (other.identity.hexdigest() == source.identity.hexdigest() for other in others)
    assert same and not longer
    first = embedding_store.encode_cached(source, PROMPTS, tmp_path / "cache", StoreConfig(title=None))
    monkeypatch.setattr(language_model, "read", lambda *_: pytest.fail("the weights were read"))
    np.testing.assert_array_equal(embedding_store.encode_cached(source, PROMPTS, tmp_path / "cache"), first)


def test_a_missing_tensor_is_an_error_and_never_initialised_at_random(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    # The pooler does not affect the hidden states, so it may be missing.
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    language_model.read(tmp_path, "float32")
    del body["encoder.layer.1.output.dense.weight"]
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of the model, the first is encoder\.layer\.1\.output"):
        language_model.read(tmp_path, "float32")


def test_a_missing_shard_and_an_invalid_index_are_refused(tmp_path):
    LlamaModel(LLAMA).save_pretrained(tmp_path, max_shard_size=60_000)
    first, *_rest = language_model.weight_files(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{first.name} is missing, but the index of shards names it"):
        language_model.read(tmp_path, "float32")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of shards"):
        language_model.read(tmp_path, "float32")


def test_an_encoder_decoder_model_and_an_unknown_dtype_are_refused(tmp_path):
    config = T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        language_model.read(tmp_path, "float32")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of float32"):
        language_model.read(tmp_path, "int8")


def test_a_missing_tokenizer_is_an_error_that_names_the_file(tmp_path):
    LlamaModel(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        ceg.load(tmp_path, 24)


def test_a_baichuan_model_is_read_from_bin_and_safetensors_files(tmp_path):
    from test_baichuan import CONFIG, random_checkpoint

    state = random_checkpoint()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"model_type": "baichuan", "vocab_size": 512}))
    state |= {name: torch.randn(512, CONFIG["hidden_size"]) for name in state if state[name].shape[0] == 61}
    folder_with_tokenizer(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    first = ceg.load(tmp_path, 24, ceg.LoadConfig(device="cpu")).encode(PROMPTS)
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: state[name] for name in held}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    second = ceg.load(tmp_path, 24, ceg.LoadConfig(device="cpu"))
    assert len(second.weights) == 2
    np.testing.assert_array_equal(second.encode(PROMPTS), first)
    (tmp_path / "b.safetensors").unlink()
    index["weight_map"] = {name: "a.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="tensors are in no weights file, the first is "):
        ceg.load(tmp_path, 24)


def test_a_damaged_file_is_named_in_the_error(tmp_path):
    folder = folder_with_tokenizer(tmp_path / "llama")
    LlamaForCausalLM(LLAMA).save_pretrained(folder)

    def refusal(name, content):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content if content is not None else before[: len(before) // 2])
        with pytest.raises(ValueError, match=str(folder)) as error:
            ceg.load(folder, 24)
        (folder / name).write_bytes(before)
        return str(error.value)

    assert "weights cannot be read" in refusal("model.safetensors", None)
    assert "cannot be read as a tokenizer" in refusal("tokenizer.json", None)
    assert "config.json: Expecting" in refusal("config.json", b"{")
    assert "config.json: expected an object, got list" in refusal("config.json", b"[]")
    ceg.load(folder, 24)
