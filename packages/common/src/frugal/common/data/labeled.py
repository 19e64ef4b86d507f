"""Images in their own order, each exactly once, with labels or captions: for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from frugal.common.data.benchmark_layout import (
    class_names,
    dataset_type,
    holds_class_folders,
    templates,
    test_split,
)
from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.samples import Fields, decode_classes
from frugal.common.data.stored_images import GROUP, IMAGE, StoredImages, digest_of
from frugal.common.data.stores.class_folders import find_objectnet
from frugal.common.data.transforms import CenterCrop
from frugal.common.distributed import Ranks, check_delivery
from frugal.common.errors import InputError


class _InOrder:
    """Images that are handed out in the order in which they are stored."""

    _images: StoredImages

    def __len__(self) -> int:
        return len(self._images)

    @property
    def passed_over(self) -> PassedOver:
        """What lies beside the images and is none."""
        return self._images.passed_over

    def contents(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """(N, K) int64: SHA-256 of what was evaluated of every sample, image first.

        Of this process's samples, zeros elsewhere; those that were not handed out are read.

        Raises:
            InputError: if a sample is damaged.
        """
        return self._images.contents(rank, world_size)

    def digest(self) -> str:
        """What tells these images from any others; reads those that were not handed out yet."""
        return digest_of(self.contents())

    def listing(self) -> str:
        """What processes compare before they share the images out."""
        return self._images.listing()

    def pictures(self, places: Sequence[int]) -> np.ndarray:
        """(b, 3, H, W) uint8: the images at some places, for people to look at."""
        return self._images.pictures(places)

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's part of the images: every image comes once, on one process.

        Yields:
            images (b, 3, H, W) uint8, or float32 gray levels where the crop resizes with a kernel
            of TensorFlow; places in the data (b,) int64.

        Raises:
            InputError: if an image is damaged.
        """
        for fields in self._images.batches(rank, world_size, batch_size, workers):
            yield fields["images"], fields["places"]


class LabeledImages(_InOrder):
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
            crop: the evaluation transform; resize and center crop if not given.

        Raises:
            InputError: if there is no such data.
        """
        split = test_split(folder)
        self._images = StoredImages(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
        self.class_folders: list[str] | None = None
        """The class folders in the order of the class numbers; None for tars."""
        self.empty_folders: list[str] = []
        """Folders without images beside them, which are no classes."""
        self.has_given_names = False
        """A file of the data says what its classes are called."""
        self.class_names: list[str] | None = None
        """One name per class; None if the data does not say."""
        found = self._images.class_folders
        if found is None or not found.class_folders:
            self.class_names = class_names(split)
            self.has_given_names = self.class_names is not None
        else:
            self.class_folders = list(found.class_folders)
            self.class_names = list(found.class_names)
            self.empty_folders = list(found.empty_folders)
            self.has_given_names = found.has_given_names
        self.templates = templates(split)
        """Prompts with ``{c}`` in place of the class; None if the data has none."""
        if self.templates is None and self.class_folders and find_objectnet(split):
            self.templates = ["{c}"]  # as the field asks about it: bare names
        self._numbers: Tensor | None = None

    @property
    def filled_folders(self) -> list[str]:
        """The class folders that hold images; [] for tars."""
        found = self._images.class_folders
        if found is None:
            return []
        return [n for n in found.class_folders if n not in found.classes_without_images]

    def renumber(self, numbers: Sequence[int]) -> None:
        """Have the labels of the data, which count from 0, be these numbers from now on."""
        self._numbers = torch.tensor(numbers, dtype=torch.int64)

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
            labels = fields["labels"]
            yield (
                fields["images"],
                labels if self._numbers is None else self._numbers[labels],
                fields["places"],
            )


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
        caption; without that file the captions are those that training would draw from. Every
        process of a run must call this: they build missing indexes together.

        Args:
            folder: where the tars are, or ``test/`` with the tars.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and center crop if not given.
            fields: where captions are found in a sample.

        Raises:
            InputError: if there is no such data, or an image has no caption.
        """
        split = test_split(folder)
        kind = dataset_type(folder)
        if kind not in (None, "retrieval"):
            raise InputError(
                f"the dataset_type.txt of {folder} says {kind}, but captions are of the type "
                "retrieval; correct it, or give a data set of captions"
            )
        if fields is None:
            if holds_class_folders(folder):
                raise InputError(
                    f"{folder} holds class folders, where all images of a class have the same "
                    "caption, so that retrieval has no right answers; measure zero-shot, or give "
                    "captioned data"
                )
            per_line = Fields(caption=("txt",), caption_per_line=True)
            fields = Fields() if kind is None else per_line
        self._images = StoredImages(split, fields, size=size, crop=crop or CenterCrop())
        self.captions = [self._captions(place) for place in range(len(self))]
        """All captions of every image."""
        self.several_lines = 0
        """Captions of more than one line, where no type says that every line is a caption."""
        if kind is None:
            texts = (caption for captions in self.captions for caption in captions)
            self.several_lines = sum("\n" in text.strip() for text in texts)

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


class MultiLabeledImages(_InOrder):
    """Images of which each may be of several classes, in the order in which they are stored."""

    def __init__(
        self, folder: Path, *, size: tuple[int, int], crop: CenterCrop | None = None
    ) -> None:
        """Open tars with ``npy`` members of zeros and ones, as clip_benchmark writes them.

        Args:
            folder: where the tars are, or ``test/`` with the tars.
            size: (height, width) of the images handed out.
            crop: the evaluation transform; resize and center crop if not given.

        Raises:
            InputError: if there is no such data, or an image does not say what it is of.
        """
        split = test_split(folder)
        self._images = StoredImages(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
        self.class_folders: list[str] | None = None
        self.empty_folders: list[str] = []
        self.has_given_names = True
        self.class_names = class_names(split)
        """One name per class; None if the data does not say."""
        self.templates = templates(split)
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

    def contents(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """(N, 8) int64, as of others; the classes of an image count as its label."""
        contents = self._images.contents(rank, world_size)
        is_read = contents.any(1)
        digests = [hashlib.sha256(row.tobytes()).digest() for row in self.targets[is_read].numpy()]
        packed = np.frombuffer(b"".join(digests), np.int64).reshape(-1, IMAGE)
        contents[is_read, IMAGE:] = torch.from_numpy(packed.copy())
        return contents

    def _target(self, place: int) -> np.ndarray:
        """(C,) bool."""
        reader, index = self._images.locate(place)
        try:
            return decode_classes(self._images.member(place, "npy") or b"")
        except Damaged as damaged:
            raise InputError(
                f"{reader.key(index)} does not say which classes it is of ({damaged}); it needs an "
                "npy member with a row of zeros and ones"
            ) from None


class ImageSet(Protocol):
    """Images that are handed out once, in parts, on all ranks together."""

    def __len__(self) -> int: ...

    def batches(
        self, rank: int, world_size: int, batch_size: int, workers: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """Images (b, 3, H, W), what else is known of them (b, ...), and their places (b,)."""
        ...


def walk_images(
    data: ImageSet,
    compute: Callable[..., Sequence[Tensor]],
    tables: Sequence[Tensor],
    *,
    ranks: Ranks,
    batch_size: int,
    workers: int = 0,
) -> None:
    """Fill one row per image of some tables; every image is computed once, on one rank.

    Every rank must call this, and has the whole tables afterwards. The rows do not depend on the
    number of ranks or the batch size: see :func:`grouped`.

    Args:
        data: a data set of this module, or another with its ``batches``.
        compute: from images (b, 3, H, W), what else the batches hold (labels), and places (b,) to
            the rows (b, ...) of every table.
        tables: (N, ...) zeros of any dtype, on the device that ``compute`` answers on.
        ranks: the processes that share the images.
        batch_size: images that are read at a time.
        workers: processes that decode images; 0 decodes in this one.

    Raises:
        InputError: if an image is damaged.
        RuntimeError: if an image came twice or not at all.
    """
    batches = data.batches(ranks.rank, ranks.world_size, batch_size, workers)
    walk_batches(grouped(batches), compute, tables, ranks=ranks)


def walk_batches(
    batches: Iterable[tuple[Any, ...]],
    compute: Callable[..., Sequence[Tensor]],
    tables: Sequence[Tensor],
    *,
    ranks: Ranks,
) -> None:
    """As :func:`walk_images`, in batches as they come: for pictures that do not go together.

    Args:
        batches: of this rank; the last entry of each is places (b,).
        compute: from the entries of a batch to the rows (b, ...) of every table.
        tables: (N, ...) zeros of any dtype, on the device that ``compute`` answers on.
        ranks: the processes that share the images.

    Raises:
        RuntimeError: if an image came twice or not at all.
    """
    device = tables[0].device
    delivered = torch.zeros(len(tables[0]), dtype=torch.int64, device=device)
    for batch in batches:
        places = batch[-1].to(device)
        for table, rows in zip(tables, compute(*batch), strict=True):
            table[places] = rows
        delivered.index_add_(0, places, torch.ones_like(places))
    check_delivery(ranks.sum(delivered).cpu())
    for table in tables:
        # exact in any dtype: of every row only one rank holds anything but zeros
        ranks.sum(table)


def grouped(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows in the same order, 64 at a time; the last may be fewer.

    What a model computes for an image depends in the last bits on the shape of its batch, in
    bfloat16 in more than those. Data comes to every process in whole groups of 64; if the model
    takes them one at a time, neither the batches in which images are read nor the number of
    processes changes a number.
    """
    held: list[tuple[Tensor, ...]] = []
    for batch in batches:
        held.append(batch)
        if sum(len(part[0]) for part in held) >= GROUP:
            rows = [torch.cat(parts) for parts in zip(*held, strict=True)]
            whole = len(rows[0]) // GROUP * GROUP
            yield from zip(*(part[:whole].split(GROUP) for part in rows), strict=True)
            held = [tuple(part[whole:] for part in rows)]
    if held and sum(len(part[0]) for part in held):
        yield tuple(torch.cat(parts) for parts in zip(*held, strict=True))
