"""Shards that can only be streamed: drawn with replacement, and continued where a run stopped.

Every loader process of every rank keeps a few *shard streams* open. A shard stream is an endless
row of shards, each drawn from all shards by (seed, name of the stream, number of the draw), and the
slots of a batch are filled from the streams in turn. What a checkpoint keeps of a stream is the
number of its draw and how many samples of that shard were used: it opens the shard again and passes
over those.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from frugal.common.contracts import Batch
from frugal.common.data.contents import Contents
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.loader import Loader
from frugal.common.data.sample_transform import Collator, SampleTransform
from frugal.common.data.samples import Fields, RawSample, assemble
from frugal.common.data.stores.streamed_tar import ShardSizes, Streamed, stream_tar
from frugal.common.data.stores.url import Patience
from frugal.common.data.stream import RankSlice
from frugal.common.randomness import sample_generator

_LOG = logging.getLogger("frugal")


class ShardDraws:
    """Which shard a shard stream opens next."""

    def __init__(
        self, urls: Sequence[Sequence[str]], weights: Sequence[float], *, seed: int
    ) -> None:
        """Draw from sources.

        Args:
            urls: the shards of every source.
            weights: share of every source in the draws; without them every shard is as likely.
            seed: another seed is another sequence.
        """
        self._urls = [list(part) for part in urls]
        shares = np.asarray(weights or [len(part) for part in urls], np.float64)
        self._bounds = np.cumsum(shares / shares.sum())
        self._seed = seed

    @property
    def num_shards(self) -> int:
        """Shards of all sources."""
        return sum(map(len, self._urls))

    def url(self, stream: str, draw: int) -> str:
        """The shard of a draw."""
        return self.shard(stream, draw)[1]

    def shard(self, stream: str, draw: int) -> tuple[int, str]:
        """The source of a draw, by its place, and its shard."""
        # "lane" is part of the seed: with another word every run would draw other shards
        generator = sample_generator(self._seed, f"shard of lane {stream}", draw)
        source = int(np.searchsorted(self._bounds, generator.random(), side="right"))
        source = min(source, len(self._urls) - 1)
        urls = self._urls[source]
        return source, urls[int(generator.integers(len(urls)))]


class ShardStream:
    """The samples of one drawn shard after the other, without end."""

    def __init__(
        self,
        shard_of: Callable[[int], tuple[int, str]],
        draw: int = 0,
        taken: int = 0,
        *,
        patience: Patience,
        sizes: ShardSizes,
        passed_over: PassedOver | None = None,
    ) -> None:
        """Continue a row.

        Args:
            shard_of: source and shard of a draw.
            draw: number of the draw to begin with.
            taken: samples of that shard to pass over.
            patience: limits the waiting.
            sizes: what is known of shards.
            passed_over: counts the members that belong to no sample.
        """
        self._shard_of = shard_of
        self._patience = patience
        self._sizes = sizes
        self._passed_over = passed_over
        self.draw = draw
        self.taken = taken
        self.source = 0
        # a stream cannot seek: what was used before is read again and passed over
        self._samples: Iterator[Streamed] = itertools.islice(self._open(), taken, None)

    def _open(self) -> Iterator[Streamed]:
        self.source, url = self._shard_of(self.draw)
        return stream_tar(
            url, patience=self._patience, sizes=self._sizes, passed_over=self._passed_over
        )

    def take(self) -> Streamed:
        """The next sample; it is of ``source``."""
        while (sample := next(self._samples, None)) is None:
            self.draw, self.taken = self.draw + 1, 0
            self._samples = self._open()
        self.taken += 1
        if not isinstance(sample[1], Damaged):
            self._patience.rewarded()
        return sample


@dataclass(eq=False)
class _Resampled(IterableDataset[dict[str, Any]]):
    """The micro-batches of one rank; each of its loader processes makes every n-th of them."""

    draws: ShardDraws
    fields: Fields
    transform: SampleTransform
    rank_slice: RankSlice
    state: dict[str, Any]
    num_streams: int
    """Shard streams of a loader process."""
    limit: float
    """Seconds to wait for data."""

    def _streams(self, worker: int, passed_over: PassedOver) -> list[ShardStream]:
        saved = self.state["workers"].get(str(worker), [])
        streams = []
        patience, sizes = Patience(self.limit), ShardSizes()
        for number in range(self.num_streams):
            # a run that continues on other ranks draws afresh: its streams have another origin
            name = f"{self.state['origin']}/{self.rank_slice.rank}/{worker}/{number}"
            place = saved[number] if number < len(saved) else (0, 0)
            shard_of = partial(self.draws.shard, name)
            stream = ShardStream(
                shard_of, *place, patience=patience, sizes=sizes, passed_over=passed_over
            )
            streams.append(stream)
        return streams

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        # Process `number` makes the micro-batches number, number + count, ... from here on. Streams
        # are named by the micro-batch within the run instead, so that the same streams make the
        # same micro-batches wherever the run was interrupted.
        worker = (self.rank_slice.first_sample // self.rank_slice.micro_batch + number) % count
        passed_over, num_warned = PassedOver(), 0
        streams = self._streams(worker, passed_over)
        for micro_batch in itertools.count(number, count):
            # numbers decide crops and captions, streams which samples come: both are the run's own
            collator = Collator(self.transform, self.rank_slice.numbers(micro_batch))
            for slot in range(len(collator.numbers)):
                stream = streams[slot % len(streams)]
                key, sample = stream.take()
                try:
                    collator.add(key, self._raw(sample), source=stream.source)
                except Damaged as damaged:
                    collator.skip(key, damaged, source=stream.source)
            if number == 0 and len(passed_over.counts) > num_warned:
                for line in passed_over.lines()[num_warned:]:
                    _LOG.warning("%s, and others like them: `shards check` counts all", line)
                num_warned = len(passed_over.counts)
            # travels with the batch: the loader is ahead of the training by what it prefetched, and
            # a checkpoint must say where the streams stood behind the last batch trained on
            progress = [(stream.draw, stream.taken) for stream in streams]
            yield collator.fields() | {"worker": worker, "progress": progress}

    def _raw(self, sample: dict[str, bytes] | Damaged) -> RawSample:
        if isinstance(sample, Damaged):
            raise sample
        return assemble(self.fields, sample, sample.__getitem__)


class ResampledStream:
    """Micro-batches of shards that are drawn with replacement."""

    def __init__(
        self,
        draws: ShardDraws,
        fields: Fields,
        transform: SampleTransform,
        rank_slice: RankSlice,
        *,
        state: dict[str, Any],
        epoch_samples: int,
        open_shards: int,
        workers: int,
        pin_memory: bool,
        contents: Contents = (),
        limit: float,
    ) -> None:
        """Stream shards.

        Args:
            draws: which shards.
            fields: where images and captions are in a sample.
            transform: what is done to a sample.
            rank_slice: which sample numbers.
            state: of an interrupted run with as many processes, or {}.
            epoch_samples: samples that count as an epoch.
            open_shards: shards whose samples this process mixes, where there are as many.
            workers: loader processes; 0 loads in this process.
            pin_memory: put the tensors where a GPU can fetch them.
            contents: what it is read from.
            limit: seconds to wait for data.
        """
        self.contents = contents
        self.epoch_samples = epoch_samples
        # a copy: whoever gave it may begin from there once more
        origin = state.get("origin", rank_slice.first_sample)
        self._state = {"origin": origin, "workers": dict(state.get("workers", {}))}
        dataset = _Resampled(
            draws,
            fields,
            transform,
            rank_slice,
            state=self._state,
            num_streams=max(min(open_shards, draws.num_shards) // max(workers, 1), 1),
            limit=limit,
        )
        self._loader = Loader(dataset, workers=workers, pin_memory=pin_memory, limit=limit)

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._loader:
            worker, progress = fields.pop("worker"), fields.pop("progress")
            self._state["workers"][str(worker)] = [list(place) for place in progress]
            yield Batch(**fields)

    def state(self) -> dict[str, Any]:
        """Where every shard stream of this process stands (JSON)."""
        return {"origin": self._state["origin"], "workers": dict(self._state["workers"])}

    def scalars(self) -> dict[str, float]:
        """Nothing beside what the loop counts."""
        return {}
