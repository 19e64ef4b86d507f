"""What a model computes with, in words: what its weights alone do not show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from frugal.common.models.bundle import ModelBundle, TextSpec
from frugal.common.models.preprocess import describe

_FACTS = {
    "activation": "activation",
    "heads": "heads",
    "norm_epsilon": "epsilon",
    "pooling": "pooled by",
    "length": "tokens",
}


def in_words(bundle: ModelBundle) -> str:
    """One line about the towers of a model, and about how images are prepared for it."""
    image = describe(bundle.image, bundle.transform, told_by=bundle.told_by)
    parts = [f"image tower: {image}"]
    if bundle.text is not None:
        parts.append(f"text tower: {', '.join(_facts(bundle.text))}")
    return "; ".join(parts)


def _facts(tower: TextSpec) -> Iterable[str]:
    settings = vars(tower)  # a configuration, ours or another library's
    for name, words in _FACTS.items():
        if settings.get(name) is not None:
            yield f"{words} {shown(settings[name])}"


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
