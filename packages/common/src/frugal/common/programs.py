"""Recipes of every installed entry script, for commands that are of none of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from frugal.common.cli import Recipes, named_recipe
from frugal.common.errors import InputError
from frugal.common.installed import installed_packages
from frugal.common.recipe import Recipe


def recipe_named(name: str) -> tuple[Recipe, str]:
    """The recipe that a word of the command line names, and what is said about it.

    Raises:
        InputError: if there is none.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "recipe.json"
    if path.suffix == ".json":
        return named_recipe({}, str(path))
    program, _, rest = name.partition(":")
    return named_recipe(recipes_of(program), rest)


def recipes_of(program: str) -> Recipes:
    """The recipes of an entry script, such as ``flip.train``, or of the only one of a method.

    Raises:
        InputError: if there is no such script.
    """
    name = program if "." in program else f"{program}.train"
    try:
        held = vars(importlib.import_module(f"frugal.{name}"))
    except ImportError:
        held = {}
    found = [held[key] for key in held if key.isupper() and isinstance(held[key], dict)]
    if not found:
        raise InputError(
            f"there is no program {program!r}; give PROGRAM:NAME with an entry script such as "
            f"{', '.join(_programs())}, or a run directory or recipe.json"
        )
    return found[0]


def _programs() -> Iterator[str]:
    """Entry scripts of installed methods, by the names that they usually have."""
    for name in installed_packages():
        if name == "common":
            continue
        package = importlib.import_module(f"frugal.{name}")
        for module in pkgutil.iter_modules(package.__path__):
            if module.name in ("train", "pretrain", "finetune", "linear_probe", "segment"):
                yield f"{name}.{module.name}"
