"""Weights whose names and shapes fit, of a model that computes something else with them."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import recipe_of, saved, started

from frugal.common.checkpoint.store import find_checkpoint, save_weights
from frugal.common.cli import read_command_line
from frugal.common.data.tokenizers import ClipBpe, WordPiece
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.same_function import MAY_DIFFER, differences
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import to_json
from support import alter_state

IMAGE = {
    "width": 32, "depth": 2, "heads": 4, "mlp_width": 24, "patch_size": 4,
    "mean": (0.5, 0.25, 0.125), "std": (0.5, 0.3, 0.2), "patch_bias": True,
    "class_token": "without_position", "positions": "sincos", "pre_norm": False,
    "activation": "quick_gelu", "norm_epsilon": 3e-7, "pooling": "mean_all",
    "norm_after_pooling": True, "layer_scale": 0.25, "projector_width": 12, "projector_outputs": 9,
}  # fmt: skip
TEXT = {
    "width": 32, "depth": 2, "heads": 4, "mlp_width": 24, "vocabulary": 40, "pad_id": 1,
    "causal": False, "pad_mask": True, "activation": "gelu_tanh", "norm_epsilon": 1e-3,
    "pooling": "mean", "layer_scale": 1e-05,
}  # fmt: skip
WHOLE = {"embed_dim": 12, "head_width": 20, "initial_logit_bias": -10.0, "norm_epsilon": 1e-6}
SHAPELESS = (
    "heads", "mean", "std", "activation", "norm_epsilon", "pooling", "norm_after_pooling",
    "causal", "pad_mask",
)  # fmt: skip
"""What changes no name and no shape."""


def changed(recipe: Recipe, part: str, field: str, value: Any) -> Recipe:
    model = recipe.model
    if part == "":
        return replace(recipe, model=replace(model, **{field: value}))
    tower = replace(getattr(model, part), **{field: value})
    return replace(recipe, model=replace(model, **{part: tower}))


CASES = [
    *(("image", name, IMAGE[name]) for name in SHAPELESS if name in IMAGE),
    *(("text", name, TEXT[name]) for name in SHAPELESS if name in TEXT),
    ("", "norm_epsilon", 1e-6),
]


@pytest.mark.parametrize(("part", "field", "value"), CASES)
def test_what_is_no_weight_is_compared_and_the_flag_of_the_run_is_named(
    part: str, field: str, value: Any, tmp_path: Path
) -> None:
    here = recipe_of()
    here = changed(here, "text", "packed", value=False)
    there = changed(here, part, field, value)
    weights = saved(tmp_path, there)
    assert weights.keys() == here.objective.build(here).state_dict().keys()
    with pytest.raises(InputError) as refused:
        started(tmp_path, here)
    assert "\n" not in str(refused.value)
    path = f"{part}.{field}".removeprefix(".")
    assert f"but model.{path} is " in str(refused.value)
    assert f"--model.{path.replace('_', '-').rpartition('.')[0]}" in str(refused.value)
    started(tmp_path, there)


def test_every_field_of_a_tower_is_compared_or_may_differ_for_a_reason() -> None:
    for kind, values in ((ImageTower, IMAGE), (TextTower, TEXT), (DualEncoderConfig, WHOLE)):
        left = {item.name for item in fields(kind)} - values.keys() - MAY_DIFFER.keys()
        assert left <= {"image", "text"}, kind
    assert all(reason.strip() for reason in MAY_DIFFER.values())


def test_the_command_line_takes_every_flag_that_is_advised(tmp_path: Path) -> None:
    here = recipe_of()
    model = replace(here.model, image=replace(here.model.image, **IMAGE),
                    text=replace(here.model.text, **TEXT), **WHOLE)  # fmt: skip
    objective = replace(here.objective, loss="sigmoid")
    there = replace(here, model=model, objective=objective)
    found = differences(there.model, here.model, part="model")
    expected = len(IMAGE) + len(TEXT) + len(WHOLE)
    assert len(found) == expected
    words = [word for item in found for word in shlex.split(item.flag or "")]
    assert {"--model.image.patch-bias", "--model.text.no-causal"} <= set(words)
    recipes = {"demo": lambda: here}
    words = ["demo", *words, "--objective.loss", "sigmoid"]
    _, recipe = read_command_line(recipes, program="train", arguments=words)
    assert recipe.model == there.model
    # and the way back, to what is None and off
    back = differences(here.model, there.model, part="model")
    words = [word for item in back for word in shlex.split(item.flag or "")]
    assert "--model.image.no-patch-bias" in words
    words = ["demo", *words, "--objective.loss", "softmax"]
    recipes = {"demo": lambda: there}
    _, recipe = read_command_line(recipes, program="train", arguments=words)
    assert recipe.model == here.model


def test_names_and_shapes_that_differ_name_the_flags_too(tmp_path: Path) -> None:
    saved(tmp_path, recipe_of(depth=2))
    with pytest.raises(InputError) as refused:
        started(tmp_path, recipe_of(patch_bias=True))
    said = str(refused.value)
    assert "it lacks model.image.patch_embed.bias, it holds model.image.blocks.1.attn" in said
    assert "and 8 more besides" in said
    assert "give --model.image.depth 2 --model.image.no-patch-bias, or give" in said
    assert f"{tmp_path / 'recipe.json'} in the place of the recipe's name" in said


def test_what_may_differ_is_told_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, recipe_of(image_size=32, drop_path=0.5, positions="sincos"))
    with caplog.at_level(logging.INFO):
        started(tmp_path, recipe_of(image_size=48))
    said = caplog.text
    assert "image.drop_path 0.5 there, 0 here (acts in training alone)" in said
    assert "image.image_size 32 there, 48 here (positions are brought" in said
    assert "image.positions sincos there, learned here (a fixed table becomes" in said


def test_another_fixed_table_is_refused_though_no_weight_differs(tmp_path: Path) -> None:
    saved(tmp_path, recipe_of(positions="sincos"))
    with pytest.raises(InputError, match=r"give --model\.image\.positions sincos"):
        started(tmp_path, recipe_of(positions="sincos_bigvision"))


def test_a_copied_checkpoint_is_compared_by_the_recipe_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = recipe_of(heads=4)
    saved(tmp_path / "run", there)
    step = find_checkpoint(tmp_path / "run").folder
    copy = tmp_path / "copy" / step.name
    shutil.copytree(step, copy)
    started(copy, recipe_of())
    assert "only the names and shapes of its weights are compared" in caplog.text
    alter_state(copy, recipe=to_json(there))
    with pytest.raises(InputError, match=r"give --model\.image\.heads 4"):
        started(copy, recipe_of())


# The tokenizer


def with_words(recipe: Recipe, path: Path, *words: str) -> Recipe:
    path.write_text("".join(f"{word}\n" for word in ("[PAD]", "[UNK]", "[CLS]", *words)))
    tokenizer = WordPiece(vocab=path)
    return replace(recipe, data=replace(recipe.data, tokenizer=tokenizer))


def test_weights_are_not_trained_on_with_the_ids_of_another_tokenizer(tmp_path: Path) -> None:
    there = with_words(recipe_of(), tmp_path / "a.txt", "cat", "rare", "odd", "a")
    here = with_words(recipe_of(), tmp_path / "b.txt", "cat", "odd", "rare", "a")
    weights = saved(tmp_path / "run", there)
    there.data.save_tokenizer(tmp_path / "run" / "tokenizer")
    with pytest.raises(
        InputError, match="writes 'rare' as 4 there, which stands for 'odd' here"
    ) as (refused):
        started(tmp_path / "run", here)
    flag = str(refused.value).rpartition("; give ")[2]
    arguments = ["demo", *shlex.split(flag)]
    _, mended = read_command_line({"demo": lambda: here}, program="train", arguments=arguments)
    assert started(tmp_path / "run", mended).state_dict().keys() == weights.keys()
    # the file that the recipe names may have changed since
    with_words(recipe_of(), tmp_path / "a.txt", "cat", "odd", "rare", "a")
    with pytest.raises(InputError, match="writes 'rare' as 4"):
        started(tmp_path / "run", there)
    other = replace(here, data=replace(here.data, tokenizer=ClipBpe()))
    with pytest.raises(InputError, match=r"with no special token there and the special token 49406 "
                       r"here; give .*run/recipe\.json in the place of"):  # fmt: skip
        started(tmp_path / "run", other)


# Numbers that are none


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(odd: float, tmp_path: Path) -> None:
    weights = recipe_of().objective.build(recipe_of()).state_dict()
    weights["model.text.norm.bias"][3] = odd
    save_weights(tmp_path / "checkpoints", weights, step=1)
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(recipe_of())))
    with pytest.raises(InputError, match=r"not finite: .* in model\.text\.norm\.bias; take an"):
        started(tmp_path, recipe_of())


def test_a_logit_scale_beyond_the_bounds_of_a_stage_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = saved(tmp_path, recipe_of())
    shutil.rmtree(tmp_path / "checkpoints")
    weights["model.logit_scale"] = torch.full((1,), 5.0)
    save_weights(tmp_path / "checkpoints", weights, step=1)
    started(tmp_path, recipe_of())
    assert "model.logit_scale is 5 there and is kept between 0 and 4.605 here" in caplog.text


def test_flags_that_are_advised_go_together(tmp_path: Path) -> None:
    here = recipe_of()
    assert here.model.text.packed  # which a tower that sees its padding cannot be
    text = replace(here.model.text, packed=False, causal=False)
    there = replace(here, model=replace(here.model, text=text))
    saved(tmp_path, there)
    with pytest.raises(InputError, match=r"but model\.text\.causal is True; give") as refused:
        started(tmp_path, here)
    flags = str(refused.value).partition("; give ")[2].partition(", or ")[0]
    words = ["demo", *shlex.split(flags)]
    _, mended = read_command_line({"demo": lambda: here}, program="train", arguments=words)
    assert mended.model == there.model


@pytest.mark.parametrize("damage", ["cut", "wrong kind", "unknown type"])
def test_where_recipe_json_is_damaged_that_of_the_checkpoint_says_what_the_model_computes(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of()
    saved(tmp_path, recipe, kept=True)
    file = tmp_path / "recipe.json"
    whole = file.read_text()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "wrong kind": whole.replace('"width": 16', '"width": "16"', 1),
        "unknown type": whole.replace("frugal.common.recipe.Recipe", "frugal.common.recipe.Nope"),
    }
    assert damaged[damage] != whole
    file.write_text(damaged[damage])
    with pytest.raises(InputError, match=r"has image\.heads 2, but model\.image\.heads is 4"):
        started(tmp_path, recipe_of(heads=4))
    assert "no recipe says" not in caplog.text
    started(tmp_path, recipe)
