"""All-gather over the processes, with and without gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def place_in_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where there is only this process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_values(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of every process in the order of the ranks, without gradients.

    Args:
        local: (B, ...), of the same shape on every process.
        group: the processes; all of them by default.

    Returns:
        (W B, ...); ``local`` itself where there is only this process.
    """
    world_size = place_in_world(group)[1]
    local = local.detach()
    if world_size == 1:
        return local
    whole = local.new_empty((world_size * len(local), *local.shape[1:]))
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


def gather(local: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of every process in the order of the ranks, with gradients.

    What any process computes from a row flows back to the process that the row came from, summed
    over the processes.

    Args:
        local: (B, ...), of the same shape on every process.
        group: the processes; all of them by default.

    Returns:
        (W B, ...); ``local`` itself where there is only this process.
    """
    if place_in_world(group)[1] == 1:
        return local
    return _Gather.apply(local, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        ctx.shape = local.shape
        return gather_values(local, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        local = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=ctx.group)
        return local, None
