"""Which patches are seen, and how often, against exact probabilities."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from golden_cases import GOLDEN

from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import SampleNoise, uniform_noise
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.milan.semantic_sampling import SemanticSampling, draw_order

DRAWS = 20_000
SAMPLING = json.loads((GOLDEN / "sampling.json").read_text())
KEEP_COUNT = json.loads((GOLDEN / "keep_count.json").read_text())["cases"]


def orders(importance, key=5):
    importance = torch.tensor(importance).expand(DRAWS, -1)
    return draw_order(importance, uniform_noise(key, torch.arange(DRAWS), importance.shape[1]))


def inclusion(order, keep, patches):
    return torch.zeros(len(order), patches).scatter_(1, order[:, :keep], 1).mean(0)


def assert_within_five_standard_errors(frequency, exact):
    for found, p in zip(frequency.tolist(), exact, strict=True):
        assert abs(found - p) <= 5 * math.sqrt(p * (1 - p) / DRAWS) + 1e-6


def test_patches_are_seen_as_often_as_drawing_one_by_one_says():
    order = orders(SAMPLING["importance"])
    seen = inclusion(order, SAMPLING["keep"], SAMPLING["L"])
    assert_within_five_standard_errors(seen, SAMPLING["inclusion_probability_exact"])
    first = inclusion(order, 1, SAMPLING["L"])
    assert_within_five_standard_errors(first, SAMPLING["first_draw_probability_exact"])
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(DRAWS, -1))


def test_the_sum_of_the_importance_does_not_matter():
    small = [value * 1e-3 for value in SAMPLING["importance"]]
    seen = inclusion(orders(small, key=9), SAMPLING["keep"], SAMPLING["L"])
    assert_within_five_standard_errors(seen, SAMPLING["inclusion_probability_exact"])


def test_patches_without_importance_come_last():
    with_zeros = SAMPLING["with_zeros"]
    seen = inclusion(orders(with_zeros["importance"]), SAMPLING["keep"], SAMPLING["L"])
    assert_within_five_standard_errors(seen, with_zeros["inclusion_probability_exact"])
    order = orders(SAMPLING["two_positive_of_16"]["importance"])
    assert torch.equal(order[:, :2].sort(1).values, torch.tensor([3, 9]).expand(DRAWS, -1))
    # a noise of exactly 0 is the shortest wait there is, and still no reason to see nothing
    noise = torch.tensor([[0.0, 0.5, 1 - 2.0**-24]])
    assert draw_order(torch.tensor([[0.0, 1e-38, 1.0]]), noise)[0, -1] == 0


def view_of(images, importance=None, patch=8):
    tower = ImageTower(
        width=8, depth=1, heads=1, mlp_width=8, patch_size=patch, image_size=tuple(images.shape[2:])
    )
    return PatchView.of(images, tower, importance=importance)


def test_what_is_kept_is_a_function_of_the_sample_and_not_of_its_batch():
    images = torch.zeros(6, 3, 16, 40, dtype=torch.uint8)  # 2 x 5 patches
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(6, 10, generator=generator)
    numbers = torch.arange(100, 106)
    sampling = SemanticSampling(mask_ratio=0.7)
    whole = sampling.keep(view_of(images, importance), noise=SampleNoise(4, numbers)).index
    assert whole.shape == (6, 3)
    for part in (slice(0, 2), slice(2, 6)):
        view = view_of(images[part], importance[part])
        kept = sampling.keep(view, noise=SampleNoise(4, numbers[part])).index
        assert torch.equal(kept, whole[part])
    other = sampling.keep(view_of(images, importance), noise=SampleNoise(5, numbers)).index
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("strategy", [SemanticSampling, RandomMasking])
@pytest.mark.parametrize(
    "known", KEEP_COUNT, ids=lambda known: f"{known['L']}-{known['mask_ratio']}"
)
def test_as_many_patches_stay_as_double_precision_truncates_to(known, strategy):
    masking = strategy(mask_ratio=known["mask_ratio"])
    if known["keep"] == 0:
        with pytest.raises(InputError, match="keeps none of 10 patches"):
            masking.num_kept(known["L"])
        return
    assert masking.num_kept(known["L"]) == known["keep"]


def test_a_recipe_that_would_keep_nothing_is_refused():
    tower = ImageTower(width=8, depth=1, heads=1, mlp_width=8, patch_size=8, image_size=16)
    recipe = SimpleNamespace(model=SimpleNamespace(image=tower))
    with pytest.raises(InputError, match=r"mask ratio 0\.9 keeps none of 4 patches"):
        SemanticSampling(mask_ratio=0.9).check_grid(recipe.model.image.grid)
    with pytest.raises(InputError, match=r"must lie in \[0, 1\)"):
        SemanticSampling(mask_ratio=1.0)
