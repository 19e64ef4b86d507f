"""Recipes by the names of programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.programs import recipe_named, recipes_of
from frugal.flip.recipes import demo
from frugal.milan.segmentation_recipes import SEGMENTATION


def test_a_word_names_a_recipe_of_a_method_or_a_run(tmp_path: Path) -> None:
    assert recipe_named("flip:demo")[0] == demo()
    assert recipe_named("flip.train:demo_tuning")[1].startswith("The short unmasked stage")
    assert recipes_of("milan.segment") is SEGMENTATION
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(InputError, match="is not a recipe"):
        recipe_named(str(tmp_path))
