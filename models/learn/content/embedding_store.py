"""Content embeddings on disk, encoded shard by shard, so that a killed run can be continued.

    CACHE/content-KEY.npy         all vectors [n,C] of one list of prompts, in fp32 (content-f16-KEY.npy: in fp16)
    CACHE/shards/KEY.npy          the vectors of one shard of the list, until the whole list is encoded

A key is a digest of everything that the vectors in the file depend on (`cache_key`), so a file never has to be
invalidated. Files are written under another name, synced and renamed, so a file that exists is complete. While the
shards are joined, the vectors are on disk twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from learn.atomic_file import replacing
from learn.content.ceg import Encoder, EncoderFolder, TextEncoder
from learn.content.graph_encoder import GraphEncoder
from learn.progress import Rate

AnyEncoder: TypeAlias = Encoder | EncoderFolder | GraphEncoder
DTYPES = {"float32": ("", np.float32), "float16": ("f16-", np.float16)}


@dataclass(frozen=True)
class StoreConfig:
    """How vectors are stored."""

    # A killed run loses at most one shard. Batches do not cross shards, so small shards cost padding.
    shard_items: int = 4096
    # float16 halves the space on disk, with a relative error of up to 2**-11 per value.
    dtype: str = "float32"
    # Keeps the shards after joining them. If the catalogue grows at its end, only the last shards are encoded again.
    keep_shards: bool = False
    title: str | None = "encode items"

    def __post_init__(self) -> None:
        if self.shard_items < 1:
            raise ValueError(f"shard_items is {self.shard_items}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")


def _digest_without_prompts(encoder: AnyEncoder) -> hashlib._Hash:
    """A SHA-256 over all that vectors depend on except the prompts.

    The device is left out, because it changes only the last digits.
    """
    digest = encoder.identity.copy()
    if encoder.dtype != torch.float32:
        digest.update(str(encoder.dtype).encode())
    return digest


def _add_prompt(digest: hashlib._Hash, prompt: str) -> None:
    """Adds a prompt after its length, so that different lists of prompts never give the same bytes."""
    raw = prompt.encode()
    digest.update(len(raw).to_bytes(8, "little") + raw)


def cache_key(encoder: AnyEncoder, prompts: Iterable[str]) -> str:
    """A digest over everything that the embeddings depend on."""
    digest = _digest_without_prompts(encoder)
    for prompt in prompts:
        _add_prompt(digest, prompt)
    return digest.hexdigest()


def encode_cached(
    encoder: AnyEncoder, prompts: Iterable[str], cache: Path, config: StoreConfig | None = None
) -> np.ndarray:
    """Content embeddings [n,C] in the order of `prompts`, memory-mapped from a file in `cache`.

    Only shards that no earlier run stored are encoded. The weights of an `EncoderFolder` are loaded only if the file
    for these prompts does not exist yet.

    `prompts` is read twice, so it must be a list or another object that can be iterated repeatedly. At most two shards
    of it are in memory. Writing to the array does not change the file.
    """
    # Copy on write: PyTorch expects writable arrays, and the file must not change.
    return np.load(encode_to_file(encoder, prompts, cache, config), mmap_mode="c")


def encode_to_file(encoder: AnyEncoder, prompts: Iterable[str], cache: Path, config: StoreConfig | None = None) -> Path:
    """Like `encode_cached`, but returns the path of the file.

    Its name contains a digest of everything that the embeddings depend on.
    """
    config = config or StoreConfig()
    if isinstance(prompts, Iterator):
        raise ValueError(
            "prompts is an iterator, which can be read only once; give a list or another object that can be read twice"
        )
    base_digest = _digest_without_prompts(encoder)
    digest, n_items = base_digest.copy(), 0
    for prompt in prompts:
        _add_prompt(digest, prompt)
        n_items += 1
    if n_items == 0:
        raise ValueError("there is no prompt to encode; give at least one")
    prefix, dtype = DTYPES[config.dtype]
    path = cache / f"content-{prefix}{digest.hexdigest()[:32]}.npy"
    if not path.is_file():
        encoder = encoder.loaded()
        (cache / "shards").mkdir(parents=True, exist_ok=True)
        with Rate(config.title, n_items) as rate:
            shards = [
                _encode(encoder, shard, np.dtype(dtype), rate)
                for shard in _prefetched(encoder, base_digest, prompts, cache, config)
            ]
        _join(shards, path, (n_items, encoder.dim))
        if not config.keep_shards:
            # Two shards with the same prompts share one file.
            for shard in shards:
                shard.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class _Shard:
    # The position of its first prompt in the whole list.
    begin: int
    path: Path
    prompts: tuple[str, ...]
    # The token ids, or None if the vectors are on disk already.
    ids: list[list[int]] | None


def _prefetched(
    encoder: TextEncoder, base_digest: hashlib._Hash, prompts: Iterable[str], cache: Path, config: StoreConfig
) -> Iterator[_Shard]:
    """Yields the shards in order, and hashes and tokenizes the next one in another thread meanwhile."""
    pieces = _pieces(prompts, config.shard_items)
    prepare = (_prepare, encoder, base_digest, pieces, cache, DTYPES[config.dtype][0])
    with ThreadPoolExecutor(max_workers=1) as pool:
        next_shard = pool.submit(*prepare)
        while (shard := next_shard.result()) is not None:
            next_shard = pool.submit(*prepare)
            yield shard


def _pieces(prompts: Iterable[str], n_items: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields groups of up to `n_items` prompts, each with the position of its first prompt."""
    source = iter(prompts)
    for begin in itertools.count(0, n_items):
        piece = tuple(itertools.islice(source, n_items))
        if not piece:
            return
        yield begin, piece


def _prepare(
    encoder: TextEncoder,
    base_digest: hashlib._Hash,
    pieces: Iterator[tuple[int, tuple[str, ...]]],
    cache: Path,
    prefix: str,
) -> _Shard | None:
    if (piece := next(pieces, None)) is None:
        return None
    begin, prompts = piece
    digest = base_digest.copy()
    for prompt in prompts:
        _add_prompt(digest, prompt)
    path = cache / "shards" / f"{prefix}{digest.hexdigest()[:32]}.npy"
    return _Shard(begin, path, prompts, None if path.is_file() else encoder.tokenize(prompts))


def _encode(encoder: TextEncoder, shard: _Shard, dtype: np.dtype, rate: Rate) -> Path:
    if shard.ids is None:
        rate.skip(len(shard.prompts))
        return shard.path
    content = np.empty((len(shard.ids), encoder.dim), dtype=dtype)
    try:
        for rows, vectors in encoder.run(shard.ids):
            content[rows] = vectors
            rate.add(len(rows), sum(len(shard.ids[row]) for row in rows))
    except ValueError as error:
        raise ValueError(f"in the shard that begins at item {shard.begin}: {error}") from error
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
            raise ValueError(
                f"{path}: {begin} vectors for {shape[0]} prompts; the prompts changed between the two reads"
            )
        # Flushes the memory map before the file is synced.
        del whole
