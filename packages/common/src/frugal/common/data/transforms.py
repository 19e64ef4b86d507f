"""Which part of an image is seen: random crops for training, centered ones for evaluation.

Each is a part of a recipe that turns an encoded picture into a uint8 array; the draw of a random
one comes from a generator that belongs to the sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from frugal.common.data.decoding import (
    Interpolation,
    Window,
    as_bytes,
    open_picture,
    resize_window,
)
from frugal.common.errors import InputError
from frugal.common.ranges import Count, Positive, PositiveShare, Probability, check_ranges


@runtime_checkable
class Augmentation(Protocol):
    """From an encoded picture to what the model sees of it."""

    def decode(
        self, encoded: bytes, *, size: tuple[int, int], generator: np.random.Generator
    ) -> np.ndarray:
        """(3, height, width) uint8; raises ``Damaged`` if the picture cannot be decoded."""
        ...


def random_window(
    height: int,
    width: int,
    *,
    fractions: Sequence[float],
    log_ratios: Sequence[float],
    place: tuple[float, float],
) -> Window | None:
    """The first drawn rectangle that fits into an image; None if none does.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        fractions: share of the image's area, one per try.
        log_ratios: logarithm of width over height, one per try.
        place: uniform numbers in [0, 1) that decide on top and left.
    """
    for fraction, log_ratio in zip(fractions, log_ratios, strict=True):
        area, ratio = fraction * height * width, math.exp(log_ratio)
        window_width = round(math.sqrt(area * ratio))
        window_height = round(math.sqrt(area / ratio))
        if 0 < window_width <= width and 0 < window_height <= height:
            top = int(place[0] * (height - window_height + 1))
            left = int(place[1] * (width - window_width + 1))
            return Window(top, left, window_height, window_width)
    return None


def center_window(height: int, width: int, *, size: tuple[int, int], margin: int = 0) -> Window:
    """The largest centered window of the shape of ``size``, less a margin.

    With a margin, a window that will be ``size`` leaves room for ``margin`` pixels of it around
    itself: 0.875 of the shorter side for 32 pixels at 224. Odd rests go to the top and left, as
    in TensorFlow's ImageNet preprocessing and in FLIP.
    """
    share = min(size) / (min(size) + margin)
    unit = min(height / size[0], width / size[1])
    window_height = max(int(share * unit * size[0] + 1e-9), 1)
    window_width = max(int(share * unit * size[1] + 1e-9), 1)
    return Window(
        (height - window_height + 1) // 2, (width - window_width + 1) // 2,
        window_height, window_width,
    )  # fmt: skip


def clamped_window(height: int, width: int, *, ratio: tuple[float, float]) -> Window:
    """The largest centered window whose width over height lies within ``ratio`` (torchvision)."""
    low, high = ratio
    window_height, window_width = height, width
    if width / height < low:
        window_height = round(width / low)
    elif width / height > high:
        window_width = round(height * high)
    return Window(
        (height - window_height) // 2, (width - window_width) // 2, window_height, window_width
    )


def check_crop(crop: Any) -> None:
    """Refuse what no random crop can do: one with a scale and a ratio.

    Raises:
        InputError: naming the option, its value and what is allowed.
    """
    check_ranges(crop, "data.augmentation")
    if crop.scale[0] > crop.scale[1]:
        raise InputError(
            f"data.augmentation.scale is {crop.scale}; give the least and the largest share of the "
            "area, between 0 and 1"
        )
    if crop.ratio[0] > crop.ratio[1]:
        raise InputError(
            f"data.augmentation.ratio is {crop.ratio}; give the least and the largest width over "
            "height"
        )


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random rectangle of the image, resized and perhaps mirrored (FLIP, arXiv:2212.00794)."""

    scale: tuple[PositiveShare, PositiveShare] = (0.5, 1.0)
    """Least and largest share of the image's area."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Least and largest width over height; drawn log-uniformly."""
    flip: Probability = 0.5
    """Probability of mirroring left and right."""
    tries: Count = 10
    """Rectangles drawn until one fits."""
    fallback: Literal["center", "clamp"] = "center"
    """If none fits. center: FLIP's centered window with a margin of 32 pixels at the size of the
    result. clamp: torchvision's largest centered window of an allowed ratio."""
    interpolation: Interpolation = "bicubic"
    """bicubic, bilinear: with anti-aliasing (torchvision). tf2_bicubic: TensorFlow's without it,
    with which FLIP's published models were trained; tf1_bicubic: TensorFlow 1's. What either of
    the two puts between and beyond the 256 gray levels is rounded and clipped in training."""
    reduced_decoding: bool = True
    """Decode JPEG at a reduced scale where the crop is shrunk that much anyway; TensorFlow's
    kernels take every pixel."""

    def __post_init__(self) -> None:
        check_crop(self)

    def window(
        self, height: int, width: int, *, size: tuple[int, int], generator: np.random.Generator
    ) -> tuple[Window, bool]:
        """The rectangle drawn for an image, and whether it is mirrored."""
        # always as many draws, so that the flip does not depend on which try fits
        draws = generator.random(2 * self.tries + 3).tolist()
        low, high = self.scale
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        window = random_window(
            height,
            width,
            fractions=[low + (high - low) * draw for draw in draws[: self.tries]],
            log_ratios=[log_low + (log_high - log_low) * draw for draw in draws[self.tries : -3]],
            place=(draws[-3], draws[-2]),
        )
        if window is None and self.fallback == "center":
            window = center_window(height, width, size=size, margin=32)
        elif window is None:
            window = clamped_window(height, width, ratio=self.ratio)
        return window, draws[-1] < self.flip

    def decode(
        self, encoded: bytes, *, size: tuple[int, int], generator: np.random.Generator
    ) -> np.ndarray:
        """(3, height, width) uint8; raises ``Damaged`` if the picture cannot be decoded."""
        image = open_picture(encoded)
        window, mirrored = self.window(image.height, image.width, size=size, generator=generator)
        pixels = as_bytes(
            resize_window(
                image,
                window,
                size,
                interpolation=self.interpolation,
                reduced=self.reduced_decoding,
            )
        )
        return pixels[:, :, ::-1] if mirrored else pixels


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The middle of the image, resized; nothing is drawn."""

    order: Literal["resize_first", "crop_first", "stretch"] = "resize_first"
    """resize_first: shrink the shorter side to the size, then cut out the middle (open_clip,
    torchvision). crop_first: cut out the centered window of the full shorter side, then resize it
    (FLIP). stretch: resize the whole image, whatever its shape (CLIPA-v2)."""
    interpolation: Interpolation = "bicubic"
    """bicubic, bilinear, lanczos, box, hamming: with anti-aliasing (torchvision). nearest: one
    pixel each. tf1_bicubic, tf2_bicubic: TensorFlow's without anti-aliasing; the first is the one
    that FLIP's published accuracies were measured with."""
    share: PositiveShare = 1.0
    """With resize_first and stretch, side of what is cut out over that of the resized image;
    classifiers are mostly measured at 0.875, 224 of 256 pixels."""
    half_pixel: Literal["even", "down"] = "even"
    """Where the middle begins that would begin at half a pixel of the resized image. even: at the
    next even one (torchvision, open_clip, timm). down: at the one before (transformers)."""

    def __post_init__(self) -> None:
        check_ranges(self, "crop")
        if self.share < 1 and self.order == "crop_first":
            raise InputError(
                f"crop.share is {self.share}, but crop.order=crop_first leaves nothing over; "
                "leave it out"
            )

    def decode(
        self,
        encoded: bytes,
        *,
        size: tuple[int, int],
        generator: np.random.Generator | None = None,
    ) -> np.ndarray:
        """(3, height, width) uint8; raises ``Damaged`` if the picture cannot be decoded."""
        return as_bytes(self.gray_levels(encoded, size=size))

    def gray_levels(self, encoded: bytes, *, size: tuple[int, int]) -> np.ndarray:
        """The same before it is rounded to bytes: what evaluations take.

        Returns:
            (3, height, width) uint8, or with TensorFlow's kernels float32, which may lie a little
            below 0 and above 255.

        Raises:
            Damaged: if the picture cannot be decoded.
        """
        image = open_picture(encoded)
        height, width = image.height, image.width
        if self.order == "crop_first":
            window = center_window(height, width, size=size)
        else:
            window = self._middle(height, width, size)
        isolated = self.order == "crop_first"
        return resize_window(
            image, window, size, interpolation=self.interpolation, isolated=isolated
        )

    def _middle(self, height: int, width: int, size: tuple[int, int]) -> Window:
        """Where the middle of the resized image lies, in the pixels of the image."""
        least = (int(size[0] / self.share + 1e-9), int(size[1] / self.share + 1e-9))
        resized = least if self.order == "stretch" else resized_size(height, width, least=least)
        rounded = round if self.half_pixel == "even" else math.floor
        top, left = (rounded((r - s) / 2) for r, s in zip(resized, size, strict=True))
        down, across = height / resized[0], width / resized[1]
        return Window(top * down, left * across, size[0] * down, size[1] * across)


def resized_size(height: int, width: int, *, least: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image that is resized, its shape kept, until it just covers ``least``.

    To the pixel that of open_clip, torchvision and timm: towards a square they cut the longer side
    to whole pixels, towards any other shape they round both.
    """
    if least[0] == least[1]:
        longer = int(least[0] * max(height, width) / min(height, width))
        return (least[0], longer) if height <= width else (longer, least[0])
    shrinking = min(height / least[0], width / least[1])
    return max(round(height / shrinking), least[0]), max(round(width / shrinking), least[1])


def normalize(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Gray levels as towers take them: (level / 255 - mean) / std of its channel.

    Args:
        images: (..., 3, H, W) from 0 to 255, uint8 or float, on any device.
        mean: of each channel, of levels from 0 to 1.
        std: the same of the standard deviation.

    Returns:
        (..., 3, H, W) float32, or of the images' own dtype where that is floating.
    """
    dtype = images.dtype if images.is_floating_point() else torch.float32
    # filled on the device: a list would be copied there while the host waits
    center, spread = (
        torch.stack([images.new_full((1, 1), value, dtype=dtype) for value in values])
        for values in (mean, std)
    )  # (3, 1, 1) each
    return (images / 255 - center) / spread
