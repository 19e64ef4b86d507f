"""The captions of a pool, unit by unit, read without their images and ahead of the text tower."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from frugal.cit.texts import TextChoice
from frugal.common.contracts import TrainedModel
from frugal.common.data.config import PairData, make_transform, open_data
from frugal.common.data.contents import Contents
from frugal.common.data.damage import Damaged, DamageNote, note_of
from frugal.common.data.loader import WAIT, Loader
from frugal.common.data.order import Order
from frugal.common.data.sample_transform import SampleTransform
from frugal.common.data.samples import Shard
from frugal.common.data.stored_vectors import StoredVectors
from frugal.common.data.stream import ReaderCache
from frugal.common.data.tokenizers import text_length
from frugal.common.errors import InputError
from frugal.common.recipe import Recipe
from frugal.common.run import Run

NO_TEXT, UNREADABLE = -1, -2
"""In place of the text of a sample that has no usable one, or is damaged."""


@dataclass(frozen=True)
class UnitTexts:
    """One text of every sample of a unit, as token ids."""

    token_ids: Tensor
    """(B, T) int64, padded on the right to the longest."""
    lengths: Tensor
    """(B,) int64: tokens before the padding."""
    texts: Tensor
    """(B,) int16: which text of its sample each is, :data:`NO_TEXT` or :data:`UNREADABLE`."""
    damage_notes: list[DamageNote] = field(default_factory=list)
    """What is wrong with those that are unreadable."""


@dataclass(frozen=True)
class Pool:
    """All pairs that a run may choose from, in an endless order."""

    shards: Sequence[Shard]
    readers: ReaderCache
    order: Order
    choice: TextChoice
    transform: SampleTransform
    scan: int
    """Samples of a unit."""
    contents: Contents = ()
    """What it is read from."""
    vectors: StoredVectors | None = None
    """What is stored of images, which are not read then."""
    first_of_shard: np.ndarray = field(init=False)
    """(shards,) int64: samples in the shards before each."""

    def __post_init__(self) -> None:
        counts = np.array([shard.num_samples for shard in self.shards], np.int64)
        object.__setattr__(self, "first_of_shard", np.cumsum(counts) - counts)

    @property
    def samples(self) -> int:
        """Pairs, damaged ones included."""
        return self.order.samples

    def numbers(self, unit: int) -> np.ndarray:
        """(scan,) int64: which samples of the endless order are a unit."""
        return np.arange(unit * self.scan, (unit + 1) * self.scan, dtype=np.int64)

    def text(self, number: int) -> tuple[int, str] | None:
        """The text drawn for a sample, and which of its texts it is; None if it has none.

        Raises:
            Damaged: if its texts cannot be read.
        """
        (shard,), (index,) = (found.tolist() for found in self.order.locate(np.array([number])))
        return self.text_at(shard, index, number)

    def text_at(self, shard: int, index: int, number: int) -> tuple[int, str] | None:
        """As :meth:`text`, where the place of the sample is known."""
        return self.choice.draw(self.readers.reader(shard).captions(index), number)


def open_pool(
    data: PairData,
    recipe: Recipe,
    run: Run,
    *,
    needed: int,
    scan: int,
    tags: tuple[int, ...] = (),
    engine: TrainedModel | None = None,
) -> Pool:
    """The pool of a recipe; every process of a run must call this.

    Args:
        data: where it lies and how it is read.
        recipe: says the seed, the tokens and the augmentation.
        run: this process.
        needed: pairs that one curation is to choose.
        scan: samples of a unit.
        tags: which texts of a sample are comma-separated tags.
        engine: holds the model, whose frozen image tower stored vectors must be of.

    Raises:
        InputError: if there is none, it cannot be read, or it is smaller than one curation.
    """
    if not data.train:
        raise InputError(
            "data.train is empty; say where the pool of image-text pairs is, such as --data.train "
            "'path/to/{00000..00010}.tar'"
        )
    transform = make_transform(data, recipe)
    opened = open_data(data, recipe, run, engine, called=("pool", "pairs"))
    if opened.order.samples < needed:
        raise InputError(
            f"the pool holds {opened.order.samples:,} pairs, fewer than one curation is to choose "
            f"(data.period x batch_size = {needed:,}); give more shards in data.train, or lower "
            "data.period"
        )
    return Pool(
        shards=opened.shards,
        readers=opened.readers,
        order=opened.order,
        choice=TextChoice(seed=recipe.run.seed, tags=tags),
        transform=transform,
        scan=scan,
        contents=opened.contents,
        vectors=opened.vectors,
    )


class _Texts(Dataset[dict[str, Any]]):
    """From the number of a unit to the fields of its texts."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __getitem__(self, unit: int) -> dict[str, Any]:
        numbers = self._pool.numbers(unit)
        texts = np.full(len(numbers), NO_TEXT, np.int16)
        tokens: list[list[int]] = [[] for _ in numbers]
        notes: list[DamageNote] = []
        shards, indices = (found.tolist() for found in self._pool.order.locate(numbers))
        tokenizer, length = self._pool.transform.tokenizer, self._pool.transform.text_length
        assert tokenizer is not None
        for row, number in enumerate(numbers.tolist()):
            try:
                drawn = self._pool.text_at(shards[row], indices[row], number)
            except Damaged as damaged:
                texts[row] = UNREADABLE
                readers, shard = self._pool.readers, shards[row]
                key = f"{readers.name(shard)}/{indices[row]}"
                notes.append(note_of(key, damaged, source=readers.source(shard)))
                continue
            if drawn is not None:
                texts[row] = drawn[0]
                ids = tokenizer.assemble(tokenizer.encode(drawn[1]), length)
                tokens[row] = ids[: text_length(ids, tokenizer)]
        token_ids, lengths = padded(tokens, pad_id=tokenizer.pad_id)
        return {
            "token_ids": token_ids,
            "lengths": lengths,
            "texts": torch.from_numpy(texts),
            "damage_notes": notes,
        }


def padded(tokens: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the right to the longest text, and their numbers (B,)."""
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int64, int(lengths.sum()))
    token_ids = np.full((len(tokens), max(int(lengths.max(initial=1)), 1)), pad_id, np.int64)
    token_ids[np.arange(token_ids.shape[1]) < lengths[:, None]] = flat
    return torch.from_numpy(token_ids), torch.from_numpy(lengths)


class _Turns(Sampler[int]):
    """The units that are one process's: every W-th."""

    def __init__(self, first: int, run: Run) -> None:
        self._first = first + (run.rank - first) % run.world_size
        self._step = run.world_size

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._first, self._step)


class UnitReader:
    """The units of this process one after the other, read in the background."""

    def __init__(
        self, pool: Pool, run: Run, *, first: int, workers: int, limit: float = WAIT
    ) -> None:
        """Start reading.

        Args:
            pool: what is read.
            run: says which units are this process's.
            first: no unit before this one is read.
            workers: processes that read; 0 reads in this process.
            limit: seconds to wait for a unit.
        """
        self._units = iter(
            Loader(_Texts(pool), sampler=_Turns(first, run), workers=workers, limit=limit)
        )
        self._returned: list[UnitTexts] = []

    def take(self) -> UnitTexts:
        """The next unit."""
        if self._returned:
            return self._returned.pop()
        return UnitTexts(**next(self._units))

    def give_back(self, unit: UnitTexts) -> None:
        """Have the unit that was taken last come once more."""
        self._returned.append(unit)
