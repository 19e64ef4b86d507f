"""Classes of pixels as colors, for tensorboard; nothing here imports torch."""

from __future__ import annotations

import colorsys
from functools import cache

import numpy as np

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
