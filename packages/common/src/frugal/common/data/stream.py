"""The micro-batches of one process, from any sample number on, built by loader processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from frugal.common.contracts import Batch
from frugal.common.errors import InputError

PREFETCHED = 2
"""Batches that each loader process keeps ready."""


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
    """Endless sample numbers of one process, a micro-batch at a time."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def __iter__(self) -> Iterator[np.ndarray]:
        micro_batch = 0
        while True:
            yield self._share.numbers(micro_batch)
            micro_batch += 1


class _Guarded(Dataset[dict[str, Any]]):
    """Hands a user's mistake found in a loader process over as a value.

    The loader would wrap it into an exception whose message holds a whole stack trace.
    """

    def __init__(self, samples: Dataset[dict[str, Any]]) -> None:
        self._samples = samples

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        try:
            return self._samples[numbers]
        except InputError as error:
            return {"mistake": str(error)}


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
    ) -> None:
        """Stream a data set.

        Args:
            samples: from sample numbers (B,) to the fields of a ``Batch``.
            share: which numbers.
            epoch_samples: samples until every one has come once.
            workers: loader processes; 0 loads in this process.
            pin_memory: put the tensors where a GPU can fetch them.
        """
        self.epoch_samples = epoch_samples
        self._loader = DataLoader(
            _Guarded(samples),
            sampler=_Numbers(share),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._loader:
            if "mistake" in fields:
                raise InputError(fields["mistake"])
            yield Batch(**fields)

    def state(self) -> dict[str, Any]:
        """Nothing: the sample number says it all."""
        return {}
