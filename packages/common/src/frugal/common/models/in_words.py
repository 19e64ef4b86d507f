"""What a model computes with, in words: what weights alone do not show, printed when they are read.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_FACTS = {
    "activation": "activation",
    "heads": "heads",
    "norm_epsilon": "epsilon",
    "pooling": "pooled by",
    "positions": "positions",
    "height_width": "pixels",
    "mean": "mean",
    "std": "std",
    "length": "tokens",
}


def in_words(model: Any, crop: Any = None) -> str:
    """One line about the towers of a recipe's model, and about how images are cut for it.

    Args:
        model: what a recipe calls so; its ``image`` and ``text`` where it has them.
        crop: a ``CenterCrop``; None where none is known.
    """
    parts = [
        f"{part} tower: {', '.join(_facts(tower))}"
        for part in ("image", "text")
        if (tower := getattr(model, part, None)) is not None
    ]
    if crop is not None:
        parts.append(f"crop: {crop.order}, {crop.interpolation}, share {crop.share:.4g}")
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
