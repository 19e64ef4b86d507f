"""Images in their own order, each exactly once, with labels or captions: for evaluation."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from frugal.common.data.damage import Damaged, PassedOver
from frugal.common.data.decoding import as_bytes
from frugal.common.data.loader import Loader
from frugal.common.data.patterns import find_files, kind_of
from frugal.common.data.samples import Fields, RawSample, Reader, decode_classes
from frugal.common.data.sources import index_missing, open_source
from frugal.common.data.stores.class_folders import find_objectnet, read_class_names
from frugal.common.data.stores.folder import FileList
from frugal.common.data.stores.index import load_index
from frugal.common.data.stores.tar import TarReader
from frugal.common.data.stream import ReaderCache
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.files import is_system_name, read_lines

GROUP = 64
"""Images that stay together on one process, so that a model can take the same ones at a time
whatever the number of processes: what it computes depends on them in the last bits."""


class _Once(logging.LoggerAdapter[logging.Logger]):
    """Says nothing twice: a run opens the data of its evaluations at every one of them."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("frugal"))
        self._said: set[tuple[object, ...]] = set()

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """See :meth:`logging.Logger.log`."""
        if (msg, *args) not in self._said:
            self._said.add((msg, *args))
            super().log(level, msg, *args, **options)


_LOG = _Once()


class _Images(Dataset[dict[str, Any]]):
    """Samples by their place in all shards; a damaged one is a mistake, because counts matter."""

    def __init__(
        self, folder: Path, fields: Fields, *, size: tuple[int, int], crop: CenterCrop
    ) -> None:
        self.passed_over = PassedOver()
        files = find_files(str(folder), passed_over=self.passed_over)
        _check_number_of_shards(folder, files)
        index_missing(files, _LOG)
        self.source = open_source(str(folder), fields, files)
        if self.source.notes:
            raise InputError(
                f"{self.source.notes[0]}, and an evaluation needs every image; copy the shard again"
            )
        self.class_folders = next(iter(self.source.lists), None)
        """The folder of images, where it is one."""
        for line in self.passed_over.lines():
            _LOG.warning("%s: %s", folder, line)
        self.source.tell(_LOG)
        self.passed_over.update(self.source.passed_over)
        if self.class_folders is not None:
            self.passed_over.update(self.class_folders.passed_over)
        self._readers = ReaderCache(self.source.shards, fields)
        self._ends = np.cumsum(self.source.counts)
        self._size = size
        self._crop = crop
        self._contents = torch.zeros(len(self), _CONTENT, dtype=torch.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, place: int) -> tuple[Reader, int]:
        """The reader of the shard that holds an image, and the place within it."""
        shard = int(np.searchsorted(self._ends, place, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self._readers.reader(shard), place - first

    def __getitem__(self, places: Sequence[int]) -> dict[str, Any]:
        """Images (b, 3, H, W), labels (b,) with -1 for none, places (b,) and contents (b, 8).

        Or a mistake, which loaders pass on whole.
        """
        images: list[np.ndarray] = []
        contents: list[np.ndarray] = []
        labels = np.full(len(places), -1, np.int64)
        for row, place in enumerate(places):
            key = f"image {place}"
            try:
                reader, index = self.locate(place)
                key = reader.key(index)
                raw = reader.read(index)
                images.append(self._crop.gray_levels(raw.image, size=self._size))
                contents.append(_content(raw))
            except (Damaged, InputError) as error:
                return {"mistake": _mistake(key, error)}
            labels[row] = -1 if raw.label is None else raw.label
        return {
            "images": torch.from_numpy(np.stack(images)),
            "labels": torch.from_numpy(labels),
            "places": torch.tensor(places),
            "contents": torch.from_numpy(np.stack(contents)),
        }

    def member(self, place: int, extension: str) -> bytes | None:
        """The bytes of a member of a sample in a tar; None where there is none."""
        reader, index = self.locate(place)
        members = reader.members(index) if isinstance(reader, TarReader) else {}
        if extension not in members:
            return None
        assert isinstance(reader, TarReader)
        return reader.content(members[extension])

    def contents(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """(N, 8) int64: the SHA-256 of every image, and of its label and captions, as stored.

        Of the images of this process; zeros elsewhere. What was handed out is known from then, the
        rest is read now, without decoding it.

        Raises:
            InputError: if a sample is damaged.
        """
        for place in self._part(rank, world_size):
            if not self._contents[place].any():
                self._contents[place] = torch.from_numpy(_content(self._stored(place)))
        return self._contents.clone()

    def listing(self) -> str:
        """SHA-256 of what can be told of the data at once, so that processes can compare it.

        Number, names, labels and checksums of all samples, and what 64 of them hold.
        """
        found = hashlib.sha256(str(len(self)).encode())
        for shard in self.source.shards:
            if isinstance(shard, FileList):
                parts = [shard.files.blob, shard.texts.blob, shard.labels]
            else:
                index = load_index(Path(shard.name))
                parts = [index.names.blob, index.checksums, index.first_member]
            for part in parts:
                found.update(b"none" if part is None else part.tobytes())
        for place in np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).astype(int)).tolist():
            try:
                found.update(_content(self._stored(place)).tobytes())
            except InputError:
                found.update(b"damaged")  # refused when it is evaluated
        return found.hexdigest()

    def _stored(self, place: int) -> RawSample:
        """A sample as it is stored.

        Raises:
            InputError: if it is damaged.
        """
        key = f"image {place}"
        try:
            reader, index = self.locate(place)
            key = reader.key(index)
            return reader.read(index)
        except Damaged as damaged:
            raise InputError(_mistake(key, damaged)) from None

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
        own = self._part(rank, world_size)
        parts = [
            range(at, min(at + batch_size, own.stop))
            for at in range(own.start, own.stop, batch_size)
        ]
        for fields in Loader(self, sampler=parts, workers=workers):
            self._contents[fields["places"]] = fields["contents"]
            yield fields

    def _part(self, rank: int, world_size: int) -> range:
        """The places of the images of one process: whole groups of 64."""
        groups = math.ceil(len(self) / GROUP)
        start, stop = (
            min(groups * part // world_size * GROUP, len(self)) for part in (rank, rank + 1)
        )
        return range(start, stop)


IMAGE = 4
"""Integers of the SHA-256 of an image."""
_CONTENT = 2 * IMAGE
"""With those of what is said of it."""
_LOOKED_AT = 64


def _content(raw: RawSample) -> np.ndarray:
    """(8,) int64: the SHA-256 of an image, then that of its label and captions."""
    said = repr((raw.label, list(raw.captions))).encode("utf-8", "surrogatepass")
    both = hashlib.sha256(raw.image).digest() + hashlib.sha256(said).digest()
    return np.frombuffer(bytearray(both), np.int64)


def digest_of(contents: Tensor) -> str:
    """SHA-256 that tells data from any other: its bytes in their order, wherever they lie.

    Args:
        contents: (N, K) int64, those of all processes.
    """
    return hashlib.sha256(contents.numpy().tobytes()).hexdigest()


def num_repeated(contents: Tensor) -> int:
    """Images that are byte for byte as one before them; from (N, 8) contents."""
    return len(contents) - len(contents[:, :IMAGE].unique(dim=0))


def _mistake(key: str, reason: Exception) -> str:
    return f"{key} cannot be evaluated ({reason}); repair or remove it"


def _check_number_of_shards(folder: Path, files: list[Path]) -> None:
    listed = folder / "nshards.txt"
    if not listed.is_file():
        return
    lines = read_lines(listed)
    if len(lines) != 1 or not lines[0].isdecimal():
        raise InputError(
            f"{listed} must hold one whole number, the number of the tars beside it, but says "
            f"{' '.join(lines)!r}; correct it"
        )
    if int(lines[0]) != len(files):
        what = "copy what is missing" if int(lines[0]) > len(files) else "remove what is not of it"
        raise InputError(
            f"{listed} says {lines[0]!r} shards but {folder} holds {len(files)}; {what}"
        )


def test_split(folder: Path) -> Path:
    """clip_benchmark keeps its splits in sub-folders; other layouts are the folder itself."""
    split, images = folder / "test", folder / "images"
    if split.is_dir() and next(split.glob("*.tar"), None):
        return split
    return images if images.is_dir() and find_objectnet(folder) else folder


def _find_text(folder: Path, name: str) -> Path | None:
    """A text file of a data set, in its folder or the one above; None if there is none."""
    return next((p for p in (folder / name, folder.parent / name) if p.is_file()), None)


def has_class_names(folder: Path) -> bool:
    """Whether a data set comes with a list of what its classes are called."""
    return _find_text(test_split(folder), "classnames.txt") is not None


def holds_class_folders(folder: Path) -> bool:
    """Whether images lie in one folder per class, without shards or lists beside them."""
    split = test_split(folder)
    if not split.is_dir():
        return False
    inside = [path for path in split.iterdir() if not is_system_name(path.name)]
    has_stores = any(kind_of(path) is not None for path in inside if path.is_file())
    return not has_stores and any(path.is_dir() for path in inside)


def _class_names(folder: Path) -> list[str] | None:
    path = _find_text(folder, "classnames.txt")
    return None if path is None else read_class_names(path)


def _templates(folder: Path) -> list[str] | None:
    """Prompts with ``{c}`` for the class.

    Raises:
        InputError: if the file holds none, or a blank line between others.
    """
    path = _find_text(folder, "zeroshot_classification_templates.txt")
    if path is None:
        return None
    lines = read_lines(path)
    if not lines or "" in lines:
        raise InputError(
            f"{path} {'has a blank line between others' if lines else 'holds no template'}; write "
            "one template per line, such as 'a photo of a {c}.', or remove the file"
        )
    return lines


DATASET_TYPES = ("classification", "retrieval", "multilabel")
"""What clip_benchmark calls the kinds of data sets."""


def dataset_type(folder: Path) -> str | None:
    """What ``dataset_type.txt`` says of a data set, in its folder or the one above; or None.

    Raises:
        InputError: if it is none of clip_benchmark's words.
    """
    path = _find_text(test_split(folder), "dataset_type.txt")
    if path is None:
        return None
    word = " ".join(read_lines(path)).lower()
    if word not in DATASET_TYPES:
        raise InputError(
            f"{path} says {word!r}, which is no kind of data set; write one of "
            f"{', '.join(DATASET_TYPES)}, or remove it for classification"
        )
    return word


class _InOrder:
    """Images that are handed out in the order in which they are stored."""

    _images: _Images

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
        self._images = _Images(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
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
            self.class_names = _class_names(split)
            self.has_given_names = self.class_names is not None
        else:
            self.class_folders = list(found.class_folders)
            self.class_names = list(found.class_names)
            self.empty_folders = list(found.empty_folders)
            self.has_given_names = found.has_given_names
        self.templates = _templates(split)
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
        self._images = _Images(split, fields, size=size, crop=crop or CenterCrop())
        self.captions = [self._captions(place) for place in range(len(self))]
        """All captions of every image."""
        self.several_lines = 0
        """Captions of more than one line, where no type says that every line is a caption."""
        if kind is None:
            texts = (caption for own in self.captions for caption in own)
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


def is_multi_labeled(folder: Path) -> bool:
    """Whether clip_benchmark's layout says that an image may be of several classes."""
    return dataset_type(folder) == "multilabel"


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
        self._images = _Images(split, Fields(caption=()), size=size, crop=crop or CenterCrop())
        self.class_folders: list[str] | None = None
        self.empty_folders: list[str] = []
        self.has_given_names = True
        self.class_names = _class_names(split)
        """One name per class; None if the data does not say."""
        self.templates = _templates(split)
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
        own = contents.any(1)
        said = [hashlib.sha256(row.tobytes()).digest() for row in self.targets[own].numpy()]
        packed = np.frombuffer(b"".join(said), np.int64).reshape(-1, IMAGE)
        contents[own, IMAGE:] = torch.from_numpy(packed.copy())
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
