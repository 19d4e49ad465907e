"""Rows of unequal length -> batches with little padding.

Rows are sorted by length, so neighbours are similar. A batch ends before the row that would exceed the token budget,
which includes padding, or the allowed share of padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchConfig:
    """Limits of one batch. A row that exceeds them alone becomes a batch of its own."""

    # Tokens of a padded batch [b,s], that is b*s. The default suits a CPU: with MiniLM on one thread of a busy machine,
    # an item took 10.4 to 11.7 CPU ms in batches of 512, 11.4 to 11.5 in 2,048 and 11.8 to 12.3 in 8,192. A GPU needs
    # far more.
    max_tokens: int = 512
    max_items: int = 1024
    # The share of b*s that may be padding.
    max_padding: float = 0.1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.max_padding < 1.0:
            raise ValueError(f"max_padding is {self.max_padding}; it must be in [0, 1)")


def batches(lengths: Sequence[int], config: BatchConfig) -> Iterator[list[int]]:
    """Yields batches of indices into `lengths` [n], each once, by rising length; equal lengths keep their order."""
    order = sorted(range(len(lengths)), key=lambda position: (lengths[position], position))
    batch: list[int] = []
    n_real = 0
    for position in order:
        length = lengths[position]
        # Rows are sorted by length, so the new row is the longest and sets the width.
        n_padded = (len(batch) + 1) * length
        n_padding = n_padded - (n_real + length)
        is_over = n_padded > config.max_tokens or len(batch) == config.max_items
        if batch and (is_over or n_padding > config.max_padding * n_padded):
            yield batch
            batch, n_real = [], 0
        batch.append(position)
        n_real += length
    if batch:
        yield batch
