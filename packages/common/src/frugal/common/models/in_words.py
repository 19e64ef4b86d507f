"""What a model computes with, in words: what its weights alone do not show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from frugal.common.data.transforms import CenterCrop
from frugal.common.models.preprocess import describe

_FACTS = {
    "activation": "activation",
    "heads": "heads",
    "norm_epsilon": "epsilon",
    "pooling": "pooled by",
    "length": "tokens",
}


def in_words(model: Any, crop: CenterCrop | None = None, *, told_by: str = "") -> str:
    """One line about the towers of a recipe's model, and about how images are prepared for it.

    Args:
        model: what a recipe calls so; its ``image`` and ``text`` where it has them.
        crop: how an image is cut and resized; None where that is not known.
        told_by: see :class:`frugal.common.models.preprocess.Preparation`.
    """
    text = getattr(model, "text", None)
    parts = [f"text tower: {', '.join(_facts(text))}"] if text is not None else []
    image = getattr(model, "image", None)
    if image is not None:
        parts.insert(0, f"image tower: {describe(image, crop, told_by=told_by)}")
    return "; ".join(parts)


def _facts(tower: Any) -> Iterable[str]:
    for name, words in _FACTS.items():
        value = getattr(tower, name, None)
        if value is not None:
            yield f"{words} {shown(value)}"


def shown(value: Any) -> str:
    """A value of a configuration as the command line takes it."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def some(names: Iterable[str], most: int = 4) -> str:
    """A few names, and how many there are besides."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
