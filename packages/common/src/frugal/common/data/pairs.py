"""Samples by number: read, decode, draw a caption and tokenize it, put in batches."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from frugal.common.contracts import DamageNote, TextReduction
from frugal.common.data.damage import REPAIRED, Damaged, note_of
from frugal.common.data.grouping import describe_members
from frugal.common.data.order import Order
from frugal.common.data.samples import Fields, RawSample, Reader, Shard
from frugal.common.data.tokenizers import text_length
from frugal.common.data.transforms import Augmentation
from frugal.common.files import raise_open_files_limit, reason_of, refuse_exhaustion
from frugal.common.randomness import sample_generator
from frugal.common.reduction.text import Placed

_OPEN_SHARDS = 64


class Shelf:
    """Many shards, of which this process keeps a few open."""

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

    def again(self) -> Shelf:
        """The same shards with files of their own, to be read at the same time."""
        return Shelf(self._shards, self._fields, sources=self._sources)

    def __getstate__(self) -> dict[str, Any]:
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
        try:
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


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to a sample between the store and the model; all draws belong to the sample."""

    seed: int
    augmentation: Augmentation
    image_size: tuple[int, int]
    """(height, width)."""
    tokenizer: Any | None
    """None for images without text."""
    text: TextReduction | None
    text_length: int
    """Most tokens of a caption."""
    num_classes: int | None = None
    """Where given, every sample needs a class below it."""

    def image(self, raw: RawSample, number: int) -> np.ndarray:
        """(3, H, W) uint8; raises ``Damaged`` if it cannot be decoded."""
        generator = sample_generator(self.seed, "crop", number)
        return self.augmentation.decode(raw.image, size=self.image_size, generator=generator)

    def caption(self, raw: RawSample, number: int) -> str:
        """One of the captions, drawn uniformly; raises ``Damaged`` if there is none."""
        if not raw.captions:
            names = f"; its members are {describe_members(raw.names)}" if raw.names else ""
            raise Damaged("no caption", f"nothing that --data.fields.caption names has text{names}")
        if len(raw.captions) == 1:
            return raw.captions[0]
        captions = [text for text in raw.captions if text] or raw.captions
        generator = sample_generator(self.seed, "caption", number)
        return captions[int(generator.integers(len(captions)))]

    def token_ids(self, caption: str, number: int) -> list[int] | Placed:
        """At most ``text_length`` ids of the tokens of a caption that stay."""
        assert self.text is not None
        generator = sample_generator(self.seed, "text", number)
        return self.text.encode(
            caption, self.tokenizer, length=self.text_length, generator=generator
        )

    def label(self, raw: RawSample) -> int | None:
        """The class of a sample; raises ``Damaged`` if it needs one and has none that fits."""
        if self.num_classes is None:
            return raw.label
        if raw.label is None:
            raise Damaged("no label")
        if not 0 <= raw.label < self.num_classes:
            raise Damaged("label", f"{raw.label} of {self.num_classes} classes")
        return raw.label


@dataclass
class BatchBuilder:
    """Fills the slots of one batch; a slot that is never filled stays damaged and zero."""

    preparation: Preparation
    numbers: np.ndarray
    """(B,) int64."""
    keys: list[str] = field(default_factory=list)
    damage: Counter[str] = field(default_factory=Counter)
    notes: list[DamageNote] = field(default_factory=list)
    sources: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        count, preparation = len(self.numbers), self.preparation
        self.images = np.zeros((count, 3, *preparation.image_size), np.uint8)
        self.valid = np.zeros(count, np.bool_)
        if preparation.tokenizer is not None:
            shape = (count, preparation.text_length)
            self.token_ids = np.full(shape, preparation.tokenizer.pad_id, np.int64)
            # one token, so that attention over the empty slot of a damaged sample stays finite
            self.lengths = np.ones(count, np.int64)
        self.positions: np.ndarray | None = None
        self.labels: np.ndarray | None = None
        if preparation.num_classes is not None:
            self.labels = np.zeros(count, np.int64)

    def add(self, key: str, raw: RawSample, *, source: int = 0) -> None:
        """Prepare a sample and put it into the next slot; raises ``Damaged`` if it cannot be.

        ``source`` is the entry of ``data.train`` that it comes from.
        """
        slot = len(self.keys)
        number = int(self.numbers[slot])
        tokens: list[int] | Placed | None = None
        if self.preparation.tokenizer is not None:
            tokens = self.preparation.token_ids(self.preparation.caption(raw, number), number)
        label = self.preparation.label(raw)
        self.images[slot] = self.preparation.image(raw, number)
        if label is not None:
            self._add_label(slot, label)
        if tokens is not None:
            self._add_text(slot, tokens)
        self.valid[slot] = True
        self.keys.append(key)
        self.sources[source] += 1
        if raw.repaired:
            self.notes.append(DamageNote(REPAIRED, key, raw.repaired, source, 0))

    def _add_text(self, slot: int, tokens: list[int] | Placed) -> None:
        ids = tokens.ids if isinstance(tokens, Placed) else tokens
        self.token_ids[slot, : len(ids)] = ids
        self.lengths[slot] = max(text_length(ids, self.preparation.tokenizer), 1)
        if isinstance(tokens, Placed):
            if self.positions is None:  # a damaged sample keeps the first slots
                first = np.arange(len(tokens.positions), dtype=np.int64)
                self.positions = np.tile(first, (len(self.numbers), 1))
            self.positions[slot] = tokens.positions

    def _add_label(self, slot: int, label: int) -> None:
        if self.labels is None:  # samples without one among others that have one
            self.labels = np.full(len(self.numbers), -1, np.int64)
        self.labels[slot] = label

    def skip(self, key: str, damaged: Damaged, *, source: int = 0) -> None:
        """Leave the next slot empty."""
        self.keys.append(key)
        self.damage[damaged.kind] += 1
        self.notes.append(note_of(key, damaged, source=source))

    def fields(self) -> dict[str, Any]:
        """The fields of a ``Batch``."""
        fields: dict[str, Any] = {
            "images": torch.from_numpy(self.images),  # (B, 3, H, W)
            "sample_numbers": torch.from_numpy(self.numbers),  # (B,)
            "valid": torch.from_numpy(self.valid),  # (B,)
            "keys": self.keys,
            "damage": dict(self.damage),
            "damage_notes": self.notes,
            "sources": dict(self.sources),
        }
        if self.preparation.tokenizer is not None:
            fields["token_ids"] = torch.from_numpy(self.token_ids)  # (B, T)
            fields["text_lengths"] = torch.from_numpy(self.lengths)  # (B,)
        if self.labels is not None:
            fields["labels"] = torch.from_numpy(self.labels)  # (B,)
        if self.positions is not None:
            slots = self.positions.shape[1]
            fields["token_ids"] = fields["token_ids"][:, :slots].contiguous()  # (B, K)
            fields["text_positions"] = torch.from_numpy(self.positions)  # (B, K)
        return fields


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """The endless run of samples that an order makes of shards."""

    def __init__(
        self,
        shelf: Shelf,
        order: Order,
        preparation: Preparation,
        *,
        choose: Callable[[RawSample, int], RawSample] | None = None,
    ) -> None:
        """Put samples in an order.

        Args:
            shelf: where they are read.
            order: which one a number stands for.
            preparation: what is done to them.
            choose: what of a sample is used, from the sample and its number; all by default.
        """
        self._shelf = shelf
        self._order = order
        self._preparation = preparation
        self._choose = choose

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        """The fields of the ``Batch`` of some sample numbers (B,), damaged samples included."""
        builder = BatchBuilder(self._preparation, numbers)
        shards, indices = self._order.locate(numbers)
        for number, shard, index in zip(
            numbers.tolist(), shards.tolist(), indices.tolist(), strict=True
        ):
            key, source = f"{self._shelf.name(shard)}/{index}", self._shelf.source(shard)
            try:
                reader = self._shelf.reader(shard)
                key = reader.key(index)
                raw = reader.read(index)
                raw = raw if self._choose is None else self._choose(raw, number)
                builder.add(key, raw, source=source)
            except Damaged as damaged:
                builder.skip(key, damaged, source=source)
        return builder.fields()
