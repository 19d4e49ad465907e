"""The store of embeddings, addressed by text: what is encoded when a catalogue changes, and what damage does."""

from __future__ import annotations

import dataclasses
import multiprocessing

import numpy as np
import pytest

from learn.content import embedding_store, text_store
from learn.content.embedding_store import StoreConfig
from learn.content.text_store import TextStore, as_digests
from learn.serving import fixture_bundles

PROMPTS = [f"item number {number}" for number in range(100)]
QUIET = StoreConfig(shard_items=16, title=None)


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "weights").write_bytes(b"stands for the weights in the key")
    built = fixture_bundles.build(tmp_path / "tokenizer.json").encoder
    return dataclasses.replace(built, weights=(tmp_path / "weights",))


@pytest.fixture
def encoded(encoder):
    """The number of prompts in each call of the encoder."""
    sizes = []
    encoder.graph.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    return sizes


def encode(encoder, prompts, cache, config=QUIET):
    return embedding_store.encode_cached(encoder, prompts, cache, config)


def shards(cache):
    return sorted(path for path in cache.glob("texts-*/*.npy") if not path.name.endswith(text_store.TEXTS))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_more_item_encodes_one_item(encoder, encoded, tmp_path, dtype):
    config = dataclasses.replace(QUIET, dtype=dtype)
    first = encode(encoder, PROMPTS, tmp_path, config)
    assert sum(encoded) == 100
    encoded.clear()
    grown = [*PROMPTS[:40], "a new one", *PROMPTS[40:]]
    found = encode(encoder, grown, tmp_path, config)
    assert encoded == [1]
    assert found.dtype == dtype and np.array_equal(np.delete(found, 40, axis=0), first)
    np.testing.assert_allclose(found[40], encoder.encode(["a new one"])[0], atol=1e-6 if dtype == "float32" else 1e-3)


def test_one_changed_text_encodes_one_item(encoder, encoded, tmp_path):
    first = encode(encoder, PROMPTS, tmp_path)
    encoded.clear()
    found = encode(encoder, ["another title", *PROMPTS[1:]], tmp_path)
    assert encoded == [1]
    assert np.array_equal(found[1:], first[1:]) and np.abs(found[0] - first[0]).max() > 1e-3


def test_a_reordered_or_smaller_catalogue_needs_no_weights(encoder, tmp_path):
    first = encode(encoder, PROMPTS, tmp_path)

    def refuse(_self):
        raise AssertionError("the weights were loaded")

    asleep = dataclasses.replace(encoder)
    object.__setattr__(asleep, "loaded", refuse.__get__(asleep))
    assert np.array_equal(encode(asleep, PROMPTS[::-1], tmp_path), first[::-1])
    assert np.array_equal(encode(asleep, PROMPTS[7:9], tmp_path), first[7:9])


def test_equal_texts_are_encoded_once(encoder, encoded, tmp_path):
    found = encode(encoder, ["tea", "lamp", "tea", "tea"], tmp_path)
    assert sum(encoded) == 2
    assert np.array_equal(found[0], found[2]) and np.array_equal(found[0], found[3])
    np.testing.assert_allclose(found, encoder.encode(["tea", "lamp", "tea", "tea"]), atol=1e-6)


def test_another_encoder_or_precision_shares_nothing(encoder, encoded, tmp_path):
    encode(encoder, PROMPTS, tmp_path)
    encode(encoder, PROMPTS, tmp_path, dataclasses.replace(QUIET, dtype="float16"))
    shorter = dataclasses.replace(encoder, max_tokens=7)
    encode(shorter, PROMPTS, tmp_path)
    assert sum(encoded) == 300 and len(list(tmp_path.glob("texts-*"))) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-7] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b""), lambda p: p.unlink()])
@pytest.mark.parametrize("kind", ["vectors", "texts"])
def test_what_is_in_a_damaged_file_is_encoded_again(encoder, encoded, tmp_path, capsys, damage, kind):
    first = encode(encoder, PROMPTS, tmp_path)
    damaged = shards(tmp_path)[2]
    damage(damaged if kind == "vectors" else damaged.with_name(f"{damaged.stem}{text_store.TEXTS}"))
    encoded.clear()
    found = encode(encoder, [*PROMPTS, "one more"], tmp_path)
    # The last shard of the first run has four texts, any other has 16.
    assert sum(encoded) in (5, 17)
    np.testing.assert_allclose(found[:100], first, atol=1e-6)
    # What is in the store now is whole.
    encoded.clear()
    encode(encoder, PROMPTS[::-1], tmp_path)
    assert encoded == [] and capsys.readouterr().out.count("is damaged") <= 1


def test_a_damaged_file_is_named(encoder, tmp_path, capsys):
    encode(encoder, PROMPTS, tmp_path)
    damaged = shards(tmp_path)[0]
    flip_a_bit(damaged)
    encode(encoder, PROMPTS[::-1], tmp_path)
    assert f"{damaged} is damaged (its content is not what was written): it is removed" in capsys.readouterr().out


def test_a_table_and_shards_of_an_earlier_version(encoder, encoded, tmp_path):
    # The table of the same prompts has the same name as before. Shards were addressed by lists and are not read.
    key = embedding_store.cache_key(encoder, PROMPTS)[:32]
    np.save(tmp_path / f"content-{key}.npy", np.ones((100, 8), np.float32))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / f"{key}.npy").write_bytes(b"old")
    assert np.array_equal(encode(encoder, PROMPTS, tmp_path), np.ones((100, 8)))
    assert encoded == []
    encode(encoder, PROMPTS[1:], tmp_path)
    assert sum(encoded) == 99


def test_processes_that_encode_at_the_same_time_agree(encoder, encoded, tmp_path):
    lists = [PROMPTS[:70], PROMPTS[30:], PROMPTS, PROMPTS[::-1]]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=encode, args=(encoder, prompts, tmp_path)) for prompts in lists]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 4
    want = encoder.encode(PROMPTS)
    encoded.clear()
    for prompts, rows in zip(lists, (slice(70), slice(30, None), slice(None), slice(None, None, -1)), strict=True):
        np.testing.assert_allclose(encode(encoder, prompts, tmp_path), want[rows], atol=1e-6)
    assert encoded == [] and not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("second", [["a", "b", "d"], ["a", "b"], ["a", "b", "c", "d"]])
def test_prompts_that_change_between_the_two_reads_are_refused(encoder, tmp_path, second):
    class Changing:
        n_reads = 0

        def __iter__(self):
            self.n_reads += 1
            return iter(["a", "b", "c"] if self.n_reads == 1 else second)

    with pytest.raises(ValueError, match="changed between the"):
        encode(encoder, Changing(), tmp_path)
    assert not list(tmp_path.glob("content-*"))


def test_find_locates_random_digests_among_many_shards(tmp_path):
    rng, store = np.random.default_rng(0), TextStore(tmp_path / "store", np.dtype(np.float32))
    # Digests with zero bytes at the end are digests like any other.
    texts = np.unique(as_digests(rng.integers(0, 2, (300, 16), dtype=np.uint8).tobytes()))
    vectors = rng.normal(size=(len(texts), 3)).astype(np.float32)
    order = rng.permutation(len(texts))
    for part in np.array_split(order[:200], 7):
        store.write(texts[part], vectors[part])
    places = store.find(texts)
    assert np.array_equal(np.flatnonzero(places.is_missing), np.sort(order[200:]))
    wanted = rng.choice(order[:200], 500)
    found = np.full((500, 3), np.nan)
    for name, items, rows in places.by_shard(wanted):
        found[items] = store.read(name)[rows]
    assert np.array_equal(found, vectors[wanted])
