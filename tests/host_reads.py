"""Refuses what makes the host wait for a number of the device, also where both are a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
READING_OPERATIONS = (
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero,
    ATEN.unique_dim, ATEN._unique2, ATEN.unique_consecutive, ATEN.bincount, ATEN.multinomial,
)  # fmt: skip
"""Operations whose result, or the shape of it, is known on the host when they return."""
READING_METHODS = (
    torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu,
    torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__,
    torch.Tensor.__repr__, torch.Tensor.__format__,
)  # fmt: skip
"""Of which some copy the memory of a tensor on a CPU without an operation."""


class NoReadingOperation(TorchDispatchMode):
    """Catches operations, those of a backward pass too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        assert packet not in READING_OPERATIONS, f"{func} reads the device"
        if packet in (ATEN.index, ATEN.index_put, ATEN.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing by a mask reads the device"
        if packet is ATEN.repeat_interleave and kwargs.get("output_size") is None:
            raise AssertionError("repeat_interleave without output_size reads the device")
        return func(*args, **kwargs)


class NoReadingMethod(TorchFunctionMode):
    """Catches calls of a tensor's methods."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READING_METHODS, f"Tensor.{func.__name__} reads the device"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_is_read() -> Iterator[None]:
    """While open, reading a number of a tensor is an AssertionError."""
    with NoReadingMethod(), NoReadingOperation():
        yield


@contextlib.contextmanager
def nothing_waits_for_the_gpu() -> Iterator[None]:
    """While open, an operation that waits for the GPU is a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WatchedStream:
    """Batches that were read before; what happens between two of them is watched."""

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        guard: Callable[[], contextlib.AbstractContextManager[None]],
        watched: Callable[[int], bool],
        accumulate: int = 1,
    ) -> None:
        """Take what a stream gives.

        Args:
            batches: the micro-batches.
            guard: what watches.
            watched: whether it watches a step, counted from 1.
            accumulate: micro-batches of a step.
        """
        self._batches: Sequence[Any] = list(batches)
        self._guard = guard
        self._watched = watched
        self._accumulate = accumulate
        self._open = contextlib.ExitStack()
        self.epoch_samples = sum(map(len, self._batches))
        self.steps_watched: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches):
            self.close()
            step, rest = divmod(number + 1, self._accumulate)
            if not rest and self._watched(step):
                self.steps_watched.append(step)
                self._open.enter_context(self._guard())
            yield batch

    def close(self) -> None:
        """MetricsLogger no longer; must be called at the end, whatever happened."""
        self._open.close()

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def scalars(self) -> dict[str, float]:
        """Nothing."""
        return {}
