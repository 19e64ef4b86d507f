"""Training on what frozen towers have put out, in the place of images and captions.

``frugal.common.embed --output pooled`` stores it, shard by shard; here it is joined to the samples
by their shard and number. Locked-image tuning (LiT, Zhai et al., arXiv:2111.07991) and CiT need no
more of an image whose tower is not trained; where neither tower is, as in SAIL (Zhang et al.,
arXiv:2412.04616), captions need not be encoded either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from frugal.common.data.contents import below_common_folder, shard_digests
from frugal.common.data.damage import Damaged
from frugal.common.data.samples import Fields
from frugal.common.data.sources import Source
from frugal.common.errors import InputError
from frugal.common.files import parse_json, read_json_object, reason_of
from frugal.common.randomness import sample_generator
from frugal.common.recipe_json import to_json

INDEX = "index.json"
HEADER = "embeddings"
"""In the header of a file: what it is of, as JSON."""
POOLED, PROJECTED = "image_pooled", "image"
"""Names of the tensors (S, V, D), V views of every image: what a tower hands to its projection, and
what it puts out."""
VALID = "image_valid"
"""Of the tensor (S,) bool: which images could be read."""
POOLED_TEXT, PROJECTED_TEXT = "text_pooled", "text"
"""Names of the tensors (T, D) of all captions of a shard, in the order of its samples."""
TEXT_SAMPLE = "text_sample"
"""Of the tensor (T,) int64, ascending: the sample that each caption is of."""
_OPEN = 256
"""Files that a process keeps open; of each it reads what it needs."""
VERSION = 2
"""Of what an index says; 1 knew neither the fields that were read nor all that a tower computes."""


@dataclass(frozen=True)
class StoredVectors:
    """What the image tower put out of the images of all shards of some sources."""

    files: list[Path]
    """Of every shard."""
    width: int
    views: int
    seed: int
    """Which view of an image is taken is drawn from it and the number of the sample."""
    tower: str
    """Digest of the tower that put them out."""

    def of(self, shard: int, index: int, number: int) -> np.ndarray:
        """(D,) float32 of a sample; raises ``Damaged`` where its image could not be read."""
        file = _opened(self.files[shard], VALID, POOLED)
        if not file.about_samples[index]:
            raise Damaged("no image", "it could not be read when it was embedded")
        view = 0
        if self.views > 1:
            view = int(sample_generator(self.seed, "stored view", number).integers(self.views))
        return file.row(index)[view]


@dataclass(frozen=True)
class StoredTexts:
    """What the text tower put out of the captions of all shards of some sources."""

    files: list[Path]
    """Of every shard."""
    width: int
    tower: str
    """Digest of the tower that put them out."""

    def of(self, shard: int, index: int, row: int, captions: int) -> np.ndarray:
        """(D,) float32 of one of the captions of a sample.

        Args:
            shard: the number of its shard.
            index: its place there.
            row: which of its captions, counted without blank ones.
            captions: how many it has.

        Raises:
            Damaged: where another number of captions was embedded.
        """
        file, first, stored = self._rows(shard, index)
        if stored != captions:
            raise Damaged("no caption", f"{stored} of its {captions} captions were embedded")
        return file.row(first + row)

    def drawn(self, shard: int, index: int, draw: Callable[[int], int]) -> np.ndarray:
        """(D,) float32 of one of the captions that were embedded of a sample.

        Args:
            shard: the number of its shard.
            index: its place there.
            draw: which one, of so many.

        Raises:
            Damaged: where there are none.
        """
        file, first, stored = self._rows(shard, index)
        if not stored:
            raise Damaged("no caption", "none was embedded")
        return file.row(first + draw(stored))

    def _rows(self, shard: int, index: int) -> tuple[_Opened, int, int]:
        """The file of a shard, and the first row of a sample there and how many it has."""
        file = _opened(self.files[shard], TEXT_SAMPLE, POOLED_TEXT)
        first, end = np.searchsorted(file.about_samples, [index, index + 1])
        return file, int(first), int(end - first)


class _Opened:
    """The file of a shard, of which single rows are read."""

    def __init__(self, path: Path, about_samples: str, rows: str) -> None:
        file = safe_open(path, framework="np")
        self.about_samples: np.ndarray = file.get_tensor(about_samples)
        # a shard of which nothing could be embedded has none
        self._rows = file.get_slice(rows) if rows in file.keys() else None  # noqa: SIM118

    def row(self, number: int) -> np.ndarray:
        """One row in float32; raises ``Damaged`` where a file that says it is there has none."""
        if self._rows is None:
            raise Damaged("unreadable", "its embeddings are not in the file")
        return self._rows[number].astype(np.float32)


@lru_cache(maxsize=_OPEN)
def _opened(path: Path, about_samples: str, rows: str) -> _Opened:
    """The file of a shard; raises ``Damaged`` if it cannot be read any more."""
    try:
        return _Opened(path, about_samples, rows)
    except (OSError, SafetensorError) as error:
        raise Damaged("unreadable", reason_of(error)) from None


def open_vectors(
    folder: Path, sources: Sequence[Source], fields: Fields, *, seed: int
) -> StoredVectors:
    """The vectors of the images of some sources, whose members are read as ``fields`` says.

    Raises:
        InputError: if there are none, they are of other samples, or not all are there yet.
    """
    found = _Folder.open(folder, IMAGES)
    files = found.files_of(sources, {"image": fields.image})
    views, width = found.shape()
    return StoredVectors(files, width, views, seed, str(found.about.get("tower", "")))


def open_texts(folder: Path, sources: Sequence[Source], fields: Fields) -> StoredTexts:
    """The vectors of the captions of some sources, which are read as ``fields`` says.

    Raises:
        InputError: if there are none, they are of other captions, or not all are there yet.
    """
    found = _Folder.open(folder, TEXTS)
    read = {name: value for name, value in vars(fields).items() if name not in _NO_MATTER}
    files = found.files_of(sources, read)
    (width,) = found.shape()
    return StoredTexts(files, width, str(found.about.get("text_tower", "")))


_NO_MATTER = ("weights", "group", "image", "csv_image")
"""Of the fields of a sample: what does not decide about which captions it has, or their order."""


@dataclass(frozen=True)
class _Kind:
    """What a folder is asked for."""

    flag: str
    """The field that names the folder."""
    tensor: str
    about_samples: str
    """The tensor that says which samples, or whose, the rows are."""
    what: str
    """In words."""
    options: str
    """What stores it."""


IMAGES = _Kind("data.stored", POOLED, VALID, "images", "--output pooled")
TEXTS = _Kind("data.stored_texts", POOLED_TEXT, TEXT_SAMPLE, "captions", "--texts --output pooled")


def width_of(folder: Path, kind: _Kind) -> int:
    """Of a vector; raises ``InputError`` if a folder holds none of a kind."""
    return _Folder.open(folder, kind).shape()[-1]


@dataclass(frozen=True)
class _Folder:
    """A folder that :mod:`frugal.common.embed` has written."""

    folder: Path
    kind: _Kind
    about: dict[str, Any]
    """What its index says of the model and the options."""
    shards: list[dict[str, Any]]
    """And of every shard."""

    @classmethod
    def open(cls, folder: Path, kind: _Kind) -> _Folder:
        """Read the index.

        Raises:
            InputError: if there is none, or it is of something else or not complete.
        """
        flag = kind.flag
        try:
            content: dict[str, Any] = read_json_object(folder / INDEX)
        except FileNotFoundError:
            raise InputError(
                f"{flag} {folder} holds no {INDEX}; give a folder that frugal.common.embed wrote"
            ) from None
        about, shards = content.get("about"), content.get("shards")
        if (
            not isinstance(about, dict)
            or not isinstance(shards, list)
            or not all(map(_is_shard, shards))
        ):
            raise InputError(f"{folder / INDEX} is not of embeddings; give another {flag}")
        if any(Path(each["file"]).name != each["file"] for each in shards):
            raise InputError(f"{folder / INDEX} names files that do not lie beside it")
        if about.get("version") != VERSION:
            raise InputError(
                f"{flag} {folder} was written by another version, which noted other things about "
                "the model; embed the data anew, into another folder"
            )
        if not content.get("complete"):
            raise InputError(
                f"{flag} {folder} is not complete; give the command of frugal.common.embed again"
            )
        return cls(folder, kind, about, shards)

    def files_of(self, sources: Sequence[Source], read: Mapping[str, Any]) -> list[Path]:
        """The file of every shard of some sources, whose members are read so.

        Raises:
            InputError: if there is none, it is of another shard, or members were read otherwise.
        """
        self._check_fields(read)
        row = self.shape()
        known = {(each["name"], each["samples"], each["digest"]): each["file"]
                 for each in self.shards}  # fmt: skip
        # as they were embedded: all entries one after the other
        all_shards = [shard for source in sources for shard in source.shards]
        names = below_common_folder([shard.name for shard in all_shards])
        digests = [digest for source in sources for digest in shard_digests(source)]
        files: list[Path] = []
        for name, shard, digest in zip(names, all_shards, digests, strict=True):
            file = known.get((name, shard.num_samples, digest))
            if file is None:
                raise InputError(
                    f"{self.kind.flag} {self.folder} holds nothing of {name} as it is now; embed "
                    "the data of data.train with frugal.common.embed, all entries at once"
                )
            files.append(self.folder / file)
            self._check_file(files[-1], [name, shard.num_samples, digest], row)
        return files

    def _check_file(self, path: Path, shard: list[Any], row: list[int]) -> None:
        """Refuse a file that is gone, of another shard or model, or whose rows do not fit."""
        about_samples, tensor = self.kind.about_samples, self.kind.tensor
        try:
            with safe_open(path, framework="np") as file:
                found = parse_json(file.metadata()[HEADER])
                names = file.keys()
                shapes = {name: file.get_slice(name).get_shape() for name in names}
            is_mine = found["shard"] == shard and found["about"] == self.about
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from None
        if not is_mine:
            what = "shard" if found["shard"] != shard else "model, or with other options,"
            raise InputError(
                f"{path} holds the vectors of another {what} than {INDEX} says of {shard[0]}; "
                f"{_REMOVE}"
            )
        count = shapes.get(about_samples, [0])
        expected = [*count, *row]
        is_whole = self.kind is not IMAGES or count == [shard[1]]
        if not is_whole or shapes.get(tensor, expected) != expected:
            raise InputError(
                f"{path} holds {tensor} of shape {tuple(shapes.get(tensor, ()))} where "
                f"{tuple(expected)} are due, so that it is damaged; {_REMOVE}"
            )

    def _check_fields(self, read: Mapping[str, Any]) -> None:
        embedded = self.about.get("fields")
        embedded = embedded if isinstance(embedded, dict) else {}
        for name, value in read.items():
            theirs, ours = embedded.get(name), to_json(value)
            if theirs != ours:
                raise InputError(
                    f"{self.kind.flag} {self.folder} holds {self.kind.what} of data.fields.{name} "
                    f"{theirs!r}, where this run reads {ours!r}; embed the data with the --fields "
                    "of the run"
                )

    def shape(self) -> list[int]:
        """Of a tensor without its rows, as the first file that has any tells.

        Raises:
            InputError: if there is none.
        """
        for each in self.shards:
            path = self.folder / each["file"]
            try:
                with safe_open(path, framework="np") as file:
                    if self.kind.tensor in file.keys():  # noqa: SIM118 - it is no mapping
                        return file.get_slice(self.kind.tensor).get_shape()[1:]
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from None
        raise InputError(
            f"{self.kind.flag} {self.folder} holds no pooled vectors of {self.kind.what}; embed "
            f"them with {self.kind.options}"
        )


_REMOVE = "remove it, and give the command of frugal.common.embed again"


def _is_shard(entry: object) -> bool:
    """Whether an entry of an index tells of a shard."""
    kinds = {"name": str, "samples": int, "digest": str, "file": str}
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in kinds.items()
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be read ({reason_of(error)}); give the command of frugal.common.embed again"
    )
