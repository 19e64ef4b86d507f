"""A changed default shows in review: every named recipe is what its golden text says.

``python tests/architecture/test_golden_recipes.py`` writes the texts. A file holds the recipes of
one program. The first is written in full, one field a line; each other as what it changes of the
earlier recipe that it is nearest to, so that a changed default shows once.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frugal.common.cli import Recipes
from frugal.common.recipe_json import to_json

PACKAGES = Path(__file__).parents[2] / "packages"
FOLDER = Path(__file__).parents[1] / "golden" / "recipes"


def programs() -> dict[str, Recipes]:
    """The recipes of every program that trains, by its name below ``frugal``."""
    found = {}
    for path in sorted(PACKAGES.glob("*/src/frugal/*/*.py")):
        if match := re.search(r"^    main\((\w+), method=", path.read_text(), re.MULTILINE):
            name = f"{path.parent.name}.{path.stem}"
            found[name] = getattr(importlib.import_module(f"frugal.{name}"), match[1])
    return found


def fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of a recipe as JSON, with the path that leads to it."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from fields(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, item in enumerate(value):
            yield from fields(item, f"{name}.{place}")
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def text_of(recipes: Recipes) -> str:
    """What the file of a program holds."""
    known: dict[str, dict[str, str]] = {}
    lines: list[str] = []
    for name, make in recipes.items():
        leaves = dict(fields(to_json(make())))
        changes = {earlier: _changes(known[earlier], leaves) for earlier in known}
        nearest = min(changes, key=lambda earlier: len(changes[earlier]), default=None)
        told = [f"{key} = {text}" for key, text in leaves.items()]
        lines += [f"[{name}]" if nearest is None else f"[{name}] is {nearest} but for"]
        lines += [*(told if nearest is None else changes[nearest]), ""]
        known[name] = leaves
    return "\n".join(lines)


def _changes(earlier: dict[str, str], leaves: dict[str, str]) -> list[str]:
    gone = [f"{key} is gone" for key in earlier if key not in leaves]
    return [*(f"{k} = {v}" for k, v in leaves.items() if earlier.get(k) != v), *gone]


@pytest.mark.parametrize("program", programs())
def test_named_recipes_are_as_their_golden_text_says(program: str) -> None:
    assert text_of(programs()[program]) == (FOLDER / f"{program}.txt").read_text(), (
        f"a recipe changed: if it should, run python {Path(__file__).name} and review the texts"
    )


def test_no_golden_text_is_of_a_program_that_is_gone() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == programs().keys()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for program, named in programs().items():
        (FOLDER / f"{program}.txt").write_text(text_of(named))
