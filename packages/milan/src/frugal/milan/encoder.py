"""MILAN's image towers by name; nothing here imports torch."""

from __future__ import annotations

from typing import Any

from frugal.common.models.named import image_tower
from frugal.common.models.vit import ImageTower


def encoder(name: str, *, image_size: int | tuple[int, int] = 224, **options: Any) -> ImageTower:
    """The tower that MILAN and MAE pretrain: ``"S/16"``, ``"B/16"``, ``"L/16"`` or ``"H/14"``.

    Source: arXiv:2208.06049, appendix, and MAE (arXiv:2111.06377), whose towers these are: fixed
    sine-cosine positions, a class token, ImageNet's mean and standard deviation. Options override
    fields.

    Raises:
        InputError: if the size is unknown.
    """
    return image_tower(name, image_size=image_size, **{"positions": "sincos", **options})
