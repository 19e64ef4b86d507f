"""A stage that starts from another: which tables are kept, computed, resampled or refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_stages import LOG, recipe_of, saved, started

from frugal.cit.objective import LockedContrastive
from frugal.common.checkpoint.init_from import init_from
from frugal.common.contracts import Objective
from frugal.common.data.tokenizers import ClipBpe, WordPiece
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.named import clip_encoder, text_tower
from frugal.common.models.positions import resample_grid, resample_length, sincos_table
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.classification import Classification, ClassificationObjective
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.weights.load import load_model
from frugal.common.weights.save import save_model

TABLE = "model.image.pos_embed"
NEW = ("image.projection.weight", "text.projection.weight", "logit_scale")


def assert_others_kept(objective: torch.nn.Module, weights: dict, *changed: str) -> None:
    state = objective.state_dict()
    others = state.keys() - set(changed)
    assert len(others) >= len(state) - len(changed)
    for name in others:
        assert torch.equal(state[name], weights[name]), name


def test_the_same_architecture_takes_every_weight(tmp_path):
    weights = saved(tmp_path, recipe_of())
    assert_others_kept(started(tmp_path, recipe_of(seed=1), interpolate=False), weights)


def test_learned_tables_are_resampled_between_grids_that_are_not_square(tmp_path):
    weights = saved(tmp_path, recipe_of(image_size=(16, 40)))
    objective = started(tmp_path, recipe_of(seed=1, image_size=(32, 24), length=12))
    state = objective.state_dict()
    expected = resample_grid(weights[TABLE], old_grid=(2, 5), new_grid=(4, 3))
    torch.testing.assert_close(state[TABLE], expected, rtol=0, atol=1e-6)
    expected = resample_length(weights["model.text.pos_embed"], 12)
    torch.testing.assert_close(state["model.text.pos_embed"], expected, rtol=0, atol=1e-6)
    assert_others_kept(objective, weights, TABLE, "model.text.pos_embed")


def test_a_grid_of_as_many_patches_in_another_shape_is_resampled_too(tmp_path):
    weights = saved(tmp_path, recipe_of(image_size=(16, 64)))
    other = recipe_of(seed=1, image_size=32)
    state = started(tmp_path, other).state_dict()
    expected = resample_grid(weights[TABLE], old_grid=(2, 8), new_grid=(4, 4))
    torch.testing.assert_close(state[TABLE], expected, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"2x8 patches, here 4x4 patches.*--run\.interpolate"):
        started(tmp_path, other, interpolate=False)


@pytest.mark.parametrize("flavour", ["sincos", "sincos_bigvision"])
def test_a_fixed_table_becomes_learned_as_the_table_of_the_new_grid(tmp_path, flavour):
    weights = saved(tmp_path, recipe_of(positions=flavour, image_size=(16, 32)))
    assert TABLE not in weights
    objective = started(tmp_path, recipe_of(seed=1, image_size=(48, 24)))
    expected = sincos_table((6, 3), 16, flavour, class_row=True)[None]
    torch.testing.assert_close(objective.state_dict()[TABLE], expected, rtol=0, atol=1e-6)
    assert objective.get_parameter(TABLE).requires_grad
    assert_others_kept(objective, weights, TABLE)


def test_a_fixed_table_becomes_learned_on_its_own_grid_without_permission(tmp_path):
    saved(tmp_path, recipe_of(positions="sincos", image_size=32))
    objective = started(tmp_path, recipe_of(seed=1, image_size=32), interpolate=False)
    expected = sincos_table((4, 4), 16, "sincos", class_row=True)[None]
    torch.testing.assert_close(objective.state_dict()[TABLE], expected, rtol=0, atol=1e-6)


def test_a_fixed_table_that_stays_fixed_is_that_of_the_new_grid(tmp_path):
    saved(tmp_path, recipe_of(positions="sincos", image_size=(16, 32)))
    objective = started(tmp_path, recipe_of(seed=1, positions="sincos", image_size=(48, 24)))
    expected = sincos_table((6, 3), 16, "sincos", class_row=True)[None]
    torch.testing.assert_close(objective.get_buffer(TABLE), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_weights_of_another_grid_are_refused_without_permission(tmp_path, positions):
    saved(tmp_path, recipe_of(positions=positions, image_size=32))
    other = recipe_of(positions=positions, image_size=48)
    with pytest.raises(
        InputError,
        match=r"image\.pos_embed of .* another grid .*4x4 patches, here 6x6 patches.*interpolate",
    ):
        started(tmp_path, other, interpolate=False)


def test_weights_of_another_text_length_are_refused_without_permission(tmp_path):
    saved(tmp_path, recipe_of())
    with pytest.raises(InputError, match=r"text\.pos_embed .* \(8 tokens, here 9 tokens\)"):
        started(tmp_path, recipe_of(length=9), interpolate=False)


def test_without_a_recipe_beside_them_tables_count_as_square(tmp_path):
    weights = saved(tmp_path / "run", recipe_of(image_size=16))
    step = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    shutil.copytree(step, tmp_path / "copy" / step.name)
    state = started(tmp_path / "copy" / step.name, recipe_of(seed=1, image_size=(24, 40)))
    expected = resample_grid(weights[TABLE], old_grid=(2, 2), new_grid=(3, 5))
    torch.testing.assert_close(state.state_dict()[TABLE], expected, rtol=0, atol=1e-6)


def test_a_refused_start_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path, recipe_of(image_size=16))
    recipe = recipe_of(seed=1, image_size=32)
    recipe = replace(recipe, model=replace(recipe.model, embed_dim=12))
    objective = recipe.objective.build(recipe)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    with pytest.raises(InputError, match=r"image\.projection\.weight has the shape \(8, 16\)"):
        init_from(objective, tmp_path, interpolate=True, log=LOG)
    assert all(torch.equal(objective.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"depth": 2}, "it lacks model.image.blocks.1"), ({"width": 32}, "has the shape")],
)
def test_another_architecture_is_refused(tmp_path, changes, message):
    saved(tmp_path, recipe_of())
    recipe = recipe_of()
    recipe = replace(
        recipe, model=replace(recipe.model, image=replace(recipe.model.image, **changes))
    )
    with pytest.raises(InputError, match=message):
        started(tmp_path, recipe)


def test_a_class_token_that_gains_a_position_is_refused(tmp_path):
    saved(tmp_path, recipe_of(class_token="without_position", image_size=16))
    with pytest.raises(InputError, match=r"4 rows there, .* 2x2 patches with a position for the"):
        started(tmp_path, recipe_of(image_size=32))


# ------------------------------------------------------------------------------------------------
# Models of other libraries


def test_a_folder_of_another_library_gives_every_weight_and_so_does_a_loaded_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"width": 64, "depth": 1, "heads": 1, "mlp_width": 32}
    image = replace(clip_encoder("B/16", image_size=32).image, **shape)
    model = DualEncoderConfig(image=image, text=text_tower("B", **shape), embed_dim=8)
    recipe = recipe_of()
    recipe = replace(recipe, model=model, data=replace(recipe.data, tokenizer=ClipBpe()))
    weights = saved(tmp_path / "run", recipe)
    save_model(load_model(tmp_path / "run"), tmp_path / "folder", to="open_clip")
    other = replace(recipe, run=replace(recipe.run, seed=1))
    for source in (tmp_path / "folder", load_model(tmp_path / "run")):
        objective = other.objective.build(other)
        with caplog.at_level("INFO"):
            init_from(objective, source, interpolate=False, log=LOG)
        assert_others_kept(objective, weights)
    assert f"started from {tmp_path / 'folder'}: " in caplog.text
    objective, _ = towers(other, tmp_path / "folder")
    init_from(objective, None, interpolate=False, log=LOG)
    assert_others_kept(objective, weights, *(f"model.{part}" for part in NEW))
    heads = replace(model, image=replace(image, heads=2))
    with pytest.raises(InputError, match=r"give --model\.image\.heads 1$"):
        started(tmp_path / "folder", replace(other, model=heads))


# ------------------------------------------------------------------------------------------------
# Every kind of objective


def whole(recipe: Recipe, source: Path) -> tuple[Objective, Path | None]:
    """Takes everything of the same names."""
    return recipe.objective.build(recipe), source


def classifier(recipe: Recipe, source: Path) -> tuple[Objective, Path | None]:
    """Takes the image tower of another model."""
    config = ClassifierConfig(image=recipe.model.image, num_classes=3)
    model = config.build(torch.Generator().manual_seed(0))
    return ClassificationObjective(model, Classification(), reduction=KeepAll(), seed=0), source


def towers(recipe: Recipe, source: Path) -> tuple[Objective, Path | None]:
    """Takes every tower from where the recipe says."""
    config = LockedContrastive(
        train_image="none", image_weights=str(source), text_weights=str(source)
    )
    recipe = replace(recipe, objective=config)
    return recipe.objective.build(recipe), None


KINDS = (whole, classifier, towers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"image_size": 48},
            "made for .*4x4 patches, here .*6x6.*; add --run.interpolate to",
        ),
        (
            {"activation": "quick_gelu"},
            "has .*activation gelu, but model.image.activation is quick_gelu; "
            "give --model.image.activation gelu",
        ),
        ({"projector_width": 12}, "(lacks|has no) .*projector.*, .*; "),
    ],
    ids=["another grid", "another activation", "a projector that is missing there"],
)
def test_the_same_change_is_refused_in_the_same_words_whatever_is_trained(
    kind, change: dict, sentence: str, tmp_path: Path
) -> None:
    saved(tmp_path, recipe_of(image_size=32))
    objective, source = kind(recipe_of(seed=1, **{"image_size": 32, **change}), tmp_path)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    with pytest.raises(InputError, match=sentence) as refused:
        init_from(objective, source, interpolate=False, log=LOG)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(objective.state_dict()[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", [whole, towers])
def test_other_tokens_are_refused_in_the_same_words_whatever_is_trained(
    kind, tmp_path: Path
) -> None:
    def with_words(*words: str) -> Recipe:
        path = tmp_path / f"{words[0]}.txt"
        path.write_text("".join(f"{word}\n" for word in ("[PAD]", "[UNK]", "[CLS]", *words)))
        recipe = recipe_of(image_size=32)
        return replace(recipe, data=replace(recipe.data, tokenizer=WordPiece(vocab=path)))

    there, here = with_words("cat", "rare", "odd"), with_words("rare", "cat", "odd")
    saved(tmp_path / "run", there)
    there.data.save_tokenizer(tmp_path / "run" / "tokenizer")
    objective, source = kind(here, tmp_path / "run")
    with pytest.raises(InputError) as refused:
        init_from(objective, source, interpolate=False, log=LOG)
    run = tmp_path / "run"
    name = "model" if kind is whole else "text tower"
    assert str(refused.value) == (
        f"the tokenizer that the {name} of {run} was trained with makes [1, 1, 1, 1, 3, 1] of 'a "
        "photo of a cat.' there and [1, 1, 1, 1, 4, 1] here; give --data.tokenizer.vocab "
        f"{run / 'tokenizer'}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_permission_brings_positions_to_another_grid_whatever_is_trained(
    kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = saved(tmp_path, recipe_of(image_size=(16, 32)))
    objective, source = kind(recipe_of(seed=1, image_size=(48, 24)), tmp_path)
    with caplog.at_level("INFO"):
        init_from(objective, source, interpolate=True, log=LOG)
    assert "resampled from 2x4 to 6x3 patches" in caplog.text
    assert objective.state_dict()[TABLE].shape == (1, 19, 16)
    assert objective.state_dict()[TABLE][:, 0].equal(weights[TABLE][:, 0])
