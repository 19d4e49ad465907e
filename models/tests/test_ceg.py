"""The encoder: order, padding, truncation, and a cache that forgets nothing that matters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from learn import ceg, fixture

PROMPTS = ["a lamp", "a much longer text about a kettle, tea and two cups of water", "tea", "a lamp"]


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "weights").write_bytes(b"stands for the weights in the key")
    return dataclasses.replace(fixture.build(tmp_path / "tokenizer.json").encoder, weights=tmp_path / "weights")


def test_rows_come_back_in_order_whatever_was_batched_with_them(encoder):
    together = encoder.encode(PROMPTS)
    singly = np.concatenate([encoder.encode([prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(together, singly, atol=1e-6)
    assert np.abs(together[0] - together[2]).max() > 1e-2


def test_content_is_the_masked_mean_of_the_last_hidden_states(encoder):
    (ids,) = encoder.tokenize([PROMPTS[1]])
    with torch.no_grad():
        hidden = encoder.graph.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    np.testing.assert_allclose(encoder.encode([PROMPTS[1]])[0], (mean / mean.norm()).numpy(), atol=1e-6)


def test_long_text_is_cut_on_the_right(encoder):
    (long,) = encoder.tokenize([PROMPTS[1] * 20])
    (short,) = encoder.tokenize([PROMPTS[1]])
    assert len(long) == encoder.max_tokens > len(short)
    assert long[: len(short) - 1] == short[:-1]


def test_the_second_call_reads_the_cache(encoder, tmp_path, monkeypatch):
    first = ceg.encode_cached(encoder, PROMPTS, tmp_path / "cache")

    def refuse(*_arguments, **_options):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ceg.Encoder, "encode", refuse)
    assert np.array_equal(ceg.encode_cached(encoder, PROMPTS, tmp_path / "cache"), first)
    with pytest.raises(AssertionError, match="encoded again"):
        ceg.encode_cached(encoder, PROMPTS[:2], tmp_path / "cache")


def test_the_key_covers_everything_that_the_embedding_depends_on(encoder):
    keys = {ceg.cache_key(encoder, PROMPTS)}
    keys.add(ceg.cache_key(encoder, PROMPTS[::-1]))
    keys.add(ceg.cache_key(encoder, ["a lam", "p" + PROMPTS[1], *PROMPTS[2:]]))
    keys.add(ceg.cache_key(dataclasses.replace(encoder, max_tokens=7), PROMPTS))
    encoder.weights.write_bytes(b"other weights")
    keys.add(ceg.cache_key(encoder, PROMPTS))
    encoder.tokenizer_path.write_text("{}")
    keys.add(ceg.cache_key(encoder, PROMPTS))
    assert len(keys) == 6


def test_missing_files_say_which_command_fetches_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make setup"):
        ceg.load(tmp_path, 16)
