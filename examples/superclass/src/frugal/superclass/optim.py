"""How weights are stepped: momentum, and a learning rate in the shape of a trapezoid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from frugal.common.contracts import Optimizer, Schedule
from frugal.common.ranges import Share, ShareBelowOne, check_ranges


@dataclass(frozen=True, kw_only=True)
class Momentum(Optimizer):
    """Stochastic gradient descent with Nesterov momentum."""

    momentum: ShareBelowOne = 0.9

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    @override
    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """One group; the fused kernel leaves everything as it is where ``found_inf`` says so."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.optim.SGD(
            [{"params": trained, "lr_scale": 1.0}],
            lr=0.0,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            fused=True,
        )


@dataclass(frozen=True, kw_only=True)
class Trapezoid(Schedule):
    """Up in a line, level, and down in a line to zero."""

    warmup: Share = 0.1
    """Of the samples."""
    cooldown: Share = 0.2
    """Of the samples."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule")

    @override
    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        up = (samples_seen + 1) / max(self.warmup * self.samples, 1)
        down = (self.samples - samples_seen) / max(self.cooldown * self.samples, 1)
        return peak * max(min(up, 1.0, down), 0.0)
