"""Shards that can only be streamed: drawn with replacement, and continued where a run stopped.

Every loader process of every rank keeps a few *lanes* open. A lane is an endless row of shards,
each drawn from all shards by (seed, lane, number of the draw), and the slots of a batch are
filled from the lanes in turn. What a checkpoint keeps of a lane is the number of its draw and how
many samples of that shard were used: it opens the shard again and passes over those.
"""

from __future__ import annotations

import itertools
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from frugal.common.contracts import Batch
from frugal.common.data.contents import Contents
from frugal.common.data.damage import Damaged, Kind
from frugal.common.data.loader import Loader
from frugal.common.data.pairs import BatchBuilder, Preparation
from frugal.common.data.passed_over import PassedOver
from frugal.common.data.samples import Fields, RawSample, assemble
from frugal.common.data.stores.url import Patience, UrlStream
from frugal.common.data.stream import Share
from frugal.common.data.streamed import StreamedTar
from frugal.common.files import reason_of, refuse_exhaustion
from frugal.common.randomness import sample_generator

_LOG = logging.getLogger("frugal")
Streamed = tuple[str, dict[str, bytes] | Damaged]
"""``shard/key`` and the members of a sample by extension, or what is wrong with it."""


class ShardSizes:
    """Samples of the shards that one reader has read whole: what one lost of others."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def learn(self, url: str, samples: int) -> None:
        """A shard was read whole."""
        self._sizes[url] = samples

    def lost(self, url: str, read: int) -> tuple[int, str]:
        """(samples lost, in words) of a shard that ends with its ``read``-th, which is damaged.

        By what it held when it was read whole; otherwise by what the others hold on average.
        """
        done = f"sample {read} is damaged" if read > 1 else "no sample was read"
        if url in self._sizes:
            whole = self._sizes[url]
            return max(whole - read, 0), f"{done}, it held {whole}"
        if self._sizes:
            mean = round(sum(self._sizes.values()) / len(self._sizes))
            return max(mean - read, 0), f"{done}, others hold {mean} on average"
        return 0, f"{done}, and nobody knows how many it holds"


def stream_tar(
    url: str,
    *,
    patience: Patience | None = None,
    sizes: ShardSizes | None = None,
    passed_over: PassedOver | None = None,
) -> Iterator[Streamed]:
    """The samples of a tar in the order of the file; at least one, if only a damaged one.

    A shard that cannot be opened or goes on unreadably counts as one damaged sample with the
    number of those that were lost with it, and so does the last sample of a shard that ends
    without an end-of-archive marker. So does a whole archive whose command failed.

    Args:
        url: a path, ``pipe:`` with a command, or a URL.
        patience: limits the waiting; ten minutes by default.
        sizes: of other shards, and of this one when it was read before.
        passed_over: counts the members that belong to no sample.

    Raises:
        InputError: if nothing comes at all.
    """
    sizes = sizes or ShardSizes()
    try:
        stream = UrlStream(url, patience or Patience(600.0))
    except (OSError, ValueError) as error:
        refuse_exhaustion(error)
        lost, _ = sizes.lost(url, 1)
        yield url, Damaged("unreadable", reason_of(error), lost=lost)
        return
    try:
        yield from _samples(url, stream, sizes, passed_over)
    finally:
        stream.close()


def _samples(
    url: str, stream: UrlStream, sizes: ShardSizes, passed_over: PassedOver | None
) -> Iterator[Streamed]:
    archive = StreamedTar(stream, passed_over)
    told, read = False, 0
    try:
        for key, sample in archive:
            told, read = True, read + bool(key)
            yield f"{url}/{key}" if key else url, sample
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        cut = told or archive.pending
        where = f"{url}/{archive.pending}" if archive.pending else url
        reason = stream.failure() or reason_of(error)
        lost, words = sizes.lost(url, read + 1)
        kind: Kind = "truncated" if cut else "unreadable"
        yield where, Damaged(kind, f"{reason}; {words}", lost=lost)
        return
    reason = stream.failure()
    if not told:
        lost, words = sizes.lost(url, 1)
        yield url, Damaged("unreadable", f"{reason or 'it holds no sample'}; {words}", lost=lost)
        return
    sizes.learn(url, read)
    if reason:
        yield url, Damaged("truncated", reason)


class ShardDraws:
    """Which shard a lane opens next."""

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

    def url(self, lane: str, draw: int) -> str:
        """The shard of a draw."""
        return self.shard(lane, draw)[1]

    def shard(self, lane: str, draw: int) -> tuple[int, str]:
        """The source of a draw, by its place, and its shard."""
        generator = sample_generator(self._seed, f"shard of lane {lane}", draw)
        source = int(np.searchsorted(self._bounds, generator.random(), side="right"))
        source = min(source, len(self._urls) - 1)
        urls = self._urls[source]
        return source, urls[int(generator.integers(len(urls)))]


class Lane:
    """An endless row of samples."""

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


class _Resampled(IterableDataset[dict[str, Any]]):
    """The micro-batches of one process; each loader process makes every n-th of them."""

    def __init__(
        self,
        draws: ShardDraws,
        fields: Fields,
        preparation: Preparation,
        share: Share,
        *,
        state: dict[str, Any],
        num_lanes: int,
        limit: float,
    ) -> None:
        self._draws = draws
        self._fields = fields
        self._preparation = preparation
        self._share = share
        self._state = state
        self._num_lanes = num_lanes
        self._limit = limit

    def _lanes(self, worker: int, passed_over: PassedOver) -> list[Lane]:
        saved = self._state["workers"].get(str(worker), [])
        lanes = []
        patience, sizes = Patience(self._limit), ShardSizes()
        for number in range(self._num_lanes):
            # a run that continues on other ranks draws afresh: its lanes have another origin
            name = f"{self._state['origin']}/{self._share.rank}/{worker}/{number}"
            place = saved[number] if number < len(saved) else (0, 0)
            shard_of = partial(self._draws.shard, name)
            lanes.append(
                Lane(shard_of, *place, patience=patience, sizes=sizes, passed_over=passed_over)
            )
        return lanes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        # the same lanes make the same micro-batches wherever a run was interrupted
        worker = (self._share.first_sample // self._share.micro_batch + number) % count
        passed_over, told = PassedOver(), 0
        lanes = self._lanes(worker, passed_over)
        for micro_batch in itertools.count(number, count):
            builder = BatchBuilder(self._preparation, self._share.numbers(micro_batch))
            for slot in range(len(builder.numbers)):
                lane = lanes[slot % len(lanes)]
                key, sample = lane.take()
                try:
                    builder.add(key, self._raw(sample), source=lane.source)
                except Damaged as damaged:
                    builder.skip(key, damaged, source=lane.source)
            if number == 0 and len(passed_over.counts) > told:
                for line in passed_over.lines()[told:]:
                    _LOG.warning("%s, and others like them: `shards check` counts all", line)
                told = len(passed_over.counts)
            progress = [(lane.draw, lane.taken) for lane in lanes]
            yield builder.fields() | {"worker": worker, "progress": progress}

    def _raw(self, sample: dict[str, bytes] | Damaged) -> RawSample:
        if isinstance(sample, Damaged):
            raise sample
        return assemble(self._fields, sample, sample.__getitem__)


class ResampledStream:
    """Micro-batches of shards that are drawn with replacement."""

    def __init__(
        self,
        draws: ShardDraws,
        fields: Fields,
        preparation: Preparation,
        share: Share,
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
            preparation: what is done to a sample.
            share: which sample numbers.
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
        self._state = state or {"origin": share.first_sample, "workers": {}}
        dataset = _Resampled(
            draws,
            fields,
            preparation,
            share,
            state=self._state,
            num_lanes=max(min(open_shards, draws.num_shards) // max(workers, 1), 1),
            limit=limit,
        )
        self._loader = Loader(dataset, workers=workers, pin_memory=pin_memory, limit=limit)

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._loader:
            worker, progress = fields.pop("worker"), fields.pop("progress")
            self._state["workers"][str(worker)] = [list(place) for place in progress]
            yield Batch(**fields)

    def state(self) -> dict[str, Any]:
        """Where every lane of this process stands (JSON)."""
        return {"origin": self._state["origin"], "workers": dict(self._state["workers"])}

    def scalars(self) -> dict[str, float]:
        """Nothing beside what the loop counts."""
        return {}
