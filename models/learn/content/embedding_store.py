"""Content embeddings on disk: encoded shard by shard, so that a run that is killed goes on where it was.

    CACHE/content-KEY.npy         all vectors [n,C] of one list of prompts, in fp32 (content-f16-KEY.npy: in fp16)
    CACHE/shards/KEY.npy          those of one shard of the list, while the whole is not there yet

A key is the digest of everything that the vectors in the file depend on (`cache_key`), so a file is right or is not
there: nothing has to be invalidated. Each is written under another name, synced and renamed. While the whole is put
together from its shards, the vectors are on disk twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learn.atomic_file import replacing
from learn.content.ceg import Encoder, Source
from learn.progress import Rate

DTYPES = {"float32": ("", np.float32), "float16": ("f16-", np.float16)}


@dataclass(frozen=True)
class StoreConfig:
    """How vectors are kept."""

    # Items between two points where a killed run can go on. Batches are cut within a shard, so small ones cost padding.
    shard_items: int = 4096
    # float16 halves the disk, with an error of up to 2**-11 of each value.
    dtype: str = "float32"
    # Keeps the shards beside the whole: a catalogue that grew at its end then encodes only what is new.
    keep_shards: bool = False
    title: str | None = "encode items"

    def __post_init__(self) -> None:
        if self.shard_items < 1:
            raise ValueError(f"shard_items is {self.shard_items}, it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, it must be one of {', '.join(DTYPES)}")


def _seeded(encoder: Encoder | Source) -> hashlib._Hash:
    """A SHA-256 of all that vectors depend on but the prompts. The device is left out: it changes last digits alone."""
    digest = encoder.identity.copy()
    if encoder.dtype != torch.float32:
        digest.update(str(encoder.dtype).encode())
    return digest


def _add_prompt(digest: hashlib._Hash, prompt: str) -> None:
    """With its length, so that no two lists of prompts are the same bytes."""
    raw = prompt.encode()
    digest.update(len(raw).to_bytes(8, "little") + raw)


def cache_key(encoder: Encoder | Source, prompts: Iterable[str]) -> str:
    """A digest over everything that the embeddings depend on."""
    digest = _seeded(encoder)
    for prompt in prompts:
        _add_prompt(digest, prompt)
    return digest.hexdigest()


def encode_cached(
    encoder: Encoder | Source, prompts: Iterable[str], cache: Path, config: StoreConfig | None = None
) -> np.ndarray:
    """[n,C] in the order of `prompts`, memory-mapped from a file in `cache`; encodes what no earlier run has done.

    Of a `Source` the weights are read into memory only if there is anything to encode.

    `prompts` is read twice, so it must be something that can be: a list, or an object whose `__iter__` begins anew. Of
    it only two shards are ever in memory. The array may be written to without changing the file.
    """
    # Copy on write: PyTorch takes arrays that can be written to, and the file stays as it is.
    return np.load(encode_to_file(encoder, prompts, cache, config), mmap_mode="c")


def encode_to_file(
    encoder: Encoder | Source, prompts: Iterable[str], cache: Path, config: StoreConfig | None = None
) -> Path:
    """The same as the path of the file, whose name is a digest of all that the embeddings depend on."""
    return _stored(encoder, prompts, cache, config or StoreConfig())


@dataclass(frozen=True)
class _Shard:
    # The position of its first prompt in the whole.
    begin: int
    path: Path
    prompts: tuple[str, ...]
    # Nothing where the shard is on disk already.
    ids: list[list[int]] | None


def _stored(source: Encoder | Source, prompts: Iterable[str], cache: Path, config: StoreConfig) -> Path:
    """See `encode_to_file`."""
    if isinstance(prompts, Iterator):
        raise ValueError("prompts can be read only once, and are needed twice: give a list or a re-iterable object")
    seed = _seeded(source)
    whole, n_items = seed.copy(), 0
    for prompt in prompts:
        _add_prompt(whole, prompt)
        n_items += 1
    if n_items == 0:
        raise ValueError("there is no prompt to encode")
    prefix, dtype = DTYPES[config.dtype]
    path = cache / f"content-{prefix}{whole.hexdigest()[:32]}.npy"
    if not path.is_file():
        encoder = source.opened()
        (cache / "shards").mkdir(parents=True, exist_ok=True)
        with Rate(config.title, n_items) as rate:
            shards = [
                _encode(encoder, shard, np.dtype(dtype), rate)
                for shard in _prefetched(encoder, seed, prompts, cache, config)
            ]
        _join(shards, path, (n_items, encoder.dim))
        if not config.keep_shards:
            # One file may stand for two shards of the same prompts.
            for shard in shards:
                shard.unlink(missing_ok=True)
    return path


def _prefetched(
    encoder: Encoder, seed: hashlib._Hash, prompts: Iterable[str], cache: Path, config: StoreConfig
) -> Iterator[_Shard]:
    """Shards in order; the next one is hashed and tokenized while its reader works on this one."""
    pieces = _pieces(prompts, config.shard_items)
    prepare = (_prepare, encoder, seed, pieces, cache, DTYPES[config.dtype][0])
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = pool.submit(*prepare)
        while (shard := waiting.result()) is not None:
            waiting = pool.submit(*prepare)
            yield shard


def _pieces(prompts: Iterable[str], n_items: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Every `n_items` prompts with the position of the first."""
    source = iter(prompts)
    for begin in itertools.count(0, n_items):
        piece = tuple(itertools.islice(source, n_items))
        if not piece:
            return
        yield begin, piece


def _prepare(
    encoder: Encoder, seed: hashlib._Hash, pieces: Iterator[tuple[int, tuple[str, ...]]], cache: Path, prefix: str
) -> _Shard | None:
    if (piece := next(pieces, None)) is None:
        return None
    begin, prompts = piece
    digest = seed.copy()
    for prompt in prompts:
        _add_prompt(digest, prompt)
    path = cache / "shards" / f"{prefix}{digest.hexdigest()[:32]}.npy"
    return _Shard(begin, path, prompts, None if path.is_file() else encoder.tokenize(prompts))


def _encode(encoder: Encoder, shard: _Shard, dtype: np.dtype, rate: Rate) -> Path:
    if shard.ids is None:
        rate.skip(len(shard.prompts))
        return shard.path
    content = np.empty((len(shard.ids), encoder.dim), dtype=dtype)
    try:
        for rows, vectors in encoder.run(shard.ids):
            content[rows] = vectors
            rate.add(len(rows), sum(len(shard.ids[row]) for row in rows))
    except ValueError as error:
        raise ValueError(f"{error} of those from item {shard.begin} on") from error
    with replacing(shard.path) as partial, partial.open("wb") as file:
        np.save(file, content)
    return shard.path


def _join(shards: list[Path], path: Path, shape: tuple[int, int]) -> None:
    with replacing(path) as partial:
        whole, begin = None, 0
        for shard in shards:
            vectors = np.load(shard, mmap_mode="r")
            if whole is None:
                whole = np.lib.format.open_memmap(partial, mode="w+", dtype=vectors.dtype, shape=shape)
            whole[begin : begin + len(vectors)] = vectors
            begin += len(vectors)
        if begin != shape[0]:
            raise ValueError(f"{path}: {begin} vectors for {shape[0]} prompts; the prompts changed while being read")
        # Writes what the memory map still holds, before the file is synced.
        del whole
