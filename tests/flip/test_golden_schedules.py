"""The recipes' lengths and learning rates against the reference's, and its weight decay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.common.models.clip import DualEncoder
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.recipe import Recipe
from frugal.flip.published_weights import to_flax
from frugal.flip.recipes import CLEAN, PARITY, RECIPES, VIRTUAL_EPOCH

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"
CASES = json.loads((GOLDEN / "lr_schedules.json").read_text())
RECIPE_OF = {
    "cfg_flip_base": "base",
    "cfg_flip_large": "large",
    "cfg_flip_huge14": "huge14",
    "cfg_flip_large_L2B_2x": "large-laion2b",
    "cfg_flip_huge14_L2B_2x": "huge14-laion2b",
    "unmasked_tuning_large_400M": "large-tuning",
}
ARTIFICIAL = "small_batch_with_floor"


def test_every_recorded_configuration_is_compared() -> None:
    assert CASES.keys() == RECIPE_OF.keys() | {ARTIFICIAL}


@pytest.mark.parametrize("case", RECIPE_OF)
def test_recipes_have_the_reference_s_steps_and_learning_rates(case: str) -> None:
    expected, recipe = CASES[case], RECIPES[RECIPE_OF[case]]()
    assert recipe.batch_size == expected["batch_size"]
    assert recipe.optimizer.learning_rate_per_256 == expected["base_lr_per_256"]
    assert recipe.steps == expected["total_steps"]
    assert recipe.schedule.samples == expected["total_steps"] * recipe.batch_size
    assert recipe.schedule.warmup_samples == expected["warmup_steps"] * recipe.batch_size
    peak = recipe.optimizer.peak(recipe.batch_size)
    assert peak == pytest.approx(expected["peak_lr"], rel=1e-6)
    for step, rate in expected["values"]:
        ours = recipe.schedule.learning_rate(step * recipe.batch_size, peak=peak)
        assert ours == pytest.approx(rate, abs=1e-6 * peak), step


def test_whole_steps_are_counted_at_any_batch_size() -> None:
    expected = CASES[ARTIFICIAL]
    batch = expected["batch_size"]
    samples = PARITY.samples(int(expected["num_epochs"]), batch_size=batch)
    warmup = PARITY.samples(int(expected["warmup_epochs"]), batch_size=batch)
    assert samples == expected["total_steps"] * batch
    assert warmup == expected["warmup_steps"] * batch
    # the README of the numbers states the ends of this artificial configuration
    schedule = WarmupCosine(samples=samples, warmup_samples=warmup, start=1e-7, floor=1e-6)
    for step, rate in expected["values"]:
        ours = schedule.learning_rate(step * batch, peak=expected["peak_lr"])
        assert ours == pytest.approx(rate, abs=1e-6 * expected["peak_lr"]), step


@pytest.mark.parametrize(
    ("name", "nominal", "whole"),
    # what the paper names, and what its code came to
    [
        ("base", 12.8e9, 12.45e9),
        ("large", 12.8e9, 12.45e9),
        ("huge14", 12.8e9, 12.45e9),
        ("large-laion2b", 25.6e9, 24.9e9),
        ("huge14-laion2b", 25.6e9, 24.9e9),
        ("large-tuning", 128e6, 124.5e6),
    ],
)
def test_both_ways_of_counting_samples(name: str, nominal: float, whole: float) -> None:
    clean = f"{name.removesuffix('-tuning')}-clean{'-tuning' if name.endswith('-tuning') else ''}"
    exact, cut = RECIPES[clean]().schedule, RECIPES[name]().schedule
    assert exact.samples == pytest.approx(nominal, rel=2e-3)
    assert cut.samples == pytest.approx(whole, rel=1e-3)
    for one, other in (
        (exact.samples, cut.samples),
        (exact.warmup_samples, cut.warmup_samples),
    ):
        assert one * 19 * 65_536 == other * VIRTUAL_EPOCH


def on_meta(recipe: Recipe) -> DualEncoder:
    with torch.device("meta"):
        return DualEncoder(recipe.model)


def narrow(recipe: Recipe) -> Recipe:
    """The same parameters by name, small enough to hold values."""
    small = {"width": 8, "heads": 2, "mlp_width": 8}
    model = replace(
        recipe.model,
        image=replace(recipe.model.image, **small, patch_size=2, image_size=4),
        text=replace(recipe.model.text, **small, vocabulary=4, length=2),
        embed_dim=4,
    )
    return replace(recipe, model=model)


def decayed_leaves(recipe: Recipe) -> dict[str, bool]:
    recipe = narrow(recipe)
    model = on_meta(recipe)
    decayed = recipe.optimizer.decayed_names(model)
    state = {
        name: torch.full(weight.shape, float(name in decayed))
        for name, weight in model.named_parameters()
    }
    # the fixed table is none of our parameters and so never decayed
    table = "img_encoder/posembed_encoder/pos_embedding"
    flax = to_flax(state, recipe.model)
    return {name: name != table and bool(value.all()) for name, value in flax.items()}


def test_weight_decay_spares_what_the_reference_spares() -> None:
    tree = json.loads((GOLDEN / "param_tree_base.json").read_text())["params"]
    assert decayed_leaves(RECIPES["base"]()) == {
        name: leaf["weight_decay"] for name, leaf in tree.items()
    }


@pytest.mark.parametrize(
    ("name", "spared", "count", "image", "text", "total"),
    # leaves and millions of parameters, image table included, as published with the code
    [
        ("base", 247, 397, 85.80, 53.47, 139.93),
        ("large", 367, 589, 303.30, 108.52, 413.20),
        ("huge14", 567, 909, 630.76, 333.60, 966.72),
    ],
)
def test_models_have_the_published_sizes(
    name: str, spared: int, count: int, image: float, text: float, total: float
) -> None:
    recipe = RECIPES[name]()
    found = to_flax(dict(on_meta(recipe).named_parameters()), recipe.model)
    flags = decayed_leaves(recipe)
    assert (len(flags), list(flags.values()).count(False)) == (count, spared)

    def millions(prefix: str) -> float:
        return sum(v.numel() for n, v in found.items() if n.startswith(prefix)) / 1e6

    assert millions("img_encoder/") == pytest.approx(image, abs=0.005)
    assert millions("txt_encoder/") == pytest.approx(text, abs=0.005)
    assert millions("") == pytest.approx(total, abs=0.005)


@pytest.mark.parametrize("name", ["base", "large", "huge14"])
def test_the_clean_preset_spares_the_class_token_and_the_scale_besides(name: str) -> None:
    parity, clean = RECIPES[name](), RECIPES[f"{name}-clean"]()
    model = on_meta(narrow(parity))
    before, after = (r.optimizer.decayed_names(model) for r in (parity, clean))
    assert before - after == {"image.cls_token", "logit_scale"}
    assert not after - before
    assert PARITY.clamp == parity.objective.clamp != clean.objective.clamp == CLEAN.clamp
