"""One undecoded sample, which of its fields are read, and what every kind of store offers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from frugal.common.data.damage import Damaged
from frugal.common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where images, captions and labels are found in a sample."""

    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Extensions of images in tars, TFRecords and class folders; the first that a sample has."""
    caption: tuple[str, ...] = ("json.captions", "txt", "json.caption")
    """Extensions of captions; "json.name" is a field of the JSON member (a string, or a list of
    captions of which one is drawn every time). The first that a sample has is used."""
    caption_per_line: bool = False
    """Every line of a text member is a caption of its own."""
    separate: bool = False
    """Every field of ``caption`` is a text of its own, of which one is drawn every time among those
    that a sample has: ("json.title", "json.tag"). Such a sample has one caption per field, empty
    where it lacks the field."""
    template: str = "a photo of a {}."
    """Caption of an image that has only a class."""
    csv_image: str = "filepath"
    """Column of the image's path in CSV files; relative to the file's folder, or to the working
    directory if the first is not found there."""
    csv_caption: str = "title"
    """Column of the caption in CSV files."""
    csv_separator: str | None = None
    """Between the columns of CSV files; without it a tab if the header has one, else a comma."""

    def __post_init__(self) -> None:
        if not self.image:
            raise InputError("data.fields.image is empty; name at least one extension, e.g. jpg")
        if self.separate and self.caption_per_line:
            raise InputError(
                "data.fields.separate takes one text of every field, and "
                "data.fields.caption_per_line several; choose one of them"
            )
        if "{}" not in self.template:
            raise InputError(
                f"data.fields.template is {self.template!r}, which has no place for the class; "
                "write {} where its name goes"
            )
        if self.csv_separator is not None and len(self.csv_separator) != 1:
            raise InputError(
                f"data.fields.csv_separator is {self.csv_separator!r}, must be one character"
            )


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored."""

    image: bytes
    """An encoded picture."""
    captions: list[str]
    label: int | None = None


class Reader(Protocol):
    """An opened shard; belongs to one process."""

    def key(self, index: int) -> str:
        """``shard/key`` of a sample, damaged ones included."""
        ...

    def read(self, index: int) -> RawSample:
        """A sample; raises :class:`Damaged` if it cannot be used."""
        ...

    def captions(self, index: int) -> list[str]:
        """The captions of a sample, without reading its image; raises :class:`Damaged`."""
        ...

    def close(self) -> None:
        """Give back the file."""
        ...


class Shard(Protocol):
    """A number of samples that are stored together; a small value that can be pickled."""

    @property
    def name(self) -> str:
        """The path."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples, damaged ones included."""
        ...

    def open(self, fields: Fields) -> Reader:
        """A reader for this process."""
        ...


@dataclass(frozen=True)
class StringTable:
    """Many strings in two arrays: forked loader workers share them without touching them."""

    blob: np.ndarray
    """(bytes,) uint8: the strings one after the other, in UTF-8."""
    ends: np.ndarray
    """(n,) int64: where each string ends."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringTable:
        """A table of the given strings."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.blob[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


def decode_text(encoded: bytes) -> str:
    """UTF-8 text; raises :class:`Damaged` if it is none."""
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("text", str(error)) from None


def assemble_captions(
    fields: Fields, extensions: Collection[str], member: Callable[[str], bytes]
) -> list[str]:
    """The captions among the members of a tar, as :func:`assemble`; [] if there are none."""
    contents: dict[str, dict[str, Any]] = {}  # one member may hold many fields

    def captions_of(field: str) -> list[str]:
        extension, _, name = field.partition(".")
        if extension not in extensions:
            return []
        if name:
            if extension not in contents:
                contents[extension] = _json(member(extension))
            value = contents[extension].get(name)
            values = value if isinstance(value, list) else [value]
            return [item for item in values if isinstance(item, str)]
        text = decode_text(member(extension))
        if fields.caption_per_line:
            return caption_lines(text)
        return [text]

    return select_captions(fields, captions_of)


def caption_lines(text: str) -> list[str]:
    """The captions of a text that holds one in every line; blank lines hold none."""
    lines = text.replace("\r", "\n").split("\n")  # no other character ends a line
    return [line.strip() for line in lines if line.strip()]


def select_captions(fields: Fields, captions_of: Callable[[str], list[str]]) -> list[str]:
    """The captions of a sample, from those of each of its fields; [] if there are none."""
    if not fields.separate:
        return next((found for field in fields.caption if (found := captions_of(field))), [])
    texts = [next(iter(captions_of(field)), "").strip() for field in fields.caption]
    return texts if any(texts) else []


def _json(encoded: bytes) -> dict[str, Any]:
    try:
        content = json.loads(decode_text(encoded))
    except ValueError as error:
        raise Damaged("text", str(error)) from None
    return content if isinstance(content, dict) else {}


def assemble(
    fields: Fields, extensions: Collection[str], member: Callable[[str], bytes]
) -> RawSample:
    """The sample that members of a tar make up.

    Args:
        fields: which members are wanted.
        extensions: of the members there are.
        member: hands out the bytes of one of them.

    Raises:
        Damaged: if there is no image, or text or class cannot be read.
    """
    image = next((name for name in fields.image if name in extensions), None)
    if image is None:
        raise Damaged("no image")
    return RawSample(
        image=member(image),
        captions=assemble_captions(fields, extensions, member),
        label=decode_label(member("cls")) if "cls" in extensions else None,
    )


def decode_label(encoded: bytes) -> int:
    """A class number written in decimal; raises :class:`Damaged` if it is none."""
    try:
        return int(encoded)
    except ValueError:
        raise Damaged("label", repr(encoded[:20])) from None
