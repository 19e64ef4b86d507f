"""How fast a run is, in the machine's own terms."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here and now, every process measuring at once.

    The best of a few repetitions, so that it is an upper line and not an average; of a single one
    where products are slow, as in float16 on CPUs.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best, spent = float("inf"), 0.0
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > 0.5:
            break
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Means and rates between two log lines."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._waited = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start = time.perf_counter()

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
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, values: dict[str, float]) -> None:
        """The numbers of one step."""
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> tuple[dict[str, float], float, float]:
        """(means, seconds per step, share of the time spent waiting) since the last call."""
        for before, behind in self._idle:
            behind.synchronize()
            self._waited += before.elapsed_time(behind) / 1000
        elapsed = time.perf_counter() - self._start
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        result = means, elapsed / self._steps, self._waited / elapsed
        self._clear()
        return result
