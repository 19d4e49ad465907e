"""Measures which share of the bare encoder's rate `embedding_store.encode_cached` reaches, round by round.

    OMP_NUM_THREADS=1 .venv/bin/python -m benches.encode --data /path/to/ml-latest-small --items 1000 --rounds 5

"bare" is the same model in a plain loop over the same batches, tokenized and padded before the clock starts. "ours" is
the whole work: hashing, tokenizing, batching, writing shards to disk and joining them. Both are measured in CPU seconds
of the process, which are stable on a shared machine; wall time is not, and is printed too. The goal is .90 or more.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from learn.content import ceg, embedding_store
from learn.content.batching import BatchConfig, batches
from learn.content.embedding_store import StoreConfig
from learn.data.item_text import ItemText, render

HERE = Path(__file__).parents[1]
Seconds = tuple[float, float]


def timed(work: Callable[[], object]) -> Seconds:
    """Returns the CPU seconds of all threads of this process, and the wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def bare(encoder: ceg.Encoder, prepared: list[tuple[torch.Tensor, torch.Tensor]]) -> Seconds:
    """Times the model alone over batches that are in memory."""

    def loop() -> None:
        with torch.inference_mode():
            for ids, mask in prepared:
                encoder.graph(ids, mask).cpu()

    return timed(loop)


def ours(encoder: ceg.Encoder, prompts: list[str], shard_items: int) -> Seconds:
    """Times the whole work from prompts to a memory-mapped file, in an empty folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        return timed(
            lambda: embedding_store.encode_cached(encoder, prompts, folder, StoreConfig(shard_items, title=None))
        )
    finally:
        shutil.rmtree(folder)


def prepare(encoder: ceg.Encoder, prompts: list[str], shard_items: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prepares the batches that `encode_cached` makes."""
    prepared = []
    for begin in range(0, len(prompts), shard_items):
        ids = encoder.tokenize(prompts[begin : begin + shard_items])
        for rows in batches([len(row) for row in ids], encoder.batching):
            batch, mask = ceg.pad([ids[row] for row in rows], encoder.pad_id)
            prepared.append((batch.to(encoder.device), mask.to(encoder.device)))
    return prepared


def load_prompts(data: Path | None, n_items: int) -> list[str]:
    """Reads the prompts of a data set, or makes up titles with about as many words as film titles have."""
    if data is not None:
        from learn.data import read_neutral

        return [render(text) for text in read_neutral(data).texts[:n_items]]
    titles = (f"Film {number} {'of the long night ' * (number % 5)}(19{number % 100:02})" for number in range(n_items))
    return [render(ItemText(title, "Drama, Action, Comedy"[: 5 + 7 * (len(title) % 3)])) for title in titles]


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=HERE / "default")
    parser.add_argument("--data", type=Path, help="a data set in its original files; without it, made-up titles")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard-items", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=BatchConfig.max_tokens)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompts = load_prompts(arguments.data, arguments.items)
    encoder = replace(ceg.load(arguments.encoder, 128), batching=BatchConfig(arguments.batch_tokens))
    prepared = prepare(encoder, prompts, arguments.shard_items)
    n_real, n_padded = (sum(int(size) for size in sizes) for sizes in _tokens(prepared))
    print(
        f"{encoder.name} on {encoder.device}, {len(prompts)} items, {n_real} tokens, {len(prepared)} batches, ", end=""
    )
    print(f"{1 - n_real / n_padded:.1%} padding")
    bare(encoder, prepared[:2])
    ratios = []
    for number in range(arguments.rounds):
        # The two take turns at going first, so that a machine that slows down favours neither.
        pair = {}
        for name in ("bare", "ours") if number % 2 == 0 else ("ours", "bare"):
            pair[name] = bare(encoder, prepared) if name == "bare" else ours(encoder, prompts, arguments.shard_items)
        (bare_cpu, bare_wall), (our_cpu, our_wall) = pair["bare"], pair["ours"]
        ratios.append(bare_cpu / our_cpu)
        print(
            f"round {number + 1}: bare {bare_cpu / len(prompts) * 1e3:.2f}, ours {our_cpu / len(prompts) * 1e3:.2f} "
            f"CPU ms per item, ratio {ratios[-1]:.3f} (wall: {len(prompts) / bare_wall:.0f} and "
            f"{len(prompts) / our_wall:.0f} items/s, {n_real / our_wall:,.0f} tokens/s, "
            f"ratio {bare_wall / our_wall:.3f})"
        )
    print(f"ratio of the bare encoder's rate: median {statistics.median(ratios):.3f}, lowest {min(ratios):.3f}")


def _tokens(prepared: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[int]]:
    return [mask.sum() for _ids, mask in prepared], [mask.numel() for _ids, mask in prepared]


if __name__ == "__main__":
    main()
