"""Content embeddings on disk: each text is encoded once, and a killed run can be continued.

    CACHE/content-KEY.npy    all vectors [n,C] of one list of prompts, in fp32 (content-f16-KEY.npy: in fp16)
    CACHE/texts-ENCODER/     the vectors of all texts that this encoder ever encoded here (`text_store`), in fp32
                             (texts-f16-ENCODER: in fp16)

KEY and ENCODER are digests of everything that the vectors in the file or folder depend on (`cache_key`; for a folder,
all but the prompts), so nothing ever has to be invalidated. A new item or a changed text costs the encoding of one
prompt, and the table of the catalogue is then gathered from the store. Files are written under another name, synced and
renamed, so a file that exists is complete. A catalogue's vectors are on disk twice; the folders may be removed to save
space, and then a changed catalogue is encoded anew. Folders `shards` of earlier versions are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from learn.atomic_file import replacing
from learn.content.ceg import Encoder, EncoderFolder, TextEncoder
from learn.content.graph_encoder import GraphEncoder
from learn.content.text_store import DamagedShard, Places, TextStore, as_digests, text_digest
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

    Only texts that no earlier run encoded are encoded. The weights of an `EncoderFolder` are loaded only if there are
    any.

    `prompts` is read twice, so it must be a list or another object that can be iterated repeatedly. At most two shards
    of it are in memory, and about 50 bytes for each of the others. Writing to the array does not change the file.
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
    digest, texts = _digest_without_prompts(encoder), bytearray()
    encoder_key = digest.hexdigest()[:32]
    for prompt in prompts:
        _add_prompt(digest, prompt)
        texts += text_digest(prompt)
    if not texts:
        raise ValueError("there is no prompt to encode; give at least one")
    prefix, dtype = DTYPES[config.dtype]
    path = cache / f"content-{prefix}{digest.hexdigest()[:32]}.npy"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        store = TextStore(cache / f"texts-{prefix}{encoder_key}", np.dtype(dtype))
        _Encoding(encoder, prompts, as_digests(texts), store, config).write(path)
    return path


@dataclass
class _Encoding:
    """The work for one list of prompts, of which `texts` [n] are the digests."""

    encoder: AnyEncoder
    prompts: Iterable[str]
    texts: np.ndarray
    store: TextStore
    config: StoreConfig
    # The distinct texts [u], the position of the first prompt with each of them [u], and the text of each prompt [n].
    distinct: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    text_of: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.distinct, self.first, self.text_of = np.unique(self.texts, return_index=True, return_inverse=True)

    def write(self, path: Path) -> None:
        """Encodes the texts that the store lacks, and writes the table. Damaged shards are encoded again."""
        while True:
            places = self.store.find(self.distinct)
            if places.is_missing.any():
                self._encode_missing(places)
                # Another process may have removed a damaged shard meanwhile, so the places are looked up again.
                continue
            try:
                return self._gather(places, path)
            except DamagedShard as error:
                print(
                    f"{self.store.vectors_path(error.name)} is damaged ({error}): it is removed, and the texts in it "
                    "are encoded again"
                )
                self.store.remove(error.name)

    def _encode_missing(self, places: Places) -> None:
        self.encoder = self.encoder.loaded()
        is_missing = np.zeros(len(self.texts), dtype=bool)
        is_missing[self.first[places.is_missing]] = True
        with Rate(self.config.title, len(self.texts)) as rate:
            rate.skip(len(self.texts) - int(is_missing.sum()))
            for shard in _prefetched(self.encoder, self._missing(is_missing)):
                _encode(self.encoder, shard, self.store, rate)

    def _missing(self, is_missing: np.ndarray) -> Iterator[_Piece]:
        """Yields the prompts to encode, as many at a time as a shard has."""
        begin, digests, found, n_read = 0, bytearray(), [], 0
        for position, prompt in enumerate(self.prompts):
            n_read += 1
            if position >= len(self.texts) or not is_missing[position]:
                continue
            begin = begin if found else position
            digest = text_digest(prompt)
            if as_digests(digest)[0] != self.texts[position]:
                raise ValueError(f"prompt {position} changed between the two reads of the prompts")
            digests += digest
            found.append(prompt)
            if len(found) == self.config.shard_items:
                yield _Piece(begin, as_digests(digests), tuple(found))
                digests, found = bytearray(), []
        if n_read != len(self.texts):
            raise ValueError(
                f"{n_read} prompts were read, and {len(self.texts)} before: they changed between the reads"
            )
        if found:
            yield _Piece(begin, as_digests(digests), tuple(found))

    def _gather(self, places: Places, path: Path) -> None:
        """Writes the table in the order of the prompts, shard by shard."""
        with replacing(path) as partial:
            whole = None
            for name, items, rows in places.by_shard(self.text_of):
                vectors = self.store.read(name)
                if whole is None:
                    shape = (len(self.texts), vectors.shape[1])
                    whole = np.lib.format.open_memmap(partial, mode="w+", dtype=self.store.dtype, shape=shape)
                whole[items] = vectors[rows]
            # Flushes the memory map before the file is synced.
            del whole


@dataclass(frozen=True)
class _Piece:
    # The position of its first prompt in the whole list.
    begin: int
    texts: np.ndarray
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class _Shard:
    piece: _Piece
    ids: list[list[int]]


def _prefetched(encoder: TextEncoder, pieces: Iterator[_Piece]) -> Iterator[_Shard]:
    """Yields the shards in order, and reads and tokenizes the next one in another thread meanwhile."""

    def prepare() -> _Shard | None:
        piece = next(pieces, None)
        return None if piece is None else _Shard(piece, encoder.tokenize(piece.prompts))

    with ThreadPoolExecutor(max_workers=1) as pool:
        next_shard = pool.submit(prepare)
        while (shard := next_shard.result()) is not None:
            next_shard = pool.submit(prepare)
            yield shard


def _encode(encoder: TextEncoder, shard: _Shard, store: TextStore, rate: Rate) -> None:
    content = np.empty((len(shard.ids), encoder.dim), dtype=store.dtype)
    try:
        for rows, vectors in encoder.run(shard.ids):
            content[rows] = vectors
            rate.add(len(rows), sum(len(shard.ids[row]) for row in rows))
    except ValueError as error:
        raise ValueError(f"in the shard that begins at item {shard.piece.begin}: {error}") from error
    store.write(shard.piece.texts, content)
