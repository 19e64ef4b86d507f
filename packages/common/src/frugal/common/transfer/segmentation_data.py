"""What a segmenter is trained on: random crops of pictures with a class for every pixel.

The crops are those of mmsegmentation's UperNet recipes, with which masked encoders are compared on
ADE20K.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from typing_extensions import override

from frugal.common.contracts import Part, Stream, TrainedModel
from frugal.common.data.contents import check_same_data, digest_of, digest_of_sizes
from frugal.common.data.damage import Damaged, DamageNote, note_of
from frugal.common.data.decoding import Window, resize_window
from frugal.common.data.order import GlobalOrder
from frugal.common.data.samples import image_extensions
from frugal.common.data.stream import IndexedStream, RankSlice
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.ranges import (
    CountOrZero,
    Positive,
    PositiveShare,
    Probability,
    Range,
    check_ranges,
)
from frugal.common.ranges import Share as Fraction
from frugal.common.recipe import DataConfig, Recipe
from frugal.common.run import Run
from frugal.common.transfer.masked_folder import (
    IGNORED,
    PADDING,
    MaskedFolder,
    class_names,
    open_masked_folder,
)

_LONGEST = 4
"""Longest side over shortest beyond which the longest decides how far a picture is resized."""


def fitted_size(height: int, width: int, *, side: int, ratio: float = 1.0) -> tuple[int, int]:
    """(height, width) of a picture that fits ``4 side`` times ``side`` pixels, times a ratio.

    At a side of 512 the 2048 times 512 of the published recipes, as they round it.
    """
    longest, shortest = int(_LONGEST * side * ratio), int(side * ratio)
    scale = min(longest / max(height, width), shortest / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class Cut(NamedTuple):
    """A rectangle of a resized picture."""

    resized: tuple[int, int]
    """(height, width) of the whole picture."""
    top: int
    left: int
    height: int
    width: int

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """(height, width): the nearest of the (H, W) labels of the picture as it was."""
        rows, columns = (
            _nearest(old, new, start, count)
            for old, new, start, count in zip(
                labels.shape, self.resized, self[1:3], self[3:], strict=True
            )
        )
        return labels[rows[:, None], columns]

    def pixels(self, image: Image.Image, *, reduced: bool) -> np.ndarray:
        """(3, height, width) uint8: the picture resized, and cut; ``Damaged`` if it cannot be."""
        down, across = image.height / self.resized[0], image.width / self.resized[1]
        window = Window(
            self.top * down, self.left * across, self.height * down, self.width * across
        )
        return resize_window(
            image,
            window,
            (self.height, self.width),
            interpolation="bilinear",
            reduced=reduced,
            isolated=False,
        )


def _nearest(old: int, new: int, start: int, count: int) -> np.ndarray:
    """The rows, of ``old``, nearest to ``count`` rows from ``start`` on, of ``new``."""
    return (2 * np.arange(start, start + count) + 1) * old // (2 * new)


_Tries = Annotated[int, Range(least=0, words="must be at least 0, which takes the first rectangle")]


@dataclass(frozen=True, kw_only=True)
class ScaledCrop:
    """A rectangle of the picture at a random scale, perhaps mirrored.

    The picture is resized to fit 4 times 1 sides of the result, times the scale; a rectangle of the
    result's size is cut out of it, or less where it is smaller: the rest is padding.
    """

    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """Least and largest size of the picture over that at which its shorter side is the result's."""
    largest_share: PositiveShare = 0.75
    """Rectangles are drawn again while one class has more of the labeled pixels than this."""
    tries: _Tries = 10
    """How often at most; then the last one stays."""
    flip: Probability = 0.5
    """Probability of mirroring left and right."""
    reduced_decoding: bool = True
    """Decode JPEG at a reduced scale where the picture is shrunk that much anyway."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.augmentation")
        if self.scale[0] > self.scale[1]:
            raise InputError(
                f"data.augmentation.scale is {self.scale}; give the least and the largest factor, "
                "both positive"
            )

    def draw(
        self, labels: np.ndarray, *, size: tuple[int, int], generator: np.random.Generator
    ) -> tuple[Cut, bool]:
        """What is cut out of a picture of (H, W) labels, and whether it is mirrored."""
        # always as many draws, so that none depends on how often a rectangle was drawn
        draws = generator.random(2 + 2 * (self.tries + 1)).tolist()
        low, high = self.scale
        height, width = labels.shape
        ratio = low + (high - low) * draws[0]
        resized = fitted_size(height, width, side=min(size), ratio=ratio)
        extent = min(size[0], resized[0]), min(size[1], resized[1])
        for down, across in zip(draws[2::2], draws[3::2], strict=True):
            top = int(down * (resized[0] - extent[0] + 1))
            left = int(across * (resized[1] - extent[1] + 1))
            cut = Cut(resized, top, left, *extent)
            if self._is_varied(cut.labels(labels)):
                break
        return cut, draws[1] < self.flip

    def _is_varied(self, labels: np.ndarray) -> bool:
        known = labels[labels != IGNORED]
        return len(known) > 0 and np.bincount(known).max() <= self.largest_share * len(known)

    def apply(
        self,
        image: Image.Image,
        labels: np.ndarray,
        *,
        size: tuple[int, int],
        generator: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is trained on.

        Returns:
            (3, height, width) uint8 and (height, width) uint8 labels, ``PADDING`` beyond the
            picture.

        Raises:
            Damaged: if the picture cannot be decoded.
        """
        cut, mirrored = self.draw(labels, size=size, generator=generator)
        inside = np.s_[..., : cut.height, : cut.width]
        pixels = np.zeros((3, *size), np.uint8)
        cut_labels = np.full(size, PADDING, np.uint8)
        step = -1 if mirrored else 1
        pixels[inside] = cut.pixels(image, reduced=self.reduced_decoding)[..., ::step]
        cut_labels[inside] = cut.labels(labels)[..., ::step]
        return pixels, cut_labels


@dataclass(frozen=True, kw_only=True)
class SegmentationData(DataConfig):
    """Pictures with a class for every pixel, in the layout of ADE20K."""

    train: tuple[str, ...]
    """Folders that hold images/ and annotations/, or scenes folders with such pictures."""
    split: str = "training"
    """Name of the folders in images/ and annotations/ that are trained on."""
    augmentation: ScaledCrop = field(default_factory=ScaledCrop)
    image_extensions: tuple[str, ...] = image_extensions()
    """Of the pictures."""
    max_damaged: Fraction = 0.05
    """Fraction of damaged samples at which the run stops."""
    workers: CountOrZero = 4
    """Loader processes per process of the run; 0 loads in the process itself."""

    @property
    @override
    def source_names(self) -> tuple[str, ...]:
        """The entries of ``train``."""
        return self.train

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if not self.image_extensions:
            raise InputError("data.image_extensions is empty; name at least one, e.g. jpg")

    def build(
        self,
        recipe: Recipe,
        run: Run,
        *,
        first_sample: int,
        state: dict[str, Any],
        engine: TrainedModel | None,
    ) -> Stream:
        """The micro-batches of this process from ``first_sample`` on.

        Raises:
            InputError: if there is no data, or it is not what a segmenter is trained on.
        """
        del state, engine  # the number of a sample says it all
        inputs = recipe.model.inputs()
        if inputs.num_classes is None:
            raise InputError(
                "a class for every pixel is for models with classes, which a "
                f"{type(recipe.model).__name__} has not; choose a segmenter"
            )
        folders = open_folders(self, num_classes=inputs.num_classes)
        counts = [len(folder) for folder in folders]
        contents = [[part_of(folder)] for folder in folders]
        check_same_data(contents)
        order = GlobalOrder(counts, seed=recipe.run.seed, window=len(counts))
        run.log.info("data: %s pictures with masks", f"{order.samples:,}")
        samples = MaskedCrops(
            folders,
            order,
            self.augmentation,
            size=inputs.height_width,
            num_classes=inputs.num_classes,
            seed=recipe.run.seed,
        )
        return IndexedStream(
            samples,
            RankSlice.of(recipe, run, first_sample=first_sample),
            epoch_samples=order.samples,
            workers=self.workers,
            pin_memory=run.device.type == "cuda",
            contents=contents,
        )


def part_of(folder: MaskedFolder) -> Part:
    """A folder as a run notes it, with the sizes of its pictures and masks."""
    paths = folder.image_path, folder.mask_path
    stamp = "".join(digest_of_sizes(path, 0, len(folder)) for path in paths)
    return Part(".", len(folder), digest_of(folder.names), stamp)


def open_folders(data: SegmentationData, *, num_classes: int) -> list[MaskedFolder]:
    """The folders of a recipe, each checked.

    Raises:
        InputError: if there is none, one is named twice, or a model of so many classes cannot be
            trained on one.
    """
    if not data.train:
        raise InputError(
            "data.train is empty; say where the pictures and their masks are, such as --data.train "
            "path/to/ADEChallengeData2016"
        )
    twice = next((name for name, count in Counter(data.train).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"data.train names {twice} more than once; name every folder once")
    folders = []
    for name in data.train:
        class_names(Path(name), num_classes)
        folder = open_masked_folder(Path(name), data.split, data.image_extensions)
        folder.check(num_classes)
        folders.append(folder)
    return folders


class MaskedCrops(Dataset[dict[str, Any]]):
    """The endless run of crops that an order makes of pictures with masks."""

    def __init__(
        self,
        folders: list[MaskedFolder],
        order: GlobalOrder,
        augmentation: ScaledCrop,
        *,
        size: tuple[int, int],
        num_classes: int,
        seed: int,
    ) -> None:
        """Take pictures; every draw belongs to the number of its sample.

        Args:
            folders: one shard of the order each.
            order: which picture is which sample.
            augmentation: what is cut out of it.
            size: (height, width) of the crops.
            num_classes: of the model.
            seed: the run's.
        """
        self._folders = folders
        self._order = order
        self._augmentation = augmentation
        self._size = size
        self._num_classes = num_classes
        self._seed = seed

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        """The fields of the ``Batch`` of some sample numbers (B,), damaged samples included.

        Its ``labels`` are (B, H, W) uint8, one per pixel.
        """
        images = np.zeros((len(numbers), 3, *self._size), np.uint8)
        labels = np.full((len(numbers), *self._size), IGNORED, np.uint8)
        valid = np.zeros(len(numbers), np.bool_)
        keys: list[str] = []
        damage: Counter[str] = Counter()
        notes: list[DamageNote] = []
        sources: Counter[int] = Counter()
        places = zip(*(found.tolist() for found in self._order.locate(numbers)), strict=True)
        for slot, (shard, index) in enumerate(places):
            folder = self._folders[shard]
            keys.append(str(folder.image_path(index)))
            try:
                images[slot], labels[slot] = self._crop(folder, index, int(numbers[slot]))
                valid[slot] = True
                sources[shard] += 1
            except Damaged as damaged:
                damage[damaged.kind] += 1
                notes.append(note_of(keys[-1], damaged, source=shard))
        return {
            "images": torch.from_numpy(images),
            "labels": torch.from_numpy(labels),
            "sample_numbers": torch.from_numpy(numbers),
            "valid": torch.from_numpy(valid),
            "keys": keys,
            "damage": dict(damage),
            "damage_notes": notes,
            "sources": dict(sources),
        }

    def _crop(self, folder: MaskedFolder, index: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        image, labels = folder.read(index, self._num_classes)
        generator = sample_generator(self._seed, "crop", number)
        return self._augmentation.apply(image, labels, size=self._size, generator=generator)
