"""A catalogue's content embeddings in the form that a model looks them up: content[items] -> fp32, standardised.

A small table is standardised once and kept in fp32 (`standardise.IN_MEMORY_BYTES`). A larger one stays as it was given,
a tensor on the CPU or a memory map of a file, in fp16 or fp32: the rows of a batch are gathered, moved to the device of
the model, and standardised there. 10 million items of 1,024 numbers are 20 GB in fp16 and would be 40 GB in fp32, for
every copy.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from learn.content.standardise import CHUNK, Standardisation, fits_in_memory


class GatheredContent(nn.Module):
    """A large table, whose rows are standardised when they are asked for.

    `rows` [I,C] stays on the CPU when the module is moved to a device; the map is moved. table[items] is
    mapped(fetch(items)): a training loop that prefetches can call `fetch` in another thread, and then `mapped`.
    """

    def __init__(self, rows: Tensor, standardisation: Standardisation) -> None:
        super().__init__()
        # A plain attribute: a buffer would be copied to the device, and into checkpoints.
        self.rows = rows
        self.register_buffer("mean", standardisation.mean, persistent=False)
        self.register_buffer("scale", standardisation.scale, persistent=False)
        matrix = standardisation.matrix if standardisation.scale is None else None
        self.register_buffer("matrix", matrix, persistent=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        """[I,C], as of a table in memory."""
        return self.rows.shape

    @torch.compiler.disable
    def __getitem__(self, items: Tensor) -> Tensor:
        return self.mapped(self.fetch(items))

    def fetch(self, items: Tensor) -> Tensor:
        """Items [...] -> their rows as stored, [...,C] on the CPU; pinned if the model is on a GPU."""
        found = self.rows.index_select(0, items.flatten().cpu().long()).unflatten(0, items.shape)
        return found.pin_memory() if self.mean.is_cuda else found

    def mapped(self, rows: Tensor) -> Tensor:
        """Rows as stored, [...,C] -> standardised on the device of the model, in fp32 even under autocast."""
        device = self.mean.device
        with torch.autocast(device.type, enabled=False):
            centred = rows.to(device, non_blocking=True).float() - self.mean
            return centred @ self.matrix if self.scale is None else centred * self.scale

    def digest(self) -> str:
        """A SHA-256 over the table as given, which is read once, piece by piece."""
        found = hashlib.sha256(f"{self.rows.dtype} {tuple(self.rows.shape)}".encode())
        for begin in range(0, len(self.rows), CHUNK):
            found.update(self.rows[begin : begin + CHUNK].contiguous().numpy().data)
        return found.hexdigest()


def standardised(content: Tensor, standardisation: Standardisation) -> Tensor | GatheredContent:
    """The table [I,C], standardised: in fp32 if that fits in memory, else by row."""
    if fits_in_memory(content):
        return standardisation.apply(content)
    return GatheredContent(content, standardisation)
