"""The base that every method stands on: data, towers, losses, engines, evaluation, weights.

What a user of the library imports is here, and is loaded when it is asked for::

    from frugal.common import load_model, save_model

    bundle = load_model("runs/l16")  # or a folder of open_clip, transformers or timm, ...
    save_model(bundle, "exported", to="huggingface")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which do not run __getattr__
    from frugal.common.models.bundle import ModelBundle
    from frugal.common.recipe import Recipe
    from frugal.common.weights.load import load_model
    from frugal.common.weights.save import save_model

__all__ = ["ModelBundle", "Recipe", "load_model", "save_model"]

_MODULES = {
    "ModelBundle": "frugal.common.models.bundle",
    "Recipe": "frugal.common.recipe",
    "load_model": "frugal.common.weights.load",
    "save_model": "frugal.common.weights.save",
}


def __getattr__(name: str) -> Any:
    """What stands in ``__all__``, from where it is defined."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
