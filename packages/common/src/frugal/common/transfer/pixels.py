"""Images as an image tower takes them, and as a person looks at them."""

from __future__ import annotations

import colorsys
from functools import cache

import numpy as np
import torch
from torch import Tensor

from frugal.common.data.transforms import normalize
from frugal.common.models.vit import ImageTower


def normalized(images: Tensor, tower: ImageTower) -> Tensor:
    """(..., 3, H, W) float32 as a tower takes it; float images are that already."""
    if images.dtype != torch.uint8:
        return images
    return normalize(images, mean=tower.mean, std=tower.std)


def gray_levels(images: Tensor, tower: ImageTower) -> Tensor:
    """(..., 3, H, W) uint8: the inverse of :func:`normalized`."""
    if images.dtype == torch.uint8:
        return images
    mean, std = _channels(tower, images)
    return ((images * std + mean) * 255).round().clamp(0, 255).byte()


def side_by_side(images: Tensor, tower: ImageTower) -> np.ndarray:
    """(B, 3, H, W) images beside each other: (3, H, B W) uint8."""
    return gray_levels(images, tower).permute(1, 2, 0, 3).flatten(2).cpu().numpy()


def _channels(tower: ImageTower, images: Tensor) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each: the mean and the standard deviation of a tower's images."""
    mean, std = torch.tensor((tower.mean, tower.std), device=images.device)[..., None, None]
    return mean, std


_GOLDEN = 0.618034
_UNKNOWN = 90


@cache
def _colors(num_classes: int) -> np.ndarray:
    """(256, 3) uint8: a color for every class, neighbors far apart; gray for other labels."""
    table = np.full((256, 3), _UNKNOWN, np.uint8)
    for number in range(num_classes):
        hue, brightness = number * _GOLDEN % 1.0, 0.95 - 0.25 * (number % 3)
        color = colorsys.hsv_to_rgb(hue, 0.75, brightness)
        table[number] = np.round(np.array(color) * 255)
    return table


def paint(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(..., H, W) labels as (..., 3, H, W) uint8 colors."""
    return np.moveaxis(_colors(num_classes)[labels.astype(np.uint8)], -1, -3)
