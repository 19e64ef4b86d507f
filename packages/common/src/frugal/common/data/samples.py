"""One undecoded sample, which of its fields are read, and what every kind of store offers.

What a caption is, is one rule for every store: text with something to read in it. Numbers are text
too (a title may be ``7``); truth values, objects and ``null`` are not. White space, control
characters and byte-order marks around a caption go, and what holds nothing else, or only characters
without a glyph, is none.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from frugal.common.data.damage import Damaged
from frugal.common.errors import InputError
from frugal.common.files import parse_json, reason_of
from frugal.common.ranges import Weight, check_ranges
from frugal.common.recipe_json import FORMER_DEFAULTS

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "jfif", "jpe", "apng", "gif", "bmp", "tif", "tiff", "ppm", "pgm",
    "pbm", "pnm", "pfm", "avif", "avifs", "jp2", "j2k", "jpf", "jpx", "jpc", "j2c",
)  # fmt: skip
"""Of every format that images are decoded from; the usual ones first."""


def image_extensions() -> Any:
    """A field of a recipe: the extensions of images, by default of all that can be decoded.

    Runs that began when the default was shorter go on with that.
    """
    return dataclasses.field(
        default=IMAGE_EXTENSIONS,
        metadata={FORMER_DEFAULTS: (("jpg", "jpeg", "png", "webp"),)},
    )


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where images, captions and labels are found in a sample."""

    image: tuple[str, ...] = image_extensions()
    """Extensions of images in tars, TFRecords and class folders; the first that a sample has."""
    caption: tuple[str, ...] = ("json.captions", "txt", "json.caption")
    """Extensions of captions; "json.name" is a field of the JSON member (a string, or a list of
    captions of which one is drawn every time). The first that a sample has is used; blank ones
    are none."""
    caption_per_line: bool = False
    """Every line of a text member is a caption of its own."""
    separate: bool = False
    """Every field of ``caption`` is a text of its own, of which one is drawn every time among those
    that a sample has: ("json.title", "json.tag"). Such a sample has one caption per field, empty
    where it lacks the field."""
    weights: tuple[Weight, ...] = ()
    """How often each field of ``caption`` is drawn where they are separate, in any unit and among
    those that a sample has; without them all alike."""
    group: str | None = None
    """A text or number that samples share which are no strangers to each other, such as json.id;
    for objectives that ask for it (objective.positives). Samples without it stand alone."""
    template: str = "a photo of a {}."
    """Caption of an image that has only a class."""
    csv_image: str = "filepath"
    """Column of the image's path in CSV files; relative to the file's folder, or to the working
    directory if more of the images are found there."""
    csv_caption: str = "title"
    """Column of the caption in CSV files."""
    csv_separator: str | None = None
    """Between the columns of CSV files; without it a tab, a comma, a semicolon or a bar, whichever
    makes both columns of the header. With a tab every line is a row and quotes are text."""

    def __post_init__(self) -> None:
        if not self.image:
            raise InputError("data.fields.image is empty; name at least one extension, e.g. jpg")
        if self.separate and self.caption_per_line:
            raise InputError(
                "data.fields.separate takes one text of every field, and "
                "data.fields.caption_per_line several; choose one of them"
            )
        check_ranges(self, "data.fields")
        if self.weights and not self.separate:
            raise InputError(
                "data.fields.weights say how often each field of data.fields.caption is drawn, but "
                "the first is taken that a sample has; set data.fields.separate"
            )
        if self.weights and len(self.weights) != len(self.caption):
            raise InputError(
                f"data.fields.weights has {len(self.weights)} numbers for the {len(self.caption)} "
                "entries of data.fields.caption; give one per entry, or none"
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
    """A class, counted from 0."""
    group: str | None = None
    """What ``fields.group`` says."""
    names: Collection[str] = ()
    """What it was found under: the extensions of its members, or the names of its features."""
    repaired: str = ""
    """What is wrong with a part of it that was passed over, because another holds the same."""


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
        where = f"byte {encoded[error.start]:#04x} at {error.start}"
        raise Damaged("text", f"it is not UTF-8 ({where})") from None


def assemble_captions(
    fields: Fields,
    extensions: Collection[str],
    member: Callable[[str], bytes],
    unreadable: list[Damaged] | None = None,
) -> list[str]:
    """The captions among the members of a tar, as :func:`select_captions`.

    Where no member that is named whole has one, compound extensions count by their last part.
    """
    whole = last_parts(extensions)
    try:
        captions = _captions_of_members(fields, extensions, member, unreadable)
    except Damaged:
        if not whole:
            raise
        captions = []
    if captions or not whole:
        return captions
    return _captions_of_members(fields, whole, lambda last: member(whole[last]), unreadable)


def _captions_of_members(
    fields: Fields,
    extensions: Collection[str],
    member: Callable[[str], bytes],
    unreadable: list[Damaged] | None,
) -> list[str]:
    contents: dict[str, dict[str, Any]] = {}  # one member may hold many fields

    def values_of(field: str) -> Any:
        extension, name = split_field(field, extensions)
        if extension not in extensions:
            return None
        if name:
            if extension not in contents:
                contents[extension] = _json(member(extension))
            return contents[extension].get(name)
        text = decode_text(member(extension))
        return caption_lines(text) if fields.caption_per_line else text

    return select_captions(fields, values_of, unreadable)


def split_field(field: str, extensions: Collection[str]) -> tuple[str, str]:
    """The member that a field is read from, and the name in its JSON; "" for all of it.

    ``caption.txt`` is a member where there is one of that name, ``json.title`` is not.
    """
    if field in extensions:
        return field, ""
    extension, _, name = field.partition(".")
    if extension not in extensions and "." in name:  # x.json.title of a member x.json
        compound, _, last = field.rpartition(".")
        if compound in extensions:
            return compound, last
    return extension, name


def select_captions(
    fields: Fields, values_of: Callable[[str], Any], unreadable: list[Damaged] | None = None
) -> list[str]:
    """The captions of a sample; a field that is blank or cannot be read hides no good one.

    Args:
        fields: which are read, in which order, and whether each is a text of its own.
        values_of: a field as it is stored: a text, a list of them, or something else; raises
            :class:`Damaged` of the kind "text" where it cannot be read.
        unreadable: takes up what is wrong with fields that others made up for.

    Returns:
        Those of the first field that has any, or one for every field, "" where the sample lacks
        it; [] if there are none at all.

    Raises:
        Damaged: if there are none, and a field cannot be read.
    """
    damaged: list[Damaged] = [] if unreadable is None else unreadable
    texts: list[str] = []
    for field in fields.caption:
        try:
            found = caption_texts(values_of(field))
        except Damaged as error:
            if error.kind != "text":
                raise
            damaged.append(error)
            found = []
        if found and not fields.separate:
            return found
        texts += found[:1] or [""]
    if any(texts):
        return texts
    if damaged:
        raise damaged[0]
    return []


def _json(encoded: bytes) -> dict[str, Any]:
    try:
        content = parse_json(encoded)
    except ValueError as error:
        try:  # with a number of thousands of digits, which Python does not convert
            content = json.loads(encoded.decode("utf-8-sig"), parse_int=str)
        except (ValueError, RecursionError):
            raise Damaged("text", f"its JSON cannot be read: {reason_of(error)}") from None
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
        whole = last_parts(extensions)
        image = next((whole[name] for name in fields.image if name in whole), None)
    if image is None:
        raise no_image(fields, extensions)
    unreadable: list[Damaged] = []
    captions = assemble_captions(fields, extensions, member, unreadable)
    return RawSample(
        image=member(image),
        captions=captions,
        label=decode_label(member("cls")) if "cls" in extensions else None,
        group=_group(fields, extensions, member),
        names=extensions,
        repaired=str(unreadable[0]) if unreadable else "",
    )


def _group(
    fields: Fields, extensions: Collection[str], member: Callable[[str], bytes]
) -> str | None:
    """What the members of a tar say of the group of a sample."""
    if fields.group is None:
        return None
    extension, name = split_field(fields.group, extensions)
    if extension not in extensions:
        return None
    value = _json(member(extension)).get(name) if name else decode_text(member(extension))
    return group_text(value)


def group_text(value: Any) -> str | None:
    """The group that a text or number names; None for blank ones and for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def no_image(fields: Fields, names: Iterable[str]) -> Damaged:
    """What is to be raised where a sample has none of the images that are looked for."""
    return Damaged(
        "no image",
        f"looked for {', '.join(fields.image)}, but its members are {describe_members(names)}",
    )


_BLANK = b" \t\r\n\0"
_DECIMAL = re.compile(rb"[+-]?[0-9]{1,19}")


def decode_label(encoded: bytes) -> int | None:
    """A class number written in decimal, None for none; raises :class:`Damaged` for others."""
    written = encoded.removeprefix(codecs.BOM_UTF8).strip(_BLANK)
    if not written:
        return None
    if _DECIMAL.fullmatch(written) is None:
        raise Damaged("label", f"{written[:20]!r} is no class number".replace("b'", "'", 1))
    return class_number(int(written))


def class_number(number: int) -> int | None:
    """A class, counted from 0; None for -1, by which many data sets mean that there is none.

    Raises:
        Damaged: if it is another negative number, or does not fit into 64 bits.
    """
    if number == -1:
        return None
    if not 0 <= number < 1 << 63:
        raise Damaged("label", f"{number} is no class number")
    return number


def decode_classes(encoded: bytes) -> np.ndarray:
    """(C,) bool: which classes a sample is of, from an ``npy`` member of zeros and ones.

    Raises:
        Damaged: if it is none: cut, an archive (``npz``), a pickle, or of another shape.
    """
    try:
        target = np.lib.format.read_array(io.BytesIO(encoded), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError, TypeError) as error:
        raise Damaged("label", reason_of(error)) from None
    if target.ndim != 1 or not np.isin(target, (0, 1)).all():
        raise Damaged("label", "it is no row of zeros and ones")
    return target.astype(bool)


def printable(name: str) -> str:
    """A member's name in one line of UTF-8, whatever its bytes are."""
    return name.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def describe_members(extensions: Iterable[str]) -> str:
    """The extensions of a sample, for a sentence."""
    listed = sorted(map(printable, extensions))
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return ", ".join(listed[:8]) + more if listed else "none"


def last_parts(extensions: Collection[str]) -> dict[str, str]:
    """Compound extensions (``output.txt``) by their last part, where it can mean only one."""
    compound = [name for name in extensions if "." in name]
    if not compound:
        return {}
    counts = Counter(name.rpartition(".")[2] for name in extensions)
    by_last = {name.rpartition(".")[2]: name for name in compound}
    return {last: name for last, name in by_last.items() if counts[last] == 1}


_CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
_EDGES = _CONTROLS + _SPACES + "\ufeff"
_WITHOUT_GLYPH = re.compile(
    # what Unicode calls default ignorable and format characters, spaces and controls
    "[\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U000e0000-\U000e0fff]*"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def caption_text(value: Any) -> str:
    """The caption that a stored value is, stripped; "" where it is none."""
    if not isinstance(value, str):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if is_number and math.isfinite(value) else ""
    text = value.strip()
    if text.isascii() and text.isprintable():  # 9 in 10 captions
        return text
    text = text.strip(_EDGES)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which no encoding holds: as open_clip repairs it
        text = _SURROGATES.sub("\ufffd", text)
    return "" if _WITHOUT_GLYPH.fullmatch(text) else text


def caption_texts(value: Any) -> list[str]:
    """The captions that a stored value holds: itself, or those of a list that are some."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if (text := caption_text(item))]


def caption_lines(text: str) -> list[str]:
    r"""Every line that is a caption; ``\n``, ``\r\n`` and ``\r`` end one."""
    return caption_texts(text.replace("\r", "\n").split("\n"))
