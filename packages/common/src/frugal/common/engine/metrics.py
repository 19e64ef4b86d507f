"""Numbers of training steps that stay on the device until somebody wants to see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Values = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that the device may not have taken yet."""

    number: int
    """From 1."""
    learning_rate: float
    names: list[str]
    """Of ``means``."""
    means: Tensor
    """(M,) float32: what the objective reported here, averaged over the micro-batches."""
    norm: Tensor
    """(): of the gradient, on every process alike; not finite where the step was skipped."""
    keys: list[list[str]]
    """Of the samples of every micro-batch."""

    @classmethod
    def of(
        cls,
        parts: list[dict[str, Tensor]],
        shares: Tensor,
        *,
        number: int,
        learning_rate: float,
        norm: Tensor,
        keys: list[list[str]],
    ) -> Step:
        """From what each of M micro-batches reported, scalars of the same names.

        ``shares``, (M,), are the weights of the micro-batches; they add up to 1.
        """
        names = sorted(parts[0])
        rows = [torch.stack([part[name].float() for name in names]) for part in parts]
        return cls(
            number=number,
            learning_rate=learning_rate,
            names=names,
            means=shares.to(torch.float32) @ torch.stack(rows),
            norm=norm.float(),
            keys=keys,
        )


def read(steps: Sequence[Step], mean: Callable[[Tensor], Tensor]) -> list[Values]:
    """The numbers of steps on the host: one reduction over the processes and one wait.

    Args:
        steps: the same on every process.
        mean: over the processes, of a float tensor.

    Returns:
        For every step, what the objective reported averaged over the processes, and
        ``gradient_norm``.
    """
    if not steps:
        return []
    means = mean(torch.cat([step.means for step in steps]))
    norms = torch.stack([step.norm for step in steps])
    numbers = iter(torch.cat([means, norms]).tolist())
    values = [{name: next(numbers) for name in step.names} for step in steps]
    return [row | {"gradient_norm": norm} for row, norm in zip(values, numbers, strict=True)]
