"""What fine-tuning does to images on the device: erasing a box, mixing two images.

Random erasing (Zhong et al., arXiv:1708.04896), mixup (Zhang et al., arXiv:1710.09412) and CutMix
(Yun et al., arXiv:1905.04899), with the distributions that timm draws from. Everything is a
function of the seed and the number of the sample, whatever process holds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource, SampleNoise
from frugal.common.ranges import (
    CountOrZero,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    check_ranges,
)

_TRIES = 10
_CHUNK_NUMBERS = 1 << 22
"""Numbers of a device drawn at a time: temporaries of some 100 MiB however large the batch."""


class Boxes(NamedTuple):
    """A rectangle of every image, in pixels; empty where it ends where it begins. (B,) each."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def mask(self, height: int, width: int) -> Tensor:
        """(B, 1, H, W) bool: True inside."""
        row = torch.arange(height, device=self.top.device)[:, None]
        column = torch.arange(width, device=self.top.device)
        top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in self)
        return (row >= top) & (row < bottom) & (column >= left) & (column < right)

    @property
    def area(self) -> Tensor:
        """(B,) pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Put noise into one random rectangle of an image."""

    probability: Share = 0.25
    """Of an image to lose a rectangle."""
    area: tuple[PositiveShare, PositiveShare] = (0.02, 1 / 3)
    """Least and largest share of the image's area."""
    ratio: tuple[Positive, Positive] = (0.3, 1 / 0.3)
    """Least and largest height over width; drawn log-uniformly."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective.erasing")
        if self.area[0] > self.area[1]:
            raise InputError(
                f"objective.erasing.area is {self.area}; give the least and the largest share of "
                "the area, between 0 and 1"
            )
        if self.ratio[0] > self.ratio[1]:
            raise InputError(
                f"objective.erasing.ratio is {self.ratio}; give the least and the largest height "
                "over width"
            )

    def boxes(self, height: int, width: int, *, noise: NoiseSource) -> Boxes:
        """The rectangle that each image loses: the first of ten drawn ones that fits."""
        draws = noise.uniform("erase", 3 + 2 * _TRIES)  # (B, 23)
        (least, largest), (low, high) = self.area, map(math.log, self.ratio)
        area = (least + (largest - least) * draws[:, 3 : 3 + _TRIES]) * (height * width)
        ratio = (low + (high - low) * draws[:, 3 + _TRIES :]).exp()
        tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()  # (B, tries)
        fits = (tall < height) & (wide < width)
        happens = (draws[:, 0] < self.probability) & fits.any(1)
        first = fits.int().argmax(1, keepdim=True)
        tall, wide = (side.gather(1, first)[:, 0] * happens for side in (tall, wide))  # (B,)
        top = (draws[:, 1] * (height - tall + 1)).floor()
        left = (draws[:, 2] * (width - wide + 1)).floor()
        return Boxes(*(side.to(torch.int64) for side in (top, top + tall, left, left + wide)))

    def apply(self, images: Tensor, *, seed: int, sample_numbers: Tensor) -> Tensor:
        """(B, 3, H, W) normalized float images with their rectangles full of normal noise."""
        if self.probability == 0:
            return images
        height, width = images.shape[2:]
        erased = torch.empty_like(images)
        rows = max(1, _CHUNK_NUMBERS // images[0].numel())
        for start in range(0, len(images), rows):
            part = slice(start, start + rows)
            noise = SampleNoise(seed, sample_numbers[part])
            inside = self.boxes(height, width, noise=noise).mask(height, width)
            pixels = normal(noise, "erase pixels", images[0].numel()).view_as(images[part])
            erased[part] = torch.where(inside, pixels.to(images.dtype), images[part])
        return erased


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mix every image with a neighbor: blend the two (mixup), or swap a rectangle (CutMix).

    Samples 2 i and 2 i + 1 of the run are each other's partners. The data comes shuffled, so this
    is as random as the reversed batch of timm, but does not depend on how samples are shared out.
    """

    mixup: NotNegative = 0.8
    """Both parameters of the beta distribution of the share that an image keeps; 0 for no mixup."""
    cutmix: NotNegative = 1.0
    """The same for CutMix; 0 for none."""
    cutmix_probability: Share = 0.5
    """Of CutMix, where there are both."""
    together: CountOrZero = 128
    """Consecutive samples that share one draw: the batch of one process in published runs."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective.mixing")
        if self.together < 2 or self.together % 2:
            raise InputError(
                f"objective.mixing.together is {self.together}, must be even: samples are mixed in "
                "pairs"
            )

    @property
    def is_off(self) -> bool:
        """Whether nothing is ever mixed."""
        return self.mixup == 0 and self.cutmix == 0

    def draw(
        self, height: int, width: int, *, seed: int, sample_numbers: Tensor
    ) -> tuple[Tensor, Boxes]:
        """How each image of a batch is mixed.

        Returns:
            The share that it keeps, (B,) float32, as its label has it, and the rectangle that is
            swapped, which is empty for mixup.
        """
        noise = SampleNoise(seed, sample_numbers // self.together)
        draws = noise.uniform("mix", 3)  # (B, 3)
        has_both = self.mixup > 0 and self.cutmix > 0
        probability = self.cutmix_probability if has_both else float(self.cutmix > 0)
        is_cut = draws[:, 0] < probability
        blend = beta(noise, "mixup", self.mixup) if self.mixup > 0 else torch.ones_like(draws[:, 0])
        share = beta(noise, "cutmix", self.cutmix) if self.cutmix > 0 else blend
        side = (1 - share).sqrt() * is_cut
        boxes = _clipped(draws[:, 1], draws[:, 2], side, height=height, width=width)
        kept = 1 - boxes.area.float() / (height * width)
        return torch.where(is_cut, kept, blend), boxes


def _clipped(down: Tensor, across: Tensor, side: Tensor, *, height: int, width: int) -> Boxes:
    """Rectangles of a share of both sides around random pixels, cut off where the image ends."""
    tall, wide = ((side * length).to(torch.int64) for length in (height, width))
    row, column = (down * height).to(torch.int64), (across * width).to(torch.int64)
    return Boxes(
        (row - tall // 2).clamp(0, height),
        (row + (tall + 1) // 2).clamp(0, height),
        (column - wide // 2).clamp(0, width),
        (column + (wide + 1) // 2).clamp(0, width),
    )


def mix(images: Tensor, shares: Tensor, boxes: Boxes, *, mixes: Tensor) -> Tensor:
    """Images mixed with their neighbors.

    Args:
        images: (B, 3, H, W) float, B even; 2 i and 2 i + 1 are partners.
        shares: (B,) what an image keeps of itself.
        boxes: what is swapped; where it is empty, images are blended.
        mixes: (B,) bool; other images stay as they are.

    Returns:
        (B, 3, H, W).
    """
    partner = swap_neighbors(images)
    share = shares.view(-1, 1, 1, 1).to(images.dtype)
    inside = boxes.mask(*images.shape[2:])
    is_cut = (boxes.area > 0).view(-1, 1, 1, 1)
    cut = torch.where(inside, partner, images)
    mixed = torch.where(is_cut, cut, partner.lerp(images, share))
    return torch.where(mixes.view(-1, 1, 1, 1), mixed, images)


def swap_neighbors(values: Tensor) -> Tensor:
    """(B, ...) with rows 2 i and 2 i + 1 in each other's place."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def normal(noise: NoiseSource, purpose: str, count: int) -> Tensor:
    """(B, count) numbers of a standard normal distribution, count even (Box and Muller, 1958)."""
    draws = noise.uniform(purpose, count + count % 2)
    radius, angle = draws.chunk(2, dim=1)
    radius = (-2 * (1 - radius).log()).sqrt()
    angle = angle * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]


def beta(noise: NoiseSource, purpose: str, parameter: float) -> Tensor:
    """(B,) numbers of the beta distribution both of whose parameters are ``parameter``."""
    first, second = (gamma(noise, f"{purpose} {name}", parameter) for name in ("first", "second"))
    return first / (first + second)


def gamma(noise: NoiseSource, purpose: str, shape: float) -> Tensor:
    """(B,) numbers of a gamma distribution of scale 1 (Marsaglia and Tsang, 2000).

    Of ten candidates each the first one that is accepted; at least 95 % are.
    """
    d = (shape + 1 if shape < 1 else shape) - 1 / 3
    c = 1 / math.sqrt(9 * d)
    x = normal(noise, f"{purpose} candidates", _TRIES)  # (B, tries)
    draws = noise.uniform(f"{purpose} acceptance", _TRIES + 1)
    v = (1 + c * x).clamp(min=1e-9) ** 3
    accepted = (1 - draws[:, :_TRIES]).log() < 0.5 * x * x + d - d * v + d * v.log()
    first = accepted.int().argmax(1, keepdim=True)
    numbers = d * v.gather(1, first)[:, 0]
    if shape < 1:
        numbers = numbers * (1 - draws[:, _TRIES]) ** (1 / shape)
    return numbers
