"""The micro-batches of one process, from any sample number on, built by loader processes.

A sample on its way to the model: :class:`RankSlice` says which numbers this process reads, the
order (``order.py``) where they are stored, :class:`ReaderCache` opens the shard, and a
:class:`Collator` prepares the samples and puts them into one batch.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from frugal.common.contracts import Batch
from frugal.common.data.contents import Contents
from frugal.common.data.damage import Damaged
from frugal.common.data.loader import WAIT, Loader
from frugal.common.data.order import Order
from frugal.common.data.sample_transform import Collator, SampleTransform
from frugal.common.data.samples import Fields, RawSample, Reader, Shard
from frugal.common.data.stored_vectors import StoredTexts, StoredVectors
from frugal.common.files import raise_open_files_limit, reason_of, refuse_exhaustion
from frugal.common.recipe import Recipe
from frugal.common.run import Run

_OPEN_SHARDS = 64
"""Shards that a process keeps open: more than a window of the order holds by default, so that none
is opened twice in a window."""


class ReaderCache:
    """The readers of many shards, of which this process keeps those open that it used last."""

    def __init__(
        self, shards: Sequence[Shard], fields: Fields, *, sources: Sequence[int] = ()
    ) -> None:
        """Read shards.

        Args:
            shards: by number.
            fields: where images and captions are in a sample.
            sources: the entry of ``data.train`` that each shard is of; all of the first by default.
        """
        self._shards = shards
        self._fields = fields
        self._sources = sources
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        raise_open_files_limit()

    def copy(self) -> ReaderCache:
        """The same shards with files of their own, to be read at the same time."""
        return ReaderCache(self._shards, self._fields, sources=self._sources)

    def __getstate__(self) -> dict[str, Any]:
        # open files cannot be pickled: a loader process opens its own
        return vars(self) | {"_readers": OrderedDict()}

    def reader(self, shard: int) -> Reader:
        """The reader of a shard by its number.

        Raises:
            Damaged: if the shard cannot be opened any more.
            InputError: if it is not the shard that was indexed, or too many files are open.
        """
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        try:  # a shard may have gone since the run began: its samples are damaged, the run goes on
            reader = self._shards[shard].open(self._fields)
        except OSError as error:
            refuse_exhaustion(error)
            raise Damaged("unreadable", reason_of(error)) from None
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader

    def name(self, shard: int) -> str:
        """The path of a shard."""
        return self._shards[shard].name

    def source(self, shard: int) -> int:
        """The entry of ``data.train`` that a shard is of."""
        return self._sources[shard] if self._sources else 0


class OrderedSamples(Dataset[dict[str, Any]]):
    """The endless run of samples that an order makes of shards."""

    def __init__(
        self,
        readers: ReaderCache,
        order: Order,
        transform: SampleTransform,
        *,
        choose: Callable[[RawSample, int], RawSample] | None = None,
        vectors: StoredVectors | None = None,
        texts: StoredTexts | None = None,
    ) -> None:
        """Put samples in an order.

        Args:
            readers: where they are read.
            order: which one a number stands for.
            transform: what is done to them.
            choose: what of a sample is used, from the sample and its number; all by default.
            vectors: what is stored of images, which are not read then.
            texts: what is stored of captions, which do not become tokens then.
        """
        self._readers = readers
        self._order = order
        self._transform = transform
        self._choose = choose
        self._vectors = vectors
        self._texts = texts

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        """The fields of the ``Batch`` of some sample numbers (B,), damaged samples included."""
        collator = Collator(self._transform, numbers)
        shards, indices = self._order.locate(numbers)
        for number, shard, index in zip(
            numbers.tolist(), shards.tolist(), indices.tolist(), strict=True
        ):
            # a place, until the reader knows the sample's own key: opening it may fail
            key, source = f"{self._readers.name(shard)}/{index}", self._readers.source(shard)
            try:
                reader = self._readers.reader(shard)
                key = reader.key(index)
                vector = None if self._vectors is None else self._vectors.of(shard, index, number)
                raw = self._raw(reader, index)
                raw = raw if self._choose is None else self._choose(raw, number)
                text = self._text_vector(raw, shard, index, number)
                collator.add(key, raw, source=source, vector=vector, text_vector=text)
            except Damaged as damaged:
                collator.skip(key, damaged, source=source)
        return collator.fields()

    def _raw(self, reader: Reader, index: int) -> RawSample:
        """What is read of a sample: as little as is needed."""
        if self._vectors is None:
            return reader.read(index)
        if self._texts is None or self._transform.needs_captions:
            return RawSample(b"", reader.captions(index))
        return RawSample(b"", [])

    def _text_vector(
        self, raw: RawSample, shard: int, index: int, number: int
    ) -> np.ndarray | None:
        if self._texts is None:
            return None
        if not raw.captions:  # not read, or there are none
            return self._texts.drawn(shard, index, lambda n: self._transform.row_of(n, number))
        row = self._transform.caption_row(raw, number)
        return self._texts.of(shard, index, row, sum(map(bool, raw.captions)))


@dataclass(frozen=True, kw_only=True)
class RankSlice:
    """Which sample numbers one process reads, micro-batch by micro-batch."""

    first_sample: int
    """A multiple of the global micro-batch."""
    micro_batch: int
    """Samples of a micro-batch over all processes."""
    rank: int
    world_size: int
    virtual: int = 1
    """Virtual processes that this process reads for, one after the other in every micro-batch."""

    @classmethod
    def of(cls, recipe: Recipe, run: Run, *, first_sample: int) -> RankSlice:
        """What of the samples from ``first_sample`` on this process reads."""
        return cls(
            first_sample=first_sample,
            micro_batch=recipe.batch_size // recipe.engine.accumulate,
            rank=run.rank,
            world_size=run.world_size,
            virtual=recipe.virtual_per_process(run.world_size),
        )

    def numbers(self, batch: int) -> np.ndarray:
        """(B,) int64: the contiguous part of a micro-batch that belongs to this process.

        Args:
            batch: counted from the first one of this stream; with virtual processes every one of
                them has a batch of its own in each micro-batch.
        """
        # Contiguous, in rank order: the ranks' parts side by side are the global micro-batch, and
        # the same sample is at the same place of it on any number of ranks.
        micro_batch, virtual = divmod(batch, self.virtual)
        local = self.micro_batch // (self.world_size * self.virtual)
        place = self.rank * self.virtual + virtual
        first = self.first_sample + micro_batch * self.micro_batch + place * local
        return np.arange(first, first + local, dtype=np.int64)


class _Numbers(Sampler[np.ndarray]):
    """Sample numbers of one process, a micro-batch at a time."""

    def __init__(self, rank_slice: RankSlice, micro_batches: int | None) -> None:
        self._rank_slice = rank_slice
        self._batches = None if micro_batches is None else micro_batches * rank_slice.virtual

    def __iter__(self) -> Iterator[np.ndarray]:
        # numbers only: a loader process finds, reads and decodes what they stand for, and a resume
        # starts at another number without reading anything that came before
        endless = itertools.count()
        return map(self._rank_slice.numbers, itertools.islice(endless, self._batches))


class IndexedStream:
    """Micro-batches of samples that can be read in any order."""

    def __init__(
        self,
        samples: Dataset[dict[str, Any]],
        rank_slice: RankSlice,
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
            rank_slice: which numbers.
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
            sampler=_Numbers(rank_slice, micro_batches),
            workers=workers,
            pin_memory=pin_memory,
            limit=limit,
            # the others wait in the middle of the step, and only together can they save
            finishes_alone=rank_slice.world_size > 1,
        )

    def __iter__(self) -> Iterator[Batch]:
        for fields in self._loader:
            yield Batch(**fields)

    def state(self) -> dict[str, Any]:
        """Nothing: the sample number says it all."""
        # the order is a function of the number, and the checkpoint holds the number of the step
        return {}

    def scalars(self) -> dict[str, float]:
        """Nothing beside what the loop counts."""
        return {}
