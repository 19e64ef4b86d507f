"""FLIP's whole train step against the reference: masking, loss, AdamW, warm-up and cosine."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frugal.common.contracts import Batch
from frugal.common.models.named import flip_encoder
from frugal.common.objectives.contrastive import ContrastiveObjective
from frugal.common.optim.optimizers import AdamW
from frugal.common.optim.schedules import WarmupCosine
from frugal.common.randomness import RecordedNoise
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.flip.published_weights import from_flax, to_flax
from frugal.flip.recipes import base

GOLDEN = Path(__file__).parents[1] / "golden" / "flip"


class Replayed(ImageReduction):
    """Random masking with the noise of one recorded step."""

    def __init__(self, masking: RandomMasking) -> None:
        self.masking = masking
        self.noise = torch.empty(0)

    def keep(self, view: PatchView, *, noise: object) -> KeptPatches | None:
        return self.masking.keep(view, noise=RecordedNoise({"image mask": self.noise}))


@pytest.mark.slow
def test_the_reference_run_is_repeated_step_by_step() -> None:
    numbers = load_file(GOLDEN / "trajectory.safetensors")
    case = json.loads((GOLDEN / "trajectory.json").read_text())
    image, text, batch = case["image"], case["text"], case["batch"]
    model_config = flip_encoder("B/16")
    model_config = replace(
        model_config,
        embed_dim=case["proj_dim"],
        image=replace(
            model_config.image, image_size=image["size"], patch_size=image["patch"],
            width=image["width"], heads=image["heads"], depth=image["depth"],
            mlp_width=4 * image["width"],
        ),
        text=replace(
            model_config.text, width=text["width"], heads=text["heads"], depth=text["depth"],
            mlp_width=4 * text["width"], vocabulary=text["vocab"], length=text["max_len"],
        ),
    )  # fmt: skip
    start = {n.removeprefix("params/"): t for n, t in numbers.items() if n.startswith("params/")}
    final = {n.removeprefix("final/"): t for n, t in numbers.items() if n.startswith("final/")}
    model = model_config.build()
    model.load_state_dict(from_flax(start, model_config))
    masking = Replayed(RandomMasking(mask_ratio=case["mask_ratio"]))
    published = base()
    objective = ContrastiveObjective(model, published.objective, reduction=masking, seed=0)
    options = AdamW(
        learning_rate=case["peak_lr"],
        betas=(case["b1"], case["b2"]),
        epsilon=case["eps"],
        weight_decay=case["weight_decay"],
        no_decay=published.optimizer.no_decay,
    )
    optimizer = options.build(objective)
    schedule = WarmupCosine(
        samples=case["total_steps"] * batch, warmup_samples=int(case["warmup_steps"]) * batch
    )
    for step in range(case["steps"]):
        masking.noise = numbers["noise"][step]
        samples = Batch(
            images=numbers["image_nhwc"][step].permute(0, 3, 1, 2),
            token_ids=numbers["token_ids"][step].long(),
            sample_numbers=torch.arange(batch),
            valid=torch.ones(batch, dtype=torch.bool),
        )
        loss, metrics = objective(samples)
        assert loss.item() == pytest.approx(case["loss"][step], abs=1e-4)
        assert 1 / metrics["logit_scale"].item() == pytest.approx(case["tau"][step], rel=1e-4)
        rate = schedule.learning_rate(step * batch, peak=options.peak(batch))
        assert rate == pytest.approx(case["lr"][step], abs=1e-6 * case["peak_lr"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = to_flax(model.state_dict(), model_config)
    assert found.keys() == final.keys()
    for name, expected in final.items():
        if not name.endswith("key/bias"):  # its true gradient is zero: the reference adds noise
            torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=0, msg=name)


def test_the_published_recipes_have_the_published_lengths() -> None:
    from frugal.flip.recipes import RECIPES

    cases = json.loads((GOLDEN / "lr_schedules.json").read_text())
    for name, case in (
        ("vit-b16-laion400m", "cfg_flip_base"),
        ("vit-l16-laion400m", "cfg_flip_large"),
        ("vit-h14-laion400m", "cfg_flip_huge14"),
        ("vit-l16-laion400m-tuning", "unmasked_tuning_large_400M"),
    ):
        recipe, expected = RECIPES[name](), cases[case]
        assert recipe.steps == expected["total_steps"]
        assert recipe.batch_size == expected["batch_size"]
        assert recipe.schedule.warmup_samples == expected["warmup_steps"] * recipe.batch_size
        assert math.isclose(recipe.optimizer.peak(recipe.batch_size), expected["peak_lr"])
