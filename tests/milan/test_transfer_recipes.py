"""Fine-tuning and probing recipes against the published settings."""

import json

import pytest

from frugal.common.cli import read_command_line
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD
from frugal.common.old_names import TYPES
from frugal.common.optim.optimizers import LARS, AdamW
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import from_json, to_json
from frugal.common.transfer.augmentation import RandAugmentedCrop, SingleDrawCrop
from frugal.milan.recipes import demo
from frugal.milan.segmentation_recipes import SEGMENTATION
from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING
from support import run_code

ALL = [*FINE_TUNING.values(), *LINEAR_PROBING.values()]


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_every_recipe_comes_back_from_json(make: object) -> None:
    recipe = make()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


@pytest.mark.parametrize("make", [*ALL, *SEGMENTATION.values()], ids=lambda make: make.__name__)
def test_a_recipe_with_the_names_of_earlier_versions_is_the_same(make: object) -> None:
    before = {new: old for old, new in TYPES.items() if old.startswith("frugal.milan.")}
    saved = json.dumps(to_json(make()))
    for new, old in before.items():
        saved = saved.replace(f'"{new}"', f'"{old}"')
    assert "frugal.common.transfer" not in saved
    assert from_json(json.loads(saved)) == make()


# name: epochs, learning rate, layer decay, drop path, micro-batches per step
FINE_TUNED = {
    "vit-b16": (100, 4e-4, 0.65, 0.1, 1),
    "vit-l16": (100, 4e-4, 0.75, 0.2, 2),
    "mae-b16": (100, 2e-3, 0.65, 0.1, 1),
    "mae-l16": (50, 4e-3, 0.75, 0.2, 1),
    "mae-h14": (50, 4e-3, 0.75, 0.3, 1),
}


@pytest.mark.parametrize("name", FINE_TUNED)
def test_fine_tuning_has_the_published_settings(name: str) -> None:
    epochs, rate, decay, drop_path, accumulate = FINE_TUNED[name]
    recipe = FINE_TUNING[name]()
    assert recipe.steps == epochs * 1251
    assert recipe.schedule.warmup_samples == 5 * 1251 * 1024
    assert recipe.schedule.floor == 1e-6
    assert recipe.batch_size == 1024 and recipe.engine.accumulate == accumulate
    optimizer = recipe.optimizer
    assert isinstance(optimizer, AdamW)
    assert optimizer.peak(1024) == pytest.approx(rate)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.999), 0.05)
    assert (optimizer.layer_decay, optimizer.clip_norm) == (decay, None)
    tower = recipe.model.image
    assert tower.drop_path == drop_path
    assert (tower.pooling, tower.norm_after_pooling, tower.positions) == ("mean", True, "learned")
    assert recipe.model.head_init_std == 0.02 and recipe.model.num_classes == 1000
    objective = recipe.objective
    assert objective.smoothing == 0.1
    mixing = objective.mixing
    assert (mixing.mixup, mixing.cutmix, mixing.cutmix_probability) == (0.8, 1.0, 0.5)
    assert mixing.together == recipe.local_batch(8)
    assert objective.erasing.probability == 0.25
    augmentation = recipe.data.augmentation
    assert isinstance(augmentation, RandAugmentedCrop)
    assert augmentation.policy == "rand-m9-mstd0.5-inc1"
    assert augmentation.crop.scale == (0.08, 1.0)
    assert measured_each_epoch(recipe) == 1251
    assert recipe.evaluation[0].crop.share == 0.875
    assert recipe.engine.ema_decay is None


# name: epochs, learning rate
PROBED = {
    "vit-b16": (100, 3.2),
    "vit-l16": (100, 1.28),
    "mae-b16": (90, 6.4),
    "mae-l16": (50, 6.4),
    "mae-h14": (50, 6.4),
}


@pytest.mark.parametrize("name", PROBED)
def test_probing_has_the_published_settings(name: str) -> None:
    epochs, rate = PROBED[name]
    recipe = LINEAR_PROBING[name]()
    assert recipe.batch_size == 16_384 and recipe.steps == epochs * 78
    assert recipe.schedule.warmup_samples == 10 * 78 * 16_384
    optimizer = recipe.optimizer
    assert isinstance(optimizer, LARS)
    assert optimizer.peak(recipe.batch_size) == pytest.approx(rate)
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.trust) == (0.9, 0.0, 0.001)
    assert recipe.model.head_init_std == 0.01
    tower = recipe.model.image
    assert (tower.pooling, tower.norm_after_pooling, tower.drop_path) == ("class", False, 0.0)
    assert isinstance(recipe.data.augmentation, SingleDrawCrop)
    assert measured_each_epoch(recipe) == 78


def measured_each_epoch(recipe: Recipe) -> int:
    """Steps of an epoch; the best checkpoint of all epochs stays."""
    assert recipe.run.best == "accuracy_top1"
    assert recipe.run.save_every == recipe.run.evaluate_every
    return recipe.run.evaluate_every


def test_every_size_can_be_fine_tuned_and_probed() -> None:
    for recipes in (FINE_TUNING, LINEAR_PROBING):
        widths = {
            recipes[f"vit-{size}"]().model.image.width for size in ("s16", "b16", "l16", "h14")
        }
        assert widths == {384, 768, 1024, 1280}


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "rate", "decay"),
    [("clip-b16", 50, 10, 6e-4, 0.6), ("clip-l14", 30, 5, 4e-4, 0.65)],
)
def test_the_plain_clip_tower_is_tuned_as_published(
    name: str, epochs: int, warmup: int, rate: float, decay: float
) -> None:
    recipe = FINE_TUNING[name]()
    tower = recipe.model.image
    assert (tower.mean, tower.std) == (CLIP_MEAN, CLIP_STD)
    assert (tower.activation, tower.pre_norm, tower.patch_bias) == ("quick_gelu", True, False)
    assert tower.pooling == "class" and tower.drop_path == 0
    assert recipe.batch_size == 2048 and recipe.steps == epochs * 625
    assert recipe.schedule.warmup_samples == warmup * 625 * 2048
    assert recipe.optimizer.peak(2048) == rate and recipe.optimizer.layer_decay == decay
    assert recipe.objective.mixing.is_off
    assert recipe.engine.ema_decay == 0.9998


def test_the_demos_fit_the_encoder_that_the_pretraining_demo_makes() -> None:
    pretrained = demo().model.image
    for recipe in (FINE_TUNING["demo"](), LINEAR_PROBING["demo"]()):
        for name in ("width", "depth", "heads", "mlp_width", "patch_size", "image_size"):
            assert getattr(recipe.model.image, name) == getattr(pretrained, name)


def test_flags_override_any_field() -> None:
    words = [
        "vit-b16", "--optimizer.layer-decay=0.7", "--objective.mixing.mixup=0.2",
        "--data.augmentation.policy=rand-m5", "--data.augmentation.crop.scale", "0.2", "1",
        "--evaluation.0.data=val", "--model.num-classes=10", "--run.best=None",
    ]  # fmt: skip
    recipe = read_command_line(FINE_TUNING, program="test", arguments=words)[1]
    assert recipe.optimizer.layer_decay == 0.7
    assert recipe.objective.mixing.mixup == 0.2
    assert recipe.data.augmentation.policy == "rand-m5"
    assert recipe.data.augmentation.crop.scale == (0.2, 1.0)
    words = ["vit-b16", "--optimizer.trust=0.01", "--objective.statistics=each_process"]
    recipe = read_command_line(LINEAR_PROBING, program="test", arguments=words)[1]
    assert recipe.optimizer.trust == 0.01


def test_building_the_recipes_needs_nothing_slower_than_torch() -> None:
    check = (
        "import sys; from frugal.milan.transfer_recipes import FINE_TUNING, LINEAR_PROBING\n"
        "[make() for make in [*FINE_TUNING.values(), *LINEAR_PROBING.values()]]\n"
        "sys.exit(' '.join({'timm', 'transformers'} & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr
