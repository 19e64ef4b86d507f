"""Random changes of color for segmentation, made on the device.

SSD's distortion (Liu et al., arXiv:1512.02325) as mmsegmentation has it: every change happens or
not on its own, and leaves whole gray levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from frugal.common.data.color import Changes, HueShare, change_colors
from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import NotNegative, Probability, Range, check_ranges

PURPOSE = "photometric distortion"
"""Name of the noise that decides how the colors of an image change."""
_DRAWS = 9


_GrayLevels = Annotated[float, Range(least=0, most=255, words="must lie in 0 to 255")]


@dataclass(frozen=True, kw_only=True)
class PhotometricDistortion:
    """Change brightness, contrast, saturation and hue, the contrast before or after the colors."""

    probability: Probability = 0.5
    """Of each change."""
    brightness: _GrayLevels = 32.0
    """Most gray levels that are added or taken away."""
    contrast: tuple[NotNegative, NotNegative] = (0.5, 1.5)
    """Least and largest factor of all gray levels."""
    saturation: tuple[NotNegative, NotNegative] = (0.5, 1.5)
    """Least and largest factor of the saturation; the brightest channel stays."""
    hue: HueShare = 0.1
    """Hues turn by at most this share of the color circle, either way: OpenCV's 18 of 180."""

    def __post_init__(self) -> None:
        check_ranges(self, "objective.distortion")
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if low > high:
                raise InputError(
                    f"objective.distortion.{name} is {(low, high)}; give the least and the largest "
                    "factor, neither negative"
                )

    def apply(self, images: Tensor, *, noise: NoiseSource) -> Tensor:
        """(B, 3, H, W) uint8 images in other colors; ``noise`` has one row per image."""
        if self.probability == 0:
            return images
        draws = noise.uniform(PURPOSE, _DRAWS)  # (B, 9)
        happens, amounts = draws[:, :4] < self.probability, draws[:, 4:8]
        contrast_first = draws[:, 8] < 0.5
        shift = ((2 * amounts[:, 0] - 1) * self.brightness).where(happens[:, 0], 0.0)
        contrast = _between(*self.contrast, amounts[:, 1]).where(happens[:, 1], 1.0)
        saturation = _between(*self.saturation, amounts[:, 2]).where(happens[:, 2], 1.0)
        turn = ((2 * amounts[:, 3] - 1) * self.hue).where(happens[:, 3], 0.0)
        levels = _whole(images + _per_image(shift))
        levels = _whole(levels * _per_image(contrast.where(contrast_first, 1.0)))
        levels = _whole(_saturate(levels, _per_image(saturation)))
        levels = _turn_hue(levels, turn)
        return _whole(levels * _per_image(contrast.where(~contrast_first, 1.0))).byte()


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share


def _per_image(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _whole(levels: Tensor) -> Tensor:
    """Gray levels that bytes can hold, in float32."""
    return levels.clamp(0, 255).floor()


def _saturate(levels: Tensor, factor: Tensor) -> Tensor:
    """Every channel as many times as far below the brightest one, but none below 0."""
    brightest = levels.amax(1, keepdim=True)  # (B, 1, H, W)
    chroma = brightest - levels.amin(1, keepdim=True)
    factor = factor.minimum(brightest / chroma.clamp(min=1))
    return brightest - (brightest - levels) * factor


def _turn_hue(levels: Tensor, turn: Tensor) -> Tensor:
    """(B, 3, H, W) whole levels whose hues are turned by (B,) shares of the color circle."""
    always = torch.ones_like(turn, dtype=torch.bool)
    order = torch.arange(4, device=turn.device).flip(0).expand(len(turn), 4)  # the hue comes first
    amounts = torch.ones_like(order, dtype=turn.dtype)
    amounts[:, 3] = turn
    changes = Changes(is_jittered=always, is_gray=~always, order=order, amounts=amounts)
    return change_colors(levels.byte(), changes).float()
