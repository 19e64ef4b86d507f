"""The global order of samples: a pure function of the seed and the number of a sample.

Sample number n of a run is position ``n % N`` of epoch ``n // N``. In every epoch the shards are
permuted, each ``window`` consecutive ones form a window, and the samples of a window are permuted:
an epoch holds every sample exactly once, and a reader touches only ``window`` shards at a time.
Ranks, loader workers and what was read before play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator

_CYCLE = 1 << 14
"""Samples over which a mixture holds every source in its share: short enough that any stretch of a
run is mixed as the whole, long enough that a weight of 1 in 16,384 still occurs."""


class Order(Protocol):
    """Where every sample of an endless run is found.

    A pure function of its settings and the sample number: a resumed run, another number of ranks or
    of loader workers asks for the same numbers and gets the same samples.
    """

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        ...

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): their shards (n,) and their indices within them (n,)."""
        ...


class GlobalOrder:
    """Every sample once per epoch.

    Shards are opened a window at a time, since a disk or network file system reads a few files well
    and tens of thousands badly; mixing within windows of drawn shards is the shuffle that
    remains possible.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, window: int, source: int = 0) -> None:
        """Order the samples of shards.

        Args:
            counts: samples of every shard.
            seed: another seed is another order.
            window: shards whose samples are mixed.
            source: sets of shards that are read side by side each get a number of their own.
        """
        self.samples = sum(counts)
        if not self.samples:
            raise ValueError("an order needs at least one sample")
        self._counts = np.asarray(counts, np.int64)
        self._seed = seed
        self._source = source
        self._window = window
        self._cache()

    def _cache(self) -> None:
        # An order is drawn once per window, not once per batch. Loader workers ask for batches in
        # turn, so that those of two neighboring windows or epochs may alternate; no others do.
        self._epoch = lru_cache(2)(self._draw_epoch)
        self._samples = lru_cache(2)(self._draw_window)

    def __getstate__(self) -> dict[str, object]:
        # caches cannot be pickled, and a loader worker draws what it needs anew
        return {
            name: value for name, value in vars(self).items() if not hasattr(value, "cache_clear")
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._cache()

    def _generator(self, of: str, number: int) -> np.random.Generator:
        return sample_generator(self._seed, f"order {self._source}: {of}", number)

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position at which each window begins."""
        shards = self._generator("shards", epoch).permutation(len(self._counts))
        ends = np.cumsum(self._counts[shards])
        # what lies in front of shards 0, window, 2 window, ...; the last window may be smaller
        starts = np.concatenate([[0], ends])[: len(shards) : self._window]
        return shards, starts

    def _draw_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of a window in order: their shards, and their indices within them."""
        first = window * self._window
        shards = self._epoch(epoch)[0][first : first + self._window]
        counts = self._counts[shards]
        total = int(counts.sum())
        # every sample of the window in storage order, without a loop over its shards
        shard = np.repeat(shards, counts)
        index = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        # one permutation of the whole window: samples of its shards mix, and each comes once
        order = self._generator(f"samples of epoch {epoch}", window).permutation(total)
        return shard[order], index[order]

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): their shards (n,) and their indices within them (n,)."""
        shards = np.empty(len(numbers), np.int64)
        indices = np.empty(len(numbers), np.int64)
        epochs, positions = np.divmod(np.asarray(numbers, np.int64), self.samples)
        for epoch in np.unique(epochs).tolist():
            starts = self._epoch(epoch)[1]
            # empty shards make windows of equal start: the last of them holds the position
            windows = np.searchsorted(starts, positions, side="right") - 1
            for window in np.unique(windows[epochs == epoch]).tolist():
                chosen = (epochs == epoch) & (windows == window)
                shard, index = self._samples(epoch, window)
                within = positions[chosen] - starts[window]
                shards[chosen], indices[chosen] = shard[within], index[within]
        return shards, indices


class WeightedOrder:
    """Several sources mixed in fixed shares, each in its own global order.

    Every 16,384 samples hold each source in its share to the nearest sample, in a drawn
    arrangement. A source goes through its own epochs, each sample once in each; an epoch of the
    mixture is as many samples as the sources hold together.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        window: int,
    ) -> None:
        """Mix sources.

        Args:
            sources: samples of every shard of every source; shards are numbered through them.
            weights: share of every source, in any unit.
            seed: another seed is another order.
            window: shards of a source whose samples are mixed.

        Raises:
            InputError: if the share of a source is too small to occur.
        """
        self.samples = sum(sum(counts) for counts in sources)
        self._seed = seed
        self._orders = [
            GlobalOrder(counts, seed=seed, window=window, source=number)
            for number, counts in enumerate(sources)
        ]
        self._first_shard = np.cumsum([0, *(len(counts) for counts in sources)])
        self._shares = _whole_shares(weights, _CYCLE)
        if not self._shares.all():
            raise InputError(
                f"data.weights {tuple(weights)} give a source fewer than one of {_CYCLE:,} "
                "samples; raise its weight or leave it out"
            )

    def _cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of every slot of a cycle, and how many of that source came before it.

        Returns:
            two (16384,) int64.
        """
        # exact counts in a drawn arrangement: drawing each slot by itself would drift from the
        # shares, and then the n-th sample of a source could only be found by replaying the run
        source = np.repeat(np.arange(len(self._shares)), self._shares)
        source = sample_generator(self._seed, "mixture", cycle).permutation(source)
        before = np.empty(_CYCLE, np.int64)
        for number, share in enumerate(self._shares):
            before[source == number] = np.arange(share)
        return source, before

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers (n,): their shards (n,) and their indices within them (n,)."""
        shards = np.empty(len(numbers), np.int64)
        indices = np.empty(len(numbers), np.int64)
        cycles, slots = np.divmod(np.asarray(numbers, np.int64), _CYCLE)
        for cycle in np.unique(cycles).tolist():
            source, before = self._cycle(cycle)
            for number, order in enumerate(self._orders):
                chosen = np.flatnonzero((cycles == cycle) & (source[slots] == number))
                # every cycle takes the same count of a source, so its place in its own endless
                # order follows from the cycle alone: a resume needs no counters
                numbers_of_source = cycle * self._shares[number] + before[slots[chosen]]
                shard, index = order.locate(numbers_of_source)
                shards[chosen] = shard + self._first_shard[number]
                indices[chosen] = index
        return shards, indices


def _whole_shares(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers that add up to ``total`` in proportion to the weights (largest remainder)."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    missing = total - int(shares.sum())
    # stable, so that equal remainders are settled alike on every machine
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares
