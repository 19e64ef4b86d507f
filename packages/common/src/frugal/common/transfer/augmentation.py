"""What fine-tuning and probing do to a picture in the loader.

Fine-tuning follows MAE (arXiv:2111.06377, appendix A.2): a random crop, then RandAugment (Cubuk et
al., arXiv:1909.13719) with timm's operations. Probing follows it too (appendix A.3): the crop of
BYOL (arXiv:2006.07733) and a flip. Every draw comes from the sample's own generator.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageOps

from frugal.common.data.decoding import Interpolation, Window, as_bytes, open_picture, resize_window
from frugal.common.data.transforms import RandomResizedCrop, check_crop
from frugal.common.errors import InputError
from frugal.common.ranges import Positive, PositiveShare, Probability, Range, check_ranges

_POLICY = re.compile(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(weights|3a|3aw))*")
_TRANSLATION = 0.45
"""Largest translation in pixels over the shorter side, for policies that count in pixels."""

Picture = Image.Image


_Level = Annotated[int, Range(least=0, most=255, words="must lie in 0 to 255")]


@dataclass(frozen=True, kw_only=True)
class RandAugmentedCrop:
    """A random crop, whose colors and geometry timm's RandAugment changes."""

    crop: RandomResizedCrop = field(
        default_factory=lambda: RandomResizedCrop(scale=(0.08, 1.0), fallback="clamp")
    )
    policy: str = "rand-m9-mstd0.5-inc1"
    """In timm's words: two operations (-n2), each with probability 0.5 (-p0.5), at a strength drawn
    from a normal distribution around 9 (-m9) with a deviation of 0.5 (-mstd0.5), and operations
    that all grow with it (-inc1)."""
    fill: tuple[_Level, _Level, _Level] = (124, 116, 104)
    """Red, green and blue of what moves into the picture; ImageNet's mean."""

    def __post_init__(self) -> None:
        if _POLICY.fullmatch(self.policy) is None:
            raise InputError(
                f"data.augmentation.policy is {self.policy!r}; write it as timm does, such as "
                "rand-m9-mstd0.5-inc1"
            )
        check_ranges(self, "data.augmentation")

    def decode(
        self, encoded: bytes, *, size: tuple[int, int], generator: np.random.Generator
    ) -> np.ndarray:
        """(3, height, width) uint8; raises ``Damaged`` if the picture cannot be decoded."""
        pixels = self.crop.decode(encoded, size=size, generator=generator)
        picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        with _global_draws(generator):
            picture = _rand_augment(self.policy, self.fill, min(size))(picture)
        return np.asarray(picture).transpose(2, 0, 1)


@functools.lru_cache(maxsize=8)
def _rand_augment(
    policy: str, fill: tuple[int, int, int], side: int
) -> Callable[[Picture], Picture]:
    from timm.data.auto_augment import rand_augment_transform

    augment = rand_augment_transform(
        policy,
        {
            "translate_const": int(_TRANSLATION * side),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return augment


def _posterize(picture: Picture, bits: int, **_: Any) -> Picture:
    """Keep the highest bits of every gray level, at least one of them.

    At full strength timm asks for none: black in older versions of Pillow, refused by newer ones.
    """
    return ImageOps.posterize(picture, max(bits, 1))


@contextmanager
def _global_draws(generator: np.random.Generator) -> Iterator[None]:
    """Let code that draws from Python's and NumPy's global generators draw from this one instead.

    timm's operations take no generator. The global states come back as they were.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(int(generator.integers(2**63)))
    np.random.seed(int(generator.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@dataclass(frozen=True, kw_only=True)
class SingleDrawCrop:
    """A random rectangle that is cut off where the image ends, resized and perhaps mirrored.

    The crop of BYOL's linear evaluation (arXiv:2006.07733) as MAE has it: no rectangle is drawn a
    second time.
    """

    scale: tuple[PositiveShare, PositiveShare] = (0.08, 1.0)
    """Least and largest share of the image's area, before it is cut off."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Least and largest width over height; drawn log-uniformly."""
    flip: Probability = 0.5
    """Probability of mirroring left and right."""
    interpolation: Interpolation = "bicubic"
    """As that of a training crop."""
    reduced_decoding: bool = True
    """Decode JPEG at a reduced scale where the crop is shrunk that much anyway."""

    def __post_init__(self) -> None:
        check_crop(self)

    def decode(
        self, encoded: bytes, *, size: tuple[int, int], generator: np.random.Generator
    ) -> np.ndarray:
        """(3, height, width) uint8; raises ``Damaged`` if the picture cannot be decoded."""
        image = open_picture(encoded)
        share, ratio, down, across, mirror = generator.random(5).tolist()
        low, high = (math.log(limit) for limit in self.ratio)
        window = single_window(
            image.height,
            image.width,
            fraction=self.scale[0] + (self.scale[1] - self.scale[0]) * share,
            ratio=math.exp(low + (high - low) * ratio),
            place=(down, across),
        )
        pixels = as_bytes(
            resize_window(
                image,
                window,
                size,
                interpolation=self.interpolation,
                reduced=self.reduced_decoding,
            )
        )
        return pixels[:, :, ::-1] if mirror < self.flip else pixels


def single_window(
    height: int, width: int, *, fraction: float, ratio: float, place: tuple[float, float]
) -> Window:
    """The rectangle of a share of an image's area and a shape, cut off where the image ends.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        fraction: share of the area.
        ratio: width over height.
        place: uniform numbers in [0, 1) that decide on top and left.
    """
    area = fraction * height * width
    window_width = min(max(round(math.sqrt(area * ratio)), 1), width)
    window_height = min(max(round(math.sqrt(area / ratio)), 1), height)
    top = int(place[0] * (height - window_height + 1))
    left = int(place[1] * (width - window_width + 1))
    return Window(top, left, window_height, window_width)
