"""Batch norm over the images of all processes.

torch has one for CUDA only. With this one the number of processes, and where they run, changes no
number beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from frugal.common.distributed import sum_over_processes

_COUNTED: ContextVar[Tensor | None] = ContextVar("counted", default=None)


@contextmanager
def counting(valid: Tensor) -> Iterator[None]:
    """While open, the rows of a batch that are not valid count in no statistic of vectors.

    Args:
        valid: (B,) bool.
    """
    token = _COUNTED.set(valid)
    try:
        yield
    finally:
        _COUNTED.reset(token)


class SharedBatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of the joint batch.

    Buffers have its names and meaning. A process may have no image at all.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W), normalized; computed in float32 at least, in the dtype of what came."""
        if not self.training:
            return super().forward(input)
        maps = precise(input)
        elements = maps.new_full((1,), maps.numel() / maps.shape[1])
        sums = sum_over_processes(torch.cat([maps.sum((0, 2, 3)), elements]))  # (C + 1,)
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count  # (C,)
        centered = maps - mean[:, None, None]
        variance = sum_over_processes(centered.square().sum((0, 2, 3))) / count
        _remember(self, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        factor = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centered, factor[:, None, None]).to(input)


class SharedVectorNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` of vectors whose statistics in training are those of the joint batch.

    Buffers have its names and meaning. Rows that :func:`counting` leaves out are normalized too,
    and change nothing for the others.
    """

    @override
    def forward(self, input: Tensor) -> Tensor:
        """(B, C), normalized; computed in float32 at least, in the dtype of what came."""
        if not self.training:
            return super().forward(input)
        rows = precise(input)
        valid = _COUNTED.get()
        weight = torch.ones_like(rows[:, :1]) if valid is None else valid[:, None].to(rows)
        sums = sum_over_processes(torch.cat([(rows * weight).sum(0), weight.sum(0)]))  # (C + 1,)
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count  # (C,)
        centered = rows - mean
        variance = sum_over_processes((centered.square() * weight).sum(0)) / count
        _remember(self, mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normalized = centered * (variance + self.eps).rsqrt()
        if self.affine:
            normalized = torch.addcmul(self.bias, normalized, self.weight)
        return normalized.to(input)


def _remember(layer: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics towards those of a batch, the variance being unbiased."""
    assert layer.momentum is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.running_mean.lerp_(mean, layer.momentum)
    layer.running_var.lerp_(variance, layer.momentum)
    layer.num_batches_tracked += 1


def precise(values: Tensor) -> Tensor:
    """The same in float32, or in float64 where that is what it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def share_statistics(module: nn.Module) -> None:
    """Replace every ``nn.BatchNorm2d`` below a module that was just built."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, SharedBatchNorm(child.num_features, eps=child.eps))
