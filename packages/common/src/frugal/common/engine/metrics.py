"""Numbers of training steps that stay on the device until somebody wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal.common.engine.digests import PendingDigests

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step reports; the device may not have taken it yet."""

    step: int
    """Steps of the run that are done with it, itself included."""
    learning_rate: float
    names: list[str]
    """What each of ``means`` is called."""
    means: Tensor
    """(M,) float32: what the objective reported here, averaged over the micro-batches."""
    norm: Tensor
    """(): norm of the gradient, on every process alike; not finite where the step was skipped."""
    keys: list[str]
    """Where the samples of this process come from."""
    digests: PendingDigests | None = None
    """Of its samples and its gradient, where they are wanted."""


def weighted_means(
    reported: Sequence[dict[str, Tensor]], weights: Tensor
) -> tuple[list[str], Tensor]:
    """Names, and (N,) float32 the weighted means of what each of M micro-batches reported.

    ``weights``, (M,), add up to 1; every micro-batch reports scalars of the same names.
    """
    names = sorted(reported[0])
    rows = [torch.stack([values[name].float() for name in names]) for values in reported]
    return names, weights.to(torch.float32) @ torch.stack(rows)


def fetch(pending: Sequence[StepMetrics], mean: Callable[[Tensor], Tensor]) -> list[Values]:
    """The numbers of steps on the host: one reduction over the processes and one wait.

    Args:
        pending: the steps, the same on every process.
        mean: over the processes, of a float tensor.

    Returns:
        For every step, what the objective reported averaged over the processes, and
        ``gradient_norm``.
    """
    if not pending:
        return []
    means = mean(torch.cat([metrics.means for metrics in pending]))
    norms = torch.stack([metrics.norm for metrics in pending])
    numbers = iter(torch.cat([means, norms]).tolist())
    values = [{name: next(numbers) for name in metrics.names} for metrics in pending]
    return [row | {"gradient_norm": norm} for row, norm in zip(values, numbers, strict=True)]
