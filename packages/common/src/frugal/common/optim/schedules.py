"""Learning rates as pure functions of the samples seen, so that any batch size and resume agree."""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import override

from frugal.common.contracts import Schedule
from frugal.common.errors import InputError
from frugal.common.ranges import CountOrZero, NotNegative, check_ranges


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine; a pure function of the samples seen before a step."""

    warmup_samples: CountOrZero = 0
    """Samples until the peak is reached."""
    start: NotNegative = 0.0
    """Learning rate of the very first step."""
    floor: NotNegative = 0.0
    """Learning rate at the end and beyond."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule")
        if self.warmup_samples > self.samples:
            raise InputError(
                f"schedule.warmup_samples is {self.warmup_samples}, more than schedule.samples "
                f"({self.samples}); warm up for less, or train on more"
            )

    @override
    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        if samples_seen < self.warmup_samples:
            return self.start + (peak - self.start) * samples_seen / self.warmup_samples
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return self.floor + (peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(WarmupCosine):
    """Linear warm-up, then a straight line down to the floor."""

    @override
    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        if samples_seen < self.warmup_samples:
            return super().learning_rate(samples_seen, peak=peak)
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return peak + (self.floor - peak) * progress
