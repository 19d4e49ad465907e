"""Data parallelism under `torchrun`: the role of this process, and sums over all processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def start() -> None:
    """Joins the process group if torchrun started this process (it sets WORLD_SIZE). Uses NCCL on GPUs, else Gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def device() -> torch.device:
    """The device of this process: its own GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """True for the one process that writes files and draws progress bars."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` in the first process and then in all others, so that these find its results on disk."""
    if is_first():
        found = work()
    if dist.is_initialized():
        dist.barrier()
    return found if is_first() else work()


def n_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(n_rows: int) -> slice:
    """The rows that this process works on: users of a batch, candidates, or events to rank."""
    if not dist.is_initialized():
        return slice(0, n_rows)
    return _share_of(dist.get_rank(), n_rows)


def _share_of(rank: int, n_rows: int) -> slice:
    world = dist.get_world_size()
    return slice(rank * n_rows // world, (rank + 1) * n_rows // world)


def gathered(part: Tensor, n_rows: int) -> Tensor:
    """The rows of all processes, [n_rows,E], in the order of `share`; `part` has those of this one.

    Every process computes its part of a loss from all rows. In the backward pass, each gets the sum of all gradients of
    its own rows, so that the sum of the parameters' gradients over all processes is that of the whole loss.
    """
    return part if not dist.is_initialized() else _Gathered.apply(part, n_rows)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, n_rows: int) -> Tensor:
        ranks = range(dist.get_world_size())
        shares = [_share_of(rank, n_rows) for rank in ranks]
        # Collectives need parts of equal size.
        longest = max(rows.stop - rows.start for rows in shares)
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in ranks]
        dist.all_gather(parts, padded)
        return torch.cat([found[: rows.stop - rows.start] for found, rows in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[share(len(gradient))], None


def sum_gradients(model: nn.Module) -> None:
    """Replaces the gradients of every process by their sum. A parameter that a process did not use counts as zero."""
    if not dist.is_initialized():
        return
    used = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in used])
    dist.all_reduce(flat)
    for parameter, gradient in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def summed(part: Tensor) -> float:
    """The sum of the parts of a loss over all processes."""
    total = part.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total)
