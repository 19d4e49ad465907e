"""The encoder keeps order, pads and truncates; its store reuses only matching embeddings and resumes after a kill."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from learn.content import ceg, embedding_store
from learn.content.batching import BatchConfig
from learn.content.embedding_store import StoreConfig
from learn.content.encoder_graph import cast_weights
from learn.serving import fixture_bundles

PROMPTS = ["a lamp", "a much longer text about a kettle, tea and two cups of water", "tea", "a lamp"]
QUIET = StoreConfig(title=None)


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "weights").write_bytes(b"stands for the weights in the key")
    return dataclasses.replace(
        fixture_bundles.build(tmp_path / "tokenizer.json").encoder, weights=(tmp_path / "weights",)
    )


def record_batch_sizes(encoder):
    """Returns a list to which each run of the encoder's graph appends the number of items in its batch."""
    sizes = []
    encoder.graph.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_embeddings_keep_the_order_of_prompts_and_do_not_depend_on_the_batch(encoder):
    together = encoder.encode(PROMPTS)
    one_by_one = np.concatenate([encoder.encode([prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(together, one_by_one, atol=1e-6)
    assert np.abs(together[0] - together[2]).max() > 1e-2


def test_content_is_the_masked_mean_of_the_last_hidden_states(encoder):
    (ids,) = encoder.tokenize([PROMPTS[1]])
    with torch.no_grad():
        hidden = encoder.graph.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    np.testing.assert_allclose(encoder.encode([PROMPTS[1]])[0], (mean / mean.norm()).numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_still_give_embeddings_of_norm_one_in_fp32(encoder, dtype):
    want = encoder.encode(PROMPTS)
    cast_weights(encoder.graph, dtype)
    got = encoder.encode(PROMPTS)
    assert got.dtype == np.float32 and encoder.dtype == dtype
    # A norm computed with the 8 or 11 significant bits of these dtypes would be off by up to 2**-8 or 2**-11.
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-6)
    assert 1e-6 < np.abs(got - want).max() < 0.05


def test_long_text_is_truncated_on_the_right(encoder):
    (long,) = encoder.tokenize([PROMPTS[1] * 20])
    (short,) = encoder.tokenize([PROMPTS[1]])
    assert len(long) == encoder.max_tokens > len(short)
    assert long[: len(short) - 1] == short[:-1]


def test_the_name_of_a_special_token_in_a_text_is_text(encoder):
    special = {encoder.tokenizer.token_to_id(name) for name in ("<s>", "<pad>")}
    (ids,) = encoder.tokenize(["<s> a film <pad>"])
    assert ids[0] in special
    assert not special & set(ids[1:])


def test_padding_is_on_the_right():
    ids, mask = ceg.pad([[5, 6], [7, 8, 9], [4]], 2)
    assert ids.tolist() == [[5, 6, 2], [7, 8, 9], [4, 2, 2]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_stored_embeddings_are_those_of_the_encoder(encoder, tmp_path):
    got = embedding_store.encode_cached(encoder, PROMPTS, tmp_path / "cache", dataclasses.replace(QUIET, shard_items=3))
    assert isinstance(got, np.memmap) and got.dtype == np.float32
    np.testing.assert_allclose(got, encoder.encode(PROMPTS), atol=1e-6)
    # Writing to the returned array does not change the file.
    (path,) = (tmp_path / "cache").glob("*.npy")
    torch.from_numpy(got).zero_()
    assert np.load(path).any()
    assert path.name == f"content-{embedding_store.cache_key(encoder, PROMPTS)[:32]}.npy"


def test_an_fp16_store_is_close_to_the_fp32_store(encoder, tmp_path):
    exact = embedding_store.encode_cached(encoder, PROMPTS, tmp_path, QUIET)
    half = embedding_store.encode_cached(encoder, PROMPTS, tmp_path, dataclasses.replace(QUIET, dtype="float16"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, rtol=2**-11, atol=1e-7)
    assert not np.array_equal(half, exact)


def test_a_second_call_encodes_only_what_the_store_lacks(encoder, tmp_path):
    first = embedding_store.encode_cached(encoder, PROMPTS, tmp_path, QUIET)
    sizes = record_batch_sizes(encoder)
    assert np.array_equal(embedding_store.encode_cached(encoder, PROMPTS, tmp_path, QUIET), first)
    assert sizes == []
    assert np.array_equal(embedding_store.encode_cached(encoder, PROMPTS[:2], tmp_path, QUIET), first[:2])
    assert sizes == []


class KillingPrompts:
    """Prompts that kill the process when one of them is read a second time; the first reading computes the key."""

    def __init__(self, prompts, position):
        self.prompts, self.position, self.n_readings = prompts, position, 0

    def __iter__(self):
        self.n_readings += 1
        for position, prompt in enumerate(self.prompts):
            if self.n_readings == 2 and position == self.position:
                os.kill(os.getpid(), signal.SIGKILL)
            yield prompt


def test_a_killed_run_resumes_from_the_shards_that_it_wrote(encoder, tmp_path):
    prompts = [f"text number {number} of some" for number in range(12)]
    config = dataclasses.replace(QUIET, shard_items=2)
    arguments = (encoder, KillingPrompts(prompts, 9), tmp_path / "cache", config)
    child = multiprocessing.get_context("fork").Process(target=embedding_store.encode_cached, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    n_written = len(list((tmp_path / "cache").glob("texts-*/*.texts.npy")))
    # The process was killed as it read the fifth shard ahead: three shards are complete, and the fourth may be.
    assert n_written in (3, 4) and not list((tmp_path / "cache").glob("content-*"))
    sizes = record_batch_sizes(encoder)
    got = embedding_store.encode_cached(encoder, prompts, tmp_path / "cache", config)
    assert sum(sizes) == len(prompts) - 2 * n_written
    np.testing.assert_allclose(got, encoder.encode(prompts), atol=1e-6)


def test_prompts_are_read_at_most_one_shard_ahead(encoder, tmp_path):
    config = dataclasses.replace(QUIET, shard_items=2)

    class CountedPrompts:
        n_read = 0

        def __iter__(self):
            for number in range(20):
                self.n_read += 1
                yield f"text {number}"

    prompts, ahead = CountedPrompts(), []
    batch_sizes = record_batch_sizes(encoder)
    encoder.graph.register_forward_pre_hook(
        lambda *_: ahead.append(prompts.n_read - 20 - sum(batch_sizes[:-1]))  # read in the second pass, not yet encoded
    )
    embedding_store.encode_cached(encoder, prompts, tmp_path, config)
    # At most the shard that is being encoded and the one that is tokenized meanwhile.
    assert 2 <= max(ahead) <= 4


def test_no_prompts_and_prompts_that_can_be_read_only_once_are_refused(encoder, tmp_path):
    with pytest.raises(ValueError, match="read only once"):
        embedding_store.encode_cached(encoder, iter(PROMPTS), tmp_path)
    with pytest.raises(ValueError, match="no prompt"):
        embedding_store.encode_cached(encoder, [], tmp_path)


def test_a_vector_that_is_not_finite_is_never_stored(encoder, tmp_path):
    with torch.no_grad():
        encoder.graph.model.norm.weight[0] = float("nan")
    config = dataclasses.replace(QUIET, shard_items=2)
    with pytest.raises(ValueError, match="in the shard that begins at item 0: the embedding of prompt 0 is not finite"):
        embedding_store.encode_cached(encoder, PROMPTS, tmp_path / "cache", config)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_the_key_covers_everything_that_the_embedding_depends_on(encoder, tmp_path):
    keys = {embedding_store.cache_key(encoder, PROMPTS)}
    keys.add(embedding_store.cache_key(encoder, PROMPTS[::-1]))
    keys.add(embedding_store.cache_key(encoder, ["a lam", "p" + PROMPTS[1], *PROMPTS[2:]]))
    keys.add(embedding_store.cache_key(dataclasses.replace(encoder, max_tokens=7), PROMPTS))
    encoder.weights[0].write_bytes(b"other weights")
    keys.add(embedding_store.cache_key(encoder, PROMPTS))
    (tmp_path / "config.json").write_text("{}")
    keys.add(embedding_store.cache_key(dataclasses.replace(encoder, config_path=tmp_path / "config.json"), PROMPTS))
    encoder.tokenizer_path.write_text("{}")
    keys.add(embedding_store.cache_key(encoder, PROMPTS))
    cast_weights(encoder.graph, torch.float16)
    keys.add(embedding_store.cache_key(encoder, PROMPTS))
    assert len(keys) == 8
    # Batching does not affect the embeddings, so it is not part of the key.
    again = dataclasses.replace(encoder, batching=BatchConfig(max_tokens=1))
    assert embedding_store.cache_key(again, PROMPTS) in keys


def test_the_progress_bar_shows_items_and_tokens_per_second(encoder, tmp_path, capsys):
    embedding_store.encode_cached(encoder, PROMPTS, tmp_path, StoreConfig(title="encode items"))
    shown = capsys.readouterr().err
    assert "encode items: 100%" in shown and "4/4" in shown and "item/s" in shown and "tokens/s" in shown


def test_the_error_for_missing_files_names_the_command_that_fetches_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make setup"):
        ceg.load(tmp_path, 16)


@pytest.mark.parametrize("max_tokens", [0, 129])
def test_a_token_limit_outside_the_positions_of_the_model_is_refused(tmp_path, max_tokens):
    fixture_bundles.byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}, but random takes 1 to 128"):
        ceg.wrap("random", fixture_bundles.encoder_model(), tmp_path / "tokenizer.json", max_tokens, 0)
