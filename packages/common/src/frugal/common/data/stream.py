"""The micro-batches of one process, from any sample number on, built by loader processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from frugal.common.contracts import Batch
from frugal.common.data.contents import Contents
from frugal.common.data.loader import WAIT, Loader


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which sample numbers one process reads, micro-batch by micro-batch."""

    first_sample: int
    """A multiple of the global micro-batch."""
    micro_batch: int
    """Samples of a micro-batch over all processes."""
    rank: int
    world_size: int

    def numbers(self, micro_batch: int) -> np.ndarray:
        """(B,) int64: the contiguous part of a micro-batch that belongs to this process.

        Args:
            micro_batch: counted from the first one of this stream.
        """
        local = self.micro_batch // self.world_size
        first = self.first_sample + micro_batch * self.micro_batch + self.rank * local
        return np.arange(first, first + local, dtype=np.int64)


class _Numbers(Sampler[np.ndarray]):
    """Sample numbers of one process, a micro-batch at a time."""

    def __init__(self, share: Share, micro_batches: int | None) -> None:
        self._share = share
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[np.ndarray]:
        endless = itertools.count()
        return map(self._share.numbers, itertools.islice(endless, self._micro_batches))


class IndexedStream:
    """Micro-batches of samples that can be read in any order."""

    def __init__(
        self,
        samples: Dataset[dict[str, Any]],
        share: Share,
        *,
        epoch_samples: int,
        workers: int,
        pin_memory: bool,
        micro_batches: int | None = None,
        contents: Contents = (),
        limit: float = WAIT,
    ) -> None:
        """Stream a data set.

        Args:
            samples: from sample numbers (B,) to the fields of a ``Batch``.
            share: which numbers.
            epoch_samples: samples until every one has come once.
            workers: loader processes; 0 loads in this process.
            pin_memory: put the tensors where a GPU can fetch them.
            micro_batches: after which the stream ends; endless without it.
            contents: what it is read from.
            limit: seconds to wait for a batch.
        """
        self.contents = contents
        self.epoch_samples = epoch_samples
        self._loader = Loader(
            samples,
            sampler=_Numbers(share, micro_batches),
            workers=workers,
            pin_memory=pin_memory,
            limit=limit,
        )

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._loader:
            yield Batch(**fields)

    def state(self) -> dict[str, Any]:
        """Nothing: the sample number says it all."""
        return {}

    def scalars(self) -> dict[str, float]:
        """Nothing beside what the loop counts."""
        return {}
