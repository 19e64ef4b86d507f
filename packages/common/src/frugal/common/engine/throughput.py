"""How fast a run is, in the machine's own terms."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured once in a process, by all processes at once.

    The best of a few repetitions, so that it is an upper line and not an average. A small product
    will do where a CPU is slow, as it is in float16.
    """
    if device.type == "cuda":
        return _products_per_second(device, dtype, size=8192)
    small = _products_per_second(device, dtype, size=256)
    return small if small < _SLOW else _products_per_second(device, dtype, size=1024)


_SLOW = 4e9
"""FLOP/s that a core reaches in types that it has instructions for, and in no others."""


def _products_per_second(device: torch.device, dtype: torch.dtype, *, size: int) -> float:
    # numbers like those of a model: a GPU multiplies zeros faster
    rows = torch.randn(2, 64, size, generator=torch.Generator().manual_seed(0))
    left, right = rows.to(device, dtype).repeat(1, size // 64, 1)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Line:
    """What happened between two log lines."""

    means: dict[str, float]
    step_seconds: float
    """Of one step, its wait for data included; nothing else is."""
    wait: float
    """Share of that which was spent waiting for data."""
    pauses: dict[str, float]
    """Seconds spent on what is no step, by its name."""


class Meter:
    """Means and rates between two log lines."""

    def __init__(
        self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Begin to count.

        Args:
            device: that the steps run on.
            clock: seconds, from any beginning.
        """
        self._device = device
        self._clock = clock
        self._begun = clock()
        self._pause_begun: float | None = None
        self.paused_seconds: dict[str, float] = {}
        """Since the beginning, by name."""
        self._waited_before = 0.0
        self._clear()

    @property
    def seconds(self) -> float:
        """Spent on steps since the beginning."""
        now = self._clock() if self._pause_begun is None else self._pause_begun
        return now - self._begun - sum(self.paused_seconds.values())

    @property
    def num_steps(self) -> int:
        """Steps since the last :meth:`take`."""
        return self._steps

    def spent(self) -> dict[str, float]:
        """Seconds since the beginning: of steps, of waiting for data up to :meth:`take`, of pauses.

        They add up to all that has passed.
        """
        waiting = min(self._waited_before, self.seconds)
        return {"steps": self.seconds - waiting, "waiting": waiting, **self.paused_seconds}

    def _clear(self) -> None:
        self._pauses: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._waited = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = self._clock()

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Around what is no step: its time is told under its own name and slows no rate down."""
        _wait(self._device)  # what is still to be done there belongs to the steps before
        self._pause_begun = begun = self._clock()
        try:
            yield
            _wait(self._device)
        finally:
            spent = self._clock() - begun
            for seconds in (self._pauses, self.paused_seconds):
                seconds[name] = seconds.get(name, 0.0) + spent
            self._pause_begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        if self._device.type == "cuda":
            # the host is ahead of the device and may well wait: what counts is that the device has
            # nothing to do between what was queued before and what is queued behind
            before, behind = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            behind.record()
            self._idle.append((before, behind))
            return
        start = self._clock()
        yield
        self._waited += self._clock() - start

    def add(self, values: dict[str, float]) -> None:
        """The numbers of one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> Line:
        """What happened since the last call."""
        for before, behind in self._idle:
            behind.synchronize()
            self._waited += before.elapsed_time(behind) / 1000
        self._waited_before += self._waited
        elapsed = self._clock() - self._start - sum(self._pauses.values())
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        line = Line(means, elapsed / max(self._steps, 1), self._waited / elapsed, self._pauses)
        self._clear()
        return line
