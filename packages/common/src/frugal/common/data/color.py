"""Random changes of color, on the device that holds the images.

SimCLR's (Chen et al., arXiv:2002.05709, appendix A) in the strengths of CLIPA (arXiv:2305.07017).
The distribution is that of ``torchvision.transforms.ColorJitter`` on uint8 tensors, every operation
rounding down to whole gray levels; what is drawn for an image is a function of its sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import NotNegative, Probability, Range, check_ranges

PURPOSE = "colour"
"""Name of the noise that decides how the colors of an image change."""
_OPERATIONS = _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_DRAWS = 2 + 2 * len(_OPERATIONS)
_GRAY = (0.2989, 0.587, 0.114)
_CHUNK_NUMBERS = 1 << 22
"""Numbers changed at a time: temporaries of 16 MiB however large the batch."""


HueShare = Annotated[
    float, Range(least=0, most=0.5, words="must lie between 0 and 0.5, half of the circle")
]


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue in a random order, then drop the color."""

    probability: Probability = 0.8
    """Of the four changes, all of them or none."""
    brightness: NotNegative = 0.32
    """Factors are drawn uniformly between 1 - this, but at least 0, and 1 + this."""
    contrast: NotNegative = 0.32
    """The same for the distance of every pixel from the mean gray level."""
    saturation: NotNegative = 0.32
    """The same for the distance of every pixel from its own gray level."""
    hue: HueShare = 0.08
    """Hues turn by at most this share of the color circle, either way."""
    gray: Probability = 0.2
    """Probability of an image without color."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.color")

    def apply(self, images: Tensor, *, noise: NoiseSource) -> Tensor:
        """The images in other colors.

        Args:
            images: (B, 3, H, W) uint8, on any device.
            noise: one row per image.

        Returns:
            (B, 3, H, W) uint8, a new tensor unless nothing is ever changed.

        Raises:
            InputError: if the images are normalized already.
        """
        if self.probability == 0 and self.gray == 0:
            return images
        if images.dtype != torch.uint8:
            raise InputError(
                f"data.color changes uint8 images, but these are {images.dtype}; set "
                "data.color.probability and data.color.gray to 0, or choose an augmentation "
                "that leaves gray levels"
            )
        changes = self._changes(noise.uniform(PURPOSE, _DRAWS))
        size = max(1, _CHUNK_NUMBERS // max(images[0].numel(), 1)) if len(images) else 1
        changed = torch.empty_like(images)
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            changed[rows] = change_colors(images[rows], changes.rows(rows))
        return changed

    def _changes(self, draws: Tensor) -> Changes:
        """What happens to each image, from (B, 10) uniform numbers."""
        factors = (self.brightness, self.contrast, self.saturation)
        lows = (*(max(0.0, 1 - by) for by in factors), -self.hue)
        highs = (*(1 + by for by in factors), self.hue)
        # filled on the device: a list would be copied there while the host waits
        low, high = (torch.stack([draws.new_full((), v) for v in side]) for side in (lows, highs))
        return Changes(
            is_jittered=draws[:, 0] < self.probability,
            is_gray=draws[:, 1] < self.gray,
            order=draws[:, 2 : 2 + len(_OPERATIONS)].argsort(dim=1, stable=True),
            amounts=low + (high - low) * draws[:, -len(_OPERATIONS) :],
        )


NO_CHANGE = ColorJitter(probability=0.0, gray=0.0)
"""Colors stay as they are."""


@dataclass(frozen=True)
class Changes:
    """What happens to the colors of each image of a batch."""

    is_jittered: Tensor
    """(B,) bool: whether the four operations happen."""
    is_gray: Tensor
    """(B,) bool: whether the color goes, afterwards."""
    order: Tensor
    """(B, 4): brightness 0, contrast 1, saturation 2, hue 3, as they follow one another."""
    amounts: Tensor
    """(B, 4): three factors, 1 for no change, and a share of the color circle."""

    def rows(self, rows: slice) -> Changes:
        """The same for some of the images."""
        return Changes(*(value[rows] for value in vars(self).values()))


def change_colors(images: Tensor, changes: Changes) -> Tensor:
    """(B, 3, H, W) uint8 images after their changes.

    Brightness, contrast and saturation blend an image with something else, and so are one
    operation with three choices. They run before the hue turns and again behind it, each time for
    those images alone whose order says so; the costly turn happens once.
    """
    levels = images.float()
    hue_place = (changes.order == _HUE).int().argmax(dim=1)  # (B,)
    for place in range(_HUE):
        levels = _blend(levels, changes, place, changes.is_jittered & (place < hue_place))
    levels = _turn_hue(levels, changes.amounts[:, _HUE].where(changes.is_jittered, 0.0))
    for place in range(1, len(_OPERATIONS)):
        levels = _blend(levels, changes, place, changes.is_jittered & (place > hue_place))
    gray = _gray_levels(levels).expand_as(levels)
    levels = torch.where(_per_image(changes.is_gray), gray, levels)
    return levels.to(torch.uint8)


def _per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _gray_levels(levels: Tensor) -> Tensor:
    """(B, 1, H, W), whole numbers."""
    red, green, blue = levels.unbind(1)
    gray = (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])
    return gray.floor_().unsqueeze(1)


def _blend(levels: Tensor, changes: Changes, place: int, happens: Tensor) -> Tensor:
    """The operation at a place of each image's order, where it happens; hue is none of them."""
    operation = changes.order[:, place]  # (B,)
    factor = changes.amounts.gather(1, operation[:, None])[:, 0].where(happens, 1.0)
    gray = _gray_levels(levels)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    share = _per_image(1 - factor)
    other = gray.mul_(share * _per_image(operation == _SATURATION))
    other += mean * (share * _per_image(operation == _CONTRAST))
    return (levels * _per_image(factor)).add_(other).clamp_(0, 255).floor_()


def _turn_hue(levels: Tensor, shift: Tensor) -> Tensor:
    """Images whose hues are turned by a share of the color circle; (B,) zeros change nothing.

    Value and chroma stay. Each channel falls from the value by the chroma as its hue is further
    from the channel's own: a trapezoid over the six sectors of the circle.
    """
    red, green, blue = levels.unbind(1)  # (B, H, W) each
    value = levels.amax(1)
    chroma = value - levels.amin(1)
    divisor = chroma.clamp(min=1)  # whole numbers: 0 only where there is no hue
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = sector + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (sector + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    turned = torch.stack(channels, dim=1).round()
    return torch.where(_per_image(shift != 0), turned, levels)
