"""What is done to a sample between the store and the model, and how samples become a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from frugal.common.data.damage import REPAIRED, Damaged, DamageNote, note_of
from frugal.common.data.samples import RawSample, describe_members
from frugal.common.data.tokenizers import Tokenizer, text_length
from frugal.common.data.transforms import Augmentation
from frugal.common.randomness import sample_generator, stable_key
from frugal.common.recipe import GroupsBy
from frugal.common.reduction.text import PositionedTokens, TextReduction


@dataclass(frozen=True, kw_only=True)
class SampleTransform:
    """What is done to a sample between the store and the model.

    Every draw (crop, caption, tokens that stay) has a generator of its own, a function of the seed
    and the number of the sample: a caption of one more candidate moves no crop.
    """

    seed: int
    augmentation: Augmentation
    image_size: tuple[int, int]
    """(height, width)."""
    tokenizer: Tokenizer | None
    """None for images without text."""
    text: TextReduction | None
    text_length: int
    """Most tokens of a caption."""
    num_classes: int | None = None
    """Where given, every sample needs a class below it."""
    caption_weights: tuple[float, ...] = ()
    """How often each of the captions is drawn, of samples with one for every field."""
    vector_width: int | None = None
    """Of stored vectors that stand in the place of images."""
    text_vector_width: int | None = None
    """Of stored vectors that stand in the place of captions."""
    groups_by: GroupsBy | None = None
    """What samples belong together by, where an objective asks for that."""

    def image(self, raw: RawSample, number: int) -> np.ndarray:
        """(3, H, W) uint8; raises ``Damaged`` if it cannot be decoded."""
        generator = sample_generator(self.seed, "crop", number)
        return self.augmentation.decode(raw.image, size=self.image_size, generator=generator)

    def caption(self, raw: RawSample, number: int) -> str:
        """One of the captions, drawn by their weights; raises ``Damaged`` if there is none."""
        row = self.caption_row(raw, number)
        return _with_text(raw.captions)[row]

    def caption_row(self, raw: RawSample, number: int) -> int:
        """Which one is drawn, counted without blank ones; raises ``Damaged`` if there is none."""
        if not raw.captions:
            names = f"; its members are {describe_members(raw.names)}" if raw.names else ""
            raise Damaged("no caption", f"nothing that --data.fields.caption names has text{names}")
        if len(self.caption_weights) != len(raw.captions):  # a class folder has one for all fields
            return self.row_of(len(_with_text(raw.captions)), number)
        generator = sample_generator(self.seed, "caption", number)
        pairs = zip(raw.captions, self.caption_weights, strict=True)
        weights = np.array([weight for text, weight in pairs if text])
        return int(generator.choice(len(weights), p=weights / weights.sum()))

    def row_of(self, count: int, number: int) -> int:
        """Which of so many captions is drawn, all alike."""
        if count == 1:
            return 0
        return int(sample_generator(self.seed, "caption", number).integers(count))

    @property
    def needs_captions(self) -> bool:
        """Whether captions are read though their vectors are stored: to weigh or compare them."""
        return bool(self.caption_weights) or self.groups_by == "caption"

    def token_ids(self, caption: str, number: int) -> list[int] | PositionedTokens:
        """At most ``text_length`` ids of the tokens of a caption that stay."""
        assert self.text is not None and self.tokenizer is not None
        generator = sample_generator(self.seed, "text", number)
        return self.text.encode(
            caption, self.tokenizer, length=self.text_length, generator=generator
        )

    def group(self, raw: RawSample, caption: str, number: int) -> int:
        """The number of the group of a sample; one without any stands alone."""
        name = caption if self.groups_by == "caption" else raw.group
        return number if not name else stable_key("group", name)

    def label(self, raw: RawSample) -> int | None:
        """The class of a sample; raises ``Damaged`` if it needs one and has none that fits."""
        if self.num_classes is None:
            return raw.label
        if raw.label is None:
            raise Damaged("no label")
        if not 0 <= raw.label < self.num_classes:
            raise Damaged("label", f"{raw.label} of {self.num_classes} classes")
        return raw.label


def _with_text(captions: Sequence[str]) -> Sequence[str]:
    """Those that may be drawn: of separate fields, those that a sample lacks are blank."""
    return [text for text in captions if text] or captions


@dataclass
class Collator:
    """Collates samples: fills the slots of one batch in order.

    A slot that is never filled stays damaged and zero.
    """

    transform: SampleTransform
    numbers: np.ndarray
    """(B,) int64."""
    keys: list[str] = field(default_factory=list)
    damage: Counter[str] = field(default_factory=Counter)
    notes: list[DamageNote] = field(default_factory=list)
    sources: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        count, transform = len(self.numbers), self.transform
        size = transform.image_size if transform.vector_width is None else (0, 0)
        self.images = np.zeros((count, 3, *size), np.uint8)
        self.features: np.ndarray | None = None
        if transform.vector_width is not None:
            self.features = np.zeros((count, transform.vector_width), np.float32)
        self.text_features: np.ndarray | None = None
        if transform.text_vector_width is not None:
            self.text_features = np.zeros((count, transform.text_vector_width), np.float32)
        self.valid = np.zeros(count, np.bool_)
        self._reads_tokens = transform.tokenizer is not None and self.text_features is None
        if transform.tokenizer is not None and self._reads_tokens:
            shape = (count, transform.text_length)
            self.token_ids = np.full(shape, transform.tokenizer.pad_id, np.int64)
            # one token, so that attention over the empty slot of a damaged sample stays finite
            self.lengths = np.ones(count, np.int64)
        self.positions: np.ndarray | None = None
        self.labels: np.ndarray | None = None
        if transform.num_classes is not None:
            self.labels = np.zeros(count, np.int64)
        # damaged samples are strangers to everybody, and to each other
        self.groups = None if transform.groups_by is None else self.numbers.astype(np.int64)

    def add(
        self,
        key: str,
        raw: RawSample,
        *,
        source: int = 0,
        vector: np.ndarray | None = None,
        text_vector: np.ndarray | None = None,
    ) -> None:
        """Prepare a sample and put it into the next slot; raises ``Damaged`` if it cannot be.

        ``source`` is the entry of ``data.train`` that it comes from, ``vector`` what is stored of
        its image and ``text_vector`` of the caption that is drawn, where vectors are stored.
        """
        slot = len(self.keys)
        number = int(self.numbers[slot])
        # everything that may fail comes before anything is written: a damaged slot stays zero.
        # The image is decoded last, because it costs the most and text or class may be damaged.
        tokens: list[int] | PositionedTokens | None = None
        caption = ""
        if self._reads_tokens or self.transform.groups_by == "caption":
            caption = self.transform.caption(raw, number)
        if self._reads_tokens:
            tokens = self.transform.token_ids(caption, number)
        label = self.transform.label(raw)
        if self.features is None:
            self.images[slot] = self.transform.image(raw, number)
        elif vector is not None:
            self.features[slot] = vector
        if self.text_features is not None and text_vector is not None:
            self.text_features[slot] = text_vector
        if label is not None:
            self._add_label(slot, label)
        if tokens is not None:
            self._add_text(slot, tokens)
        if self.groups is not None:
            self.groups[slot] = self.transform.group(raw, caption, number)
        self.valid[slot] = True
        self.keys.append(key)
        self.sources[source] += 1
        if raw.repaired:
            self.notes.append(DamageNote(REPAIRED, key, raw.repaired, source, 0))

    def _add_text(self, slot: int, tokens: list[int] | PositionedTokens) -> None:
        ids = tokens.ids if isinstance(tokens, PositionedTokens) else tokens
        self.token_ids[slot, : len(ids)] = ids
        self.lengths[slot] = max(text_length(ids, self.transform.tokenizer), 1)
        if isinstance(tokens, PositionedTokens):
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
        if self._reads_tokens:
            fields["token_ids"] = torch.from_numpy(self.token_ids)  # (B, T)
            fields["text_lengths"] = torch.from_numpy(self.lengths)  # (B,)
        if self.features is not None:
            fields["features"] = torch.from_numpy(self.features)  # (B, D)
        if self.text_features is not None:
            fields["text_features"] = torch.from_numpy(self.text_features)  # (B, D)
        if self.groups is not None:
            fields["groups"] = torch.from_numpy(self.groups)  # (B,)
        if self.labels is not None:
            fields["labels"] = torch.from_numpy(self.labels)  # (B,)
        if self.positions is not None:
            slots = self.positions.shape[1]
            # a reduction with positions says how many slots stay: no padding beyond them travels
            fields["token_ids"] = fields["token_ids"][:, :slots].contiguous()  # (B, K)
            fields["text_positions"] = torch.from_numpy(self.positions)  # (B, K)
        return fields
