"""Learning rates as pure functions of the samples seen, so that any batch size and resume agree."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from typing_extensions import override

from frugal.common.contracts import Schedule
from frugal.common.errors import InputError
from frugal.common.ranges import (
    Count,
    CountOrZero,
    NotNegative,
    PositiveShare,
    check_choices,
    check_ranges,
)


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
        return self._behind_warmup(samples_seen, peak=peak)

    def _behind_warmup(self, samples_seen: int, *, peak: float) -> float:
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return self.floor + (peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(WarmupCosine):
    """Linear warm-up, then a straight line down to the floor."""

    @override
    def _behind_warmup(self, samples_seen: int, *, peak: float) -> float:
        decay = max(self.samples - self.warmup_samples, 1)
        progress = min((samples_seen - self.warmup_samples) / decay, 1.0)
        return peak + (self.floor - peak) * progress


@dataclass(frozen=True, kw_only=True)
class WarmupConstantCooldown(WarmupCosine):
    """Linear warm-up, the peak for as long as one likes, then a short way down to the floor.

    What a run learns at the peak does not depend on how long it is to be, so that a branch of it
    (``frugal.common.branch``) may cool down from another step. The forms of the way down are those
    of "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"
    (arXiv:2405.18392).
    """

    cooldown_samples: Count | None = None
    """Samples of the way down, the last ones of the run; a fifth of all without it."""
    cooldown_from: Count | None = None
    """Step after which the way down begins; it sets schedule.samples. Without it the way down
    begins where schedule.samples leaves room for it."""
    shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """Of the way down."""

    def __post_init__(self) -> None:
        check_choices(self, "schedule")
        if self.cooldown_from is not None:  # samples are what for_batch_size makes of it
            check_ranges(self, "schedule")
            return
        super().__post_init__()
        if self.warmup_samples + self._cooldown > self.samples:
            raise InputError(
                f"schedule.warmup_samples and schedule.cooldown_samples are {self.warmup_samples} "
                f"and {self._cooldown}, together more than schedule.samples "
                f"({self.samples}); shorten them, or train on more"
            )

    @property
    def _cooldown(self) -> int:
        return self.cooldown_samples or -(-self.samples // 5)

    @override
    def for_batch_size(self, batch_size: int) -> Self:
        """The same with ``samples`` set by ``cooldown_from``."""
        if self.cooldown_from is None:
            return self
        at_peak = self.cooldown_from * batch_size
        if self.warmup_samples > at_peak:
            raise InputError(
                f"schedule.cooldown_from is step {self.cooldown_from}, which is after {at_peak} "
                f"samples, but schedule.warmup_samples is {self.warmup_samples}; cool down later"
            )
        samples = at_peak + (self.cooldown_samples or -(-at_peak // 4))
        if samples >= 1 << 63:
            raise InputError(
                f"schedule.cooldown_from is step {self.cooldown_from}, so that the run would train "
                f"on {samples} samples, must be less than 2^63; cool down earlier"
            )
        return replace(self, samples=samples)

    @override
    def _behind_warmup(self, samples_seen: int, *, peak: float) -> float:
        cooled = samples_seen - (self.samples - self._cooldown)
        progress = min(max(cooled / self._cooldown, 0.0), 1.0)
        way = math.sqrt(progress) if self.shape == "1-sqrt" else progress
        return peak + (self.floor - peak) * way


@dataclass(frozen=True, kw_only=True)
class RisingRate(Schedule):
    """From a small share of the peak up to all of it, by the same factor in every step.

    For finding a learning rate: Smith, "Cyclical Learning Rates for Training Neural Networks"
    (arXiv:1506.01186), section 3.3, with the exponential rise that is usual since.
    """

    least: PositiveShare = 1e-5
    """Of the peak: the rate of the very first step."""

    def __post_init__(self) -> None:
        check_ranges(self, "schedule")

    @override
    def learning_rate(self, samples_seen: int, *, peak: float) -> float:
        """The learning rate of the step that starts after ``samples_seen`` samples."""
        return peak * self.least ** (1 - min(samples_seen / self.samples, 1.0))
