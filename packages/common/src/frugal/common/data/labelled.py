"""Images in their own order, each exactly once, with labels or captions: for evaluation."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import as_bytes
from frugal.common.data.folders import FileList, find_objectnet, named_folders
from frugal.common.data.index import load_index
from frugal.common.data.loader import Loader
from frugal.common.data.pairs import Shelf
from frugal.common.data.samples import Fields, Reader
from frugal.common.data.sources import find_files, index_missing, open_source
from frugal.common.data.tars import TarReader
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError

GROUP = 64
"""Images that stay together on one process, so that a model can take the same ones at a time
whatever the number of processes: what it computes depends on them in the last bits."""
_LOG = logging.getLogger("frugal")


class _Images(Dataset[dict[str, Any]]):
    """Samples by their place in all shards; a damaged one is a mistake, because counts matter."""

    def __init__(
        self, folder: Path, fields: Fields, *, size: tuple[int, int], crop: CenterCrop
    ) -> None:
        files = find_files(str(folder))
        _check_number_of_shards(folder, files)
        index_missing(files, _LOG)
        self.source = open_source(str(folder), fields, files)
        if self.source.notes:
            raise InputError(
                f"{self.source.notes[0]}, and an evaluation needs every image; copy the shard again"
            )
        self._shelf = Shelf(self.source.shards, fields)
        self._ends = np.cumsum(self.source.counts)
        self._size = size
        self._crop = crop

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, place: int) -> tuple[Reader, int]:
        """The reader of the shard that holds an image, and the place within it."""
        shard = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self._shelf.reader(shard), place - first

    def __getitem__(self, places: Sequence[int]) -> dict[str, Any]:
        """Images (b, 3, H, W), labels (b,) with -1 for none, and places (b,); or a mistake."""
        images: list[np.ndarray] = []
        labels = np.full(len(places), -1, np.int64)
        for row, place in enumerate(places):
            key = f"image {place}"
            try:
                reader, index = self.locate(place)
                key = reader.key(index)
                raw = reader.read(index)
                images.append(self._crop.grey_levels(raw.image, size=self._size))
            except (Damaged, InputError) as error:
                return {"mistake": f"{key} cannot be evaluated ({error}); repair or remove it"}
            labels[row] = -1 if raw.label is None else raw.label
        return {
            "images": torch.from_numpy(np.stack(images)),
            "labels": torch.from_numpy(labels),
            "places": torch.tensor(places),
        }

    def member(self, place: int, extension: str) -> bytes | None:
        """The bytes of a member of a sample in a tar; None where there is none."""
        reader, index = self.locate(place)
        members = reader.members(index) if isinstance(reader, TarReader) else {}
        if extension not in members:
            return None
        assert isinstance(reader, TarReader)
        return reader.content(members[extension])

    def digest(self) -> str:
        """SHA-256 that tells this data from any other: checksums of tars, files with their sizes.

        It stays where a data set is copied or moved.
        """
        found = hashlib.sha256()
        for shard in self.source.shards:
            if isinstance(shard, FileList):
                for place in range(len(shard.files)):
                    file = shard.files[place]
                    size = _size(Path(shard.base, file)) if file else 0
                    label = -1 if shard.labels is None else int(shard.labels[place])
                    found.update(f"{file}\0{label}\0{size}\0".encode("utf-8", "surrogateescape"))
            else:
                index = load_index(Path(shard.name))
                for part in (index.names.blob, index.checksums, index.first_member):
                    found.update(part.tobytes())
        return found.hexdigest()

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """(b, 3, H, W) uint8: some of the images as the model sees them, for people."""
        fields = self[places]
        if "mistake" in fields:
            raise InputError(fields["mistake"])
        return as_bytes(fields["images"].numpy())

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int
    ) -> Iterator[dict[str, Any]]:
        """This process's contiguous part of the images, in order: whole groups of 64."""
        groups = math.ceil(len(self) / GROUP)
        start, stop = (
            min(groups * part // world_size * GROUP, len(self)) for part in (rank, rank + 1)
        )
        parts = [range(at, min(at + batch_size, stop)) for at in range(start, stop, batch_size)]
        yield from Loader(self, sampler=parts, workers=workers)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(
            f"{path} is not there any more ({error.strerror}); copy it again"
        ) from None


def _check_number_of_shards(folder: Path, files: list[Path]) -> None:
    listed = folder / "nshards.txt"
    if not listed.is_file():
        return
    text = listed.read_text().strip()
    if text != str(len(files)):
        raise InputError(
            f"{listed} says {text!r} shards but {folder} holds {len(files)}; copy what is missing"
        )


def _test_split(folder: Path) -> Path:
    """clip_benchmark keeps its splits in sub-folders; other layouts are the folder itself."""
    split, images = folder / "test", folder / "images"
    if split.is_dir() and next(split.glob("*.tar"), None):
        return split
    return images if images.is_dir() and find_objectnet(folder) else folder


def _lines(folder: Path, name: str) -> list[str] | None:
    """A text file of a data set, in its folder or the one above; None if there is none."""
    for path in (folder / name, folder.parent / name):
        if path.is_file():
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return None


class _InOrder:
    """Images that are handed out in the order in which they are stored."""

    _images: _Images

    def __len__(self) -> int:
        return len(self._images)

    def digest(self) -> str:
        """What tells these images from any others."""
        return self._images.digest()

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """(b, 3, H, W) uint8: the images at some places, for people to look at."""
        return self._images.pictures(places)

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the images: every image comes once, on one process.

        Yields:
            images (b, 3, H, W) uint8, or float32 grey levels where the crop resizes with a kernel
            of TensorFlow; places in the data (b,) int64.

        Raises:
            InputError: if an image is damaged.
        """
        for fields in self._images.batches(rank, world_size, batch_size, workers):
            yield fields["images"], fields["places"]


class LabelledImages(_InOrder):
    """Images with class numbers, in the order in which they are stored."""

    def __init__(
        self, folder: Path, *, size: tuple[int, int], crop: CenterCrop | None = None
    ) -> None:
        """Open a folder with one sub-folder per class, or tars with ``cls`` members.

        Tars may lie in the folder itself or, as clip_benchmark has them, in ``test/`` below it.
        Of ObjectNet, the classes that it shares with ImageNet-1k are read. Every process of a
        run must call this: they build missing indexes together.

        Args:
            folder: where the images are.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and centre crop if not given.

        Raises:
            InputError: if there is no such data.
        """
        split = _test_split(folder)
        self._images = _Images(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
        self.class_folders: list[str] | None = None
        """The class folders in the order of the class numbers; None for tars."""
        self.class_names = _lines(split, "classnames.txt")
        """One name per class; None if the data does not say."""
        self.templates = _lines(split, "zeroshot_classification_templates.txt")
        """Prompts with ``{c}`` in place of the class; None if the data has none."""
        if self._images.source.shards[0].name == str(split):
            named = named_folders(split)
            self.class_folders, self.class_names = list(named), list(named.values())
            if self.templates is None and find_objectnet(split):
                self.templates = ["{c}"]  # as the field asks about it: bare names

    def batches(  # type: ignore[override]
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's part of the images: every image comes once, on one process.

        Yields:
            images as those of others are; labels (b,) int64; places in the data (b,) int64.

        Raises:
            InputError: if an image is damaged or has no label.
        """
        for fields in self._images.batches(rank, world_size, batch_size, workers):
            without = (fields["labels"] < 0).nonzero()
            if len(without):
                reader, index = self._images.locate(int(fields["places"][without[0, 0]]))
                raise InputError(
                    f"{reader.key(index)} has no class number; it needs a cls member, from 0 on"
                )
            yield fields["images"], fields["labels"], fields["places"]


class CaptionedImages(_InOrder):
    """Images with captions, in the order in which they are stored."""

    def __init__(
        self,
        folder: Path,
        *,
        size: tuple[int, int],
        crop: CenterCrop | None = None,
        fields: Fields | None = None,
    ) -> None:
        """Open tars of captioned images.

        Where ``dataset_type.txt`` says "retrieval" (clip_benchmark), every line of the text is a
        caption; otherwise the captions are those that training would draw from. Every process of
        a run must call this: they build missing indexes together.

        Args:
            folder: where the tars are, or ``test/`` with the tars.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and centre crop if not given.
            fields: where captions are found in a sample.

        Raises:
            InputError: if there is no such data, or an image has no caption.
        """
        split = _test_split(folder)
        if fields is None:
            is_benchmark = _lines(split, "dataset_type.txt") == ["retrieval"]
            fields = Fields(caption=("txt",), caption_per_line=True) if is_benchmark else Fields()
        self._images = _Images(split, fields, size=size, crop=crop or CenterCrop())
        self.captions = [self._captions(place) for place in range(len(self))]
        """All captions of every image."""

    def _captions(self, place: int) -> list[str]:
        reader, index = self._images.locate(place)
        try:
            captions = reader.captions(index)
        except Damaged as damaged:
            raise InputError(
                f"{reader.key(index)} cannot be evaluated ({damaged}); repair or remove it"
            ) from None
        if not captions:
            raise InputError(f"{reader.key(index)} has no caption; add one or remove it")
        return captions


def is_multi_labelled(folder: Path) -> bool:
    """Whether clip_benchmark's layout says that an image may be of several classes."""
    return _lines(_test_split(folder), "dataset_type.txt") == ["multilabel"]


class MultiLabelledImages(_InOrder):
    """Images of which each may be of several classes, in the order in which they are stored."""

    def __init__(
        self, folder: Path, *, size: tuple[int, int], crop: CenterCrop | None = None
    ) -> None:
        """Open tars with ``npy`` members of zeros and ones, as clip_benchmark writes them.

        Args:
            folder: where the tars are, or ``test/`` with the tars.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and centre crop if not given.

        Raises:
            InputError: if there is no such data, or an image does not say what it is of.
        """
        split = _test_split(folder)
        self._images = _Images(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
        self.class_folders: list[str] | None = None
        self.class_names = _lines(split, "classnames.txt")
        """One name per class; None if the data does not say."""
        self.templates = _lines(split, "zeroshot_classification_templates.txt")
        """Prompts with ``{c}`` in place of the class; None if the data has none."""
        rows = [self._target(place) for place in range(len(self))]
        widths = sorted({len(row) for row in rows})
        if len(widths) > 1:
            raise InputError(
                f"the images of {folder} disagree on the number of classes ({widths[0]} and "
                f"{widths[1]}); write the npy members again"
            )
        self.targets = torch.from_numpy(np.stack(rows))
        """(N, C) bool: which classes every image is of."""

    def _target(self, place: int) -> np.ndarray:
        """(C,) bool."""
        reader, index = self._images.locate(place)
        try:
            content = self._images.member(place, "npy") or b""
            target = np.load(io.BytesIO(content), allow_pickle=False)
        except (Damaged, ValueError, EOFError, OSError):
            target = None
        if target is None or target.ndim != 1 or not np.isin(target, (0, 1)).all():
            raise InputError(
                f"{reader.key(index)} does not say which classes it is of; it needs an npy member "
                "with a row of zeros and ones"
            )
        return target.astype(bool)
