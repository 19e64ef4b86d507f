"""What an image reduction may look at, and what it answers.

A reduction decides which patches of an image the tower sees. It runs before the patches are
embedded, so a patch that goes costs nothing at all; since positions belong to patches and not to
places in the sequence, the result equals embedding every patch and dropping some afterwards.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource

Channels = tuple[float, float, float]
ValueT = TypeVar("ValueT")


class Gather(Protocol):
    """Collects what processes know."""

    def __call__(self, value: ValueT, /) -> list[ValueT]:
        """One JSON-ready value of every process, in rank order, on all of them."""
        ...


class PatchedTower(Protocol):
    """What a view must know of the tower that takes the images."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        ...

    @property
    def mean(self) -> Channels:
        """Of the red, green and blue that the tower takes, on a scale from 0 to 1."""
        ...

    @property
    def std(self) -> Channels:
        """Of the same."""
        ...


@dataclass(frozen=True)
class PatchView:
    """A batch of images, seen as patches."""

    images: Tensor
    """(B, 3, H, W) uint8, or float that is normalized already."""
    patch_size: int
    """Side of a patch in pixels."""
    mean: Channels | None = None
    """Of the red, green and blue of uint8 images, on a scale from 0 to 1."""
    std: Channels | None = None
    embed: Callable[[], Tensor] | None = None
    """Computes (B, N, D) embeddings of every patch with their positions, where somebody asks."""
    progress: Tensor | None = None
    """(B,) share of the run that lies before each sample, from 0 to 1."""
    importance: Tensor | None = None
    """(B, N) not negative: how much every patch matters, where the objective knows."""

    @classmethod
    def of(
        cls,
        images: Tensor,
        tower: PatchedTower,
        *,
        embed: Callable[[], Tensor] | None = None,
        progress: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> PatchView:
        """The images as a tower takes them, with what else is known of them."""
        return cls(
            images, tower.patch_size, mean=tower.mean, std=tower.std,
            embed=embed, progress=progress, importance=importance,
        )  # fmt: skip

    def __post_init__(self) -> None:
        height, width = self.images.shape[2:]
        if height < self.patch_size or width < self.patch_size:
            raise InputError(
                f"images of {height}x{width} pixels are smaller than a patch of "
                f"{self.patch_size}; use larger images or a smaller patch"
            )
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"images of {height}x{width} pixels do not divide into patches of "
                f"{self.patch_size}; choose a multiple of the patch size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches; patches are numbered row by row."""
        height, width = self.images.shape[2:]
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        rows, columns = self.grid
        return rows * columns

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def pixels(self) -> Tensor:
        """(B, N, P) pixels of every patch, P = 3 * patch_size**2 in (channel, row, column) order.

        This is the order of a flattened convolution kernel.
        """
        rows, columns = self.grid
        side = self.patch_size
        patches = self.images.reshape(-1, 3, rows, side, columns, side)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, 3, side, side)
        return patches.reshape(len(self.images), rows * columns, 3 * side * side)

    @cached_property
    def normalized(self) -> Tensor:
        """(B, N, P) float32: the pixels of every patch as the model takes them.

        Made once, for reductions that look at them more than once.

        Raises:
            ValueError: if the images are uint8 and mean and std were not given.
        """
        if self.images.dtype != torch.uint8:
            return self.pixels.float()
        if self.mean is None or self.std is None:
            raise ValueError("a view of uint8 images needs a mean and a std to normalize them")
        return normalize(self.pixels, mean=self.mean, std=self.std)


def normalize(pixels: Tensor, *, mean: Channels, std: Channels) -> Tensor:
    """(..., P) uint8 pixels of patches as float32: (pixel / 255 - mean) / std of its channel."""
    normalized = pixels.float()
    for channel, center, spread in zip(normalized.chunk(3, dim=-1), mean, std, strict=True):
        channel.sub_(255 * center).div_(255 * spread)
    return normalized


@dataclass(frozen=True)
class KeptPatches:
    """The patches that stay.

    Dense, where every image keeps equally many: ``index`` is (B, K) patch numbers. Packed, where
    each image keeps its own count: ``index`` is (T,) patch numbers, image after image, and
    ``lengths`` is (B,) patches per image.
    """

    index: Tensor
    lengths: Tensor | None = None

    @classmethod
    def dense(cls, index: Tensor) -> KeptPatches:
        """Equal counts: (B, K) patch numbers."""
        if index.ndim != 2:
            raise ValueError(f"a dense index has shape (B, K), not {tuple(index.shape)}")
        return cls(index)

    @classmethod
    def packed(cls, index: Tensor, lengths: Tensor) -> KeptPatches:
        """Own counts: (T,) patch numbers, image after image, and (B,) patches per image."""
        if index.ndim != 1 or lengths.ndim != 1:
            raise ValueError(
                "a packed index has shape (T,) and its lengths (B,), not "
                f"{tuple(index.shape)} and {tuple(lengths.shape)}"
            )
        return cls(index, lengths)

    @classmethod
    def where(cls, mask: Tensor) -> KeptPatches:
        """Packed, from a (B, N) bool mask that is True where a patch stays."""
        return cls(mask.nonzero()[:, 1], mask.sum(1))

    @property
    def is_packed(self) -> bool:
        """True where every image may keep its own count."""
        return self.lengths is not None

    @property
    def counts(self) -> Tensor:
        """(B,) int64 patches kept per image."""
        if self.lengths is not None:
            return self.lengths
        return self.index.new_full((len(self.index),), self.index.shape[1])

    @property
    def images(self) -> Tensor:
        """(B, K) or (T,): the image that each entry of ``index`` belongs to."""
        if self.lengths is None:
            rows = torch.arange(len(self.index), device=self.index.device)
            return rows[:, None].expand_as(self.index)
        rows = torch.arange(len(self.lengths), device=self.index.device)
        return rows.repeat_interleave(self.lengths, output_size=len(self.index))

    def mask(self, num_patches: int) -> Tensor:
        """(B, N) bool: True where a patch stays."""
        stays = self.index.new_zeros((len(self.counts), num_patches)).bool()
        stays[self.images, self.index] = True
        return stays


def take_patches(view: PatchView, kept: KeptPatches | None) -> Tensor:
    """The pixels of the patches that stay, in the order in which they were kept.

    Returns:
        (B, N, P) where everything stays, (B, K, P) dense or (T, P) packed; dtype of the images.
    """
    pixels = view.pixels  # (B, N, P)
    if kept is None:
        return pixels
    row = kept.images * view.num_patches + kept.index
    # whole rows of a matrix: three times faster on a CPU than indexing the cut image
    taken = pixels.flatten(0, 1).index_select(0, row.flatten())  # (B K or T, P)
    return taken.view(*kept.index.shape, pixels.shape[2])


class ImageReduction(ABC):
    """Decides which patches of every image stay; a frozen dataclass of a recipe.

    Some are calibrated: fields that a recipe leaves open (None) are found on the first images of a
    run before it trains, and kept with the run's recipe and checkpoints.
    """

    mask_ratio: float | None = None
    """Share of the patches that goes; None where that is not what is set."""
    calibrated: ClassVar[tuple[str, ...]] = ()
    """Fields that :meth:`calibrate` fills in where they are None."""
    needs_importance: ClassVar[bool] = False
    """Whether it goes by the importance of patches, which few objectives know."""
    is_uneven: ClassVar[bool] = False
    """Whether another number of patches stays of every image."""

    @property
    def depends_on_progress(self) -> bool:
        """Whether it goes by the share of the run that is done: ``PatchView.progress``."""
        return False

    @abstractmethod
    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches | None:
        """The patches that stay; None where every patch does."""

    @property
    def expected_mask_ratio(self) -> float:
        """Share of the patches that goes of an image on average, as far as it is known before.

        Plans ask reductions for it that keep another number of patches of every image.
        """
        return self.mask_ratio or 0.0

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse (rows, columns) of patches of an image with which this cannot work.

        Raises:
            InputError: naming the setting.
        """
        del grid

    @property
    def calibration_images(self) -> int:
        """Images, over all processes, that :meth:`calibrate` wants; 0 where nothing is open."""
        return 0

    def calibrate(
        self,
        batches: Iterable[tuple[PatchView, NoiseSource]],
        *,
        gather: Gather,
        log: logging.Logger,
    ) -> Self:
        """The same with every calibrated field filled in, alike on every process.

        Args:
            batches: images of this process, with the noise that they have in training.
            gather: of the processes.
            log: told what was found.
        """
        del batches, gather, log
        return self

    def off_target(self, means: dict[str, float]) -> str | None:
        """What a person should know of the objective's metrics over some steps; usually nothing."""
        del means
        return None

    def draw(self, view: PatchView, images: Tensor, *, noise: NoiseSource) -> np.ndarray | None:
        """A picture (3, H*, W*) uint8 of how it decides, for reductions that have one.

        Args:
            view: a few images.
            images: (B, 3, H, W) uint8, the same for people.
            noise: of the images.
        """
        del view, images, noise
        return None


@dataclass(frozen=True, kw_only=True)
class KeepAll(ImageReduction):
    """Every patch stays."""

    @override
    def keep(self, view: PatchView, *, noise: NoiseSource) -> None:
        """None: the tower sees the whole image."""
        return None
