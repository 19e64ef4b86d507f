"""CLIPA's recipes: the published numbers, and that a stage follows from the one before."""

import json
import math
from dataclasses import replace

import pytest
import torch

from frugal.clipa.recipes import RECIPES, demo, demo_tuning, released
from frugal.clipa.syntax_masking import SyntaxMasking
from frugal.common.cli import read_command_line
from frugal.common.data.color import NO_CHANGE, ColorJitter
from frugal.common.models.clip import DualEncoder
from frugal.common.models.vit import CLIP_MEAN, IMAGENET_MEAN
from frugal.common.randomness import SampleNoise
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.text import Truncate
from support import run_code

pytestmark = pytest.mark.slow

PUBLISHED = {
    # image size, patches seen, text tokens, batch, peak, samples, warm-up steps, syntax masking
    "vit-b16-i50-t16": (112, 49, 16, 65_536, 2.048e-3, 6 * 407_332_084, 782, False),
    "vit-b16-i50-t16-tuning-224": (224, 196, 16, 8_192, 2.56e-5, 131_072_000, 3_072, False),
    "vit-l16-i17-t16": (64, 16, 16, 32_768, 1.024e-3, 6 * 407_332_084, 1_563, True),
    "vit-l16-i17-t16-tuning-224": (224, 196, 16, 7_168, 2.24e-5, 131_072_000, 3_571, False),
    "vit-l16-i37-t8": (96, 36, 8, 32_768, 1.024e-3, 6 * 407_332_084, 1_563, True),
    "vit-l16-i37-t8-tuning-224": (224, 196, 32, 7_168, 2.24e-5, 131_072_000, 3_571, False),
    "vit-l14-i36-t8": (84, 36, 8, 65_536, 2.048e-3, 195_490 * 65_536, 800, True),
    "vit-l14-i36-t8-tuning-224": (224, 179, 32, 32_768, 5.12e-5, 16_000 * 32_768, 800, False),
    "vit-l14-i36-t8-tuning-336": (336, 345, 32, 16_384, 6.4e-6, 8_000 * 16_384, 1_600, False),
    "vit-h14-i36-t8": (84, 36, 8, 65_536, 2.048e-3, 195_490 * 65_536, 3_200, True),
    "vit-h14-i25-t8": (70, 25, 8, 65_536, 2.048e-3, 195_490 * 65_536, 3_200, True),
    "vit-h14-i25-t8-tuning-224": (224, 179, 32, 32_768, 5.12e-5, 16_000 * 32_768, 800, False),
    "vit-h14-i36-t8-tuning-224": (224, 179, 32, 32_768, 5.12e-5, 16_000 * 32_768, 800, False),
    "vit-h14-i36-t8-plain-tuning-224": (
        224, 256, 32, 16_384, 5.12e-5, 8_000 * 16_384, 1_600, False
    ),
    "vit-h14-i36-t8-tuning-336": (336, 345, 32, 16_384, 6.4e-6, 8_000 * 16_384, 1_600, False),
    "vit-bigg14-i36-t8": (84, 36, 8, 65_536, 1.024e-3, 195_490 * 65_536, 3_200, True),
    "vit-bigg14-i36-t8-tuning-224": (224, 153, 32, 16_384, 2.56e-5, 32_000 * 16_384, 0, False),
    "vit-bigg14-i36-t8-tuning-336": (336, 345, 32, 16_384, 6.4e-6, 8_000 * 16_384, 1_600, False),
}  # fmt: skip
TUNINGS = [name for name in RECIPES if "-tuning" in name]


def source_of(name: str) -> str:
    """The recipe whose run a fine-tuning starts from."""
    if name.endswith("-tuning-336"):
        return name.replace("-tuning-336", "-tuning-224")
    return name.partition("-plain")[0].partition("-tuning")[0]


def patches_seen(recipe) -> int:
    image = recipe.model.image
    view = PatchView(torch.zeros(2, 3, *image.height_width, dtype=torch.uint8), image.patch_size)
    kept = recipe.reduction.image.keep(view, noise=SampleNoise(0, torch.arange(2)))
    return view.num_patches if kept is None else kept.index.shape[1]


def test_every_published_recipe_is_checked():
    assert PUBLISHED.keys() == RECIPES.keys() - {"demo", "demo-tuning"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name):
    size, patches, tokens, batch, peak, samples, warmup, syntax = PUBLISHED[name]
    recipe = RECIPES[name]()
    assert recipe.model.image.image_size == size
    assert patches_seen(recipe) == patches
    assert recipe.model.text.length == tokens
    assert recipe.batch_size == batch
    assert recipe.optimizer.peak(batch) == pytest.approx(peak)
    assert recipe.schedule.samples == samples
    assert recipe.schedule.warmup_samples == warmup * batch
    assert recipe.reduction.text == (SyntaxMasking() if syntax else Truncate())
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.optimizer.weight_decay == 0.2
    assert recipe.engine.checkpoint_activations


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_versions_have_their_own_towers_and_preprocessing(name):
    recipe = RECIPES[name]()
    image, text = recipe.model.image, recipe.model.text
    if "-l16-" in name or "-b16-" in name:
        assert image.pre_norm and text.causal and text.pooling == "end_of_text"
        assert image.mean == CLIP_MEAN and image.activation == "gelu"
        assert image.pooling == ("class" if "-b16-" in name else "mean_all")
        assert image.positions == ("learned" if "tuning" in name else "sincos")
        assert recipe.optimizer.epsilon == 1e-6
        assert recipe.data.augmentation.interpolation == "bicubic"
    else:
        assert not image.pre_norm and not text.causal and text.pooling == "last"
        assert image.mean == IMAGENET_MEAN and image.activation == text.activation == "gelu_tanh"
        assert (image.pooling, image.norm_after_pooling) == ("mean", True)
        assert image.positions == "sincos_bigvision"
        assert recipe.optimizer.epsilon == 1e-8
        assert recipe.data.augmentation.interpolation == "bilinear"
        assert recipe.data.tokenizer.class_token
    assert recipe.data.augmentation.scale == (0.4, 1.0)
    assert recipe.data.augmentation.flip == 0.0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_from_json_and_from_the_command_line(name):
    recipe = RECIPES[name]()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    words = [name, "--run.seed=3", "--model.image.image-size=224", "--run.interpolate"]
    assert read_command_line(RECIPES, program="test", arguments=words)[1].run.seed == 3


@pytest.mark.parametrize("name", TUNINGS)
def test_a_fine_tuning_has_the_weights_of_the_stage_before_and_other_tables(name):
    stages = []
    for stage in (source_of(name), name):
        with torch.device("meta"):
            stages.append(DualEncoder(RECIPES[stage]().model).state_dict())
    shapes = [
        {key: value.shape for key, value in stage.items() if not key.endswith("pos_embed")}
        for stage in stages
    ]
    assert shapes[0] == shapes[1]
    before, after = RECIPES[source_of(name)]().model, RECIPES[name]().model
    assert math.prod(after.image.grid) > math.prod(before.image.grid)
    assert after.text.length >= before.text.length
    assert RECIPES[name]().run.interpolate


def test_weight_decay_acts_on_what_the_references_decayed():

    for name, spared in (
        ("vit-l16-i17-t16-tuning-224", {"image.cls_token"}),
        ("vit-l14-i36-t8", {"image.cls_token", "text.pos_embed", "text.token_embedding.weight"}),
    ):
        recipe = RECIPES[name]()
        with torch.device("meta"):
            model = DualEncoder(recipe.model)
        matrices = {key for key, value in model.named_parameters() if value.ndim >= 2}
        assert recipe.optimizer.decayed_names(model) == matrices - spared


@pytest.mark.parametrize("name", PUBLISHED)
def test_colors_change_where_the_published_run_was_not_crop_only(name):
    crop_only = {
        "vit-b16-i50-t16", "vit-b16-i50-t16-tuning-224", "vit-l14-i36-t8",
        "vit-h14-i36-t8-plain-tuning-224",
    }  # fmt: skip
    expected = NO_CHANGE if name in crop_only else ColorJitter()
    assert RECIPES[name]().data.color == expected


def test_the_demo_sees_a_quarter_of_the_patches_of_its_tuning():
    assert demo().model.image.num_patches * 4 == demo_tuning().model.image.num_patches


def test_released_weights_get_the_recipe_of_their_version():
    first, second = (RECIPES[name]() for name in ("vit-l16-i37-t8", "vit-h14-i36-t8"))
    assert released(first.model).data.tokenizer == first.data.tokenizer
    assert released(second.model).data.tokenizer == second.data.tokenizer
    assert released(second.model).model == second.model
    resized = replace(second.model, image=replace(second.model.image, image_size=140))
    assert released(resized).reduction.text == Truncate()


def test_building_recipes_needs_neither_transformers_nor_nltk():
    check = (
        "import sys, frugal.clipa.recipes as m; [make() for make in m.RECIPES.values()];"
        "heavy = {'transformers', 'nltk', 'open_clip'};"
        "sys.exit(' '.join(heavy & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
