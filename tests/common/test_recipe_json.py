"""A recipe as JSON, and what of it may change where a run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from frugal.common.errors import InputError
from frugal.common.recipe_json import difference, from_json, load_recipe, to_json
from frugal.flip.recipes import RECIPES, demo


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_from_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def test_a_refused_value_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    saved = to_json(demo())
    saved["run"]["log_every"] = "48"
    path.write_text(json.dumps(saved))
    with pytest.raises(InputError) as refused:
        load_recipe(path)
    assert str(refused.value) == f"{path}: run.log_every is '48', must be a number"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "image", "image_size"), [32, 32, 32]),
        (("model", "image", "mean"), [0.5]),
        (("evaluation",), {}),
        (("data", "train"), "data/scenes/train"),
        (("batch_size",), True),
        (("run", "interpolate"), "yes"),
        (("schedule",), to_json(demo().optimizer)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_of_another_type_is_refused_with_its_file_and_field(
    path: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    saved = to_json(demo())
    part = saved
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=f"recipe.json has .* as {path[-1]} of .*, which is no "):
        load_recipe(file)


def test_a_recipe_of_another_program_is_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"type": "os.system"}))
    with pytest.raises(InputError, match="not one of Frugal's"):
        load_recipe(path)
    path.write_text(json.dumps({"type": "frugal.common.recipe_json.load_recipe"}))
    with pytest.raises(InputError, match="not a part of a recipe"):
        load_recipe(path)


@pytest.mark.parametrize("content", ["", "[1]", '{"type": "frugal.common.recipe.Recipe"}', "\x00"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(InputError):
        load_recipe(path)


def test_a_field_of_another_version_is_named() -> None:
    encoded = to_json(demo())
    encoded["run"]["color"] = "red"
    with pytest.raises(InputError, match="'color'"):
        from_json(encoded)


def test_only_what_changes_the_run_counts_as_another_recipe() -> None:
    recipe = demo()
    same = replace(
        recipe,
        run=replace(recipe.run, log_every=3, dir=Path("elsewhere")),
        engine=replace(recipe.engine, deepspeed_config=Path("zero3.json"), compile=True),
        data=replace(recipe.data, workers=7),
        evaluation=(),
    )
    assert difference(recipe, same) == []
    for other in (
        replace(recipe, run=replace(recipe.run, seed=1)),
        replace(recipe, engine=replace(recipe.engine, accumulate=2)),
        replace(recipe, batch_size=512),
        replace(recipe, data=replace(recipe.data, train=("other.tar",))),
    ):
        assert len(difference(recipe, other)) == 1
