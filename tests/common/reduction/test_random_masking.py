"""Uniform random masking."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from frugal.common.errors import InputError
from frugal.common.models.named import image_tower
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking

GOLDEN = Path(__file__).parents[2] / "golden" / "flip" / "constants.json"


def view(rows: int, columns: int, count: int) -> PatchView:
    return PatchView(torch.zeros(count, 3, 2 * rows, 2 * columns, dtype=torch.uint8), 2)


def test_the_number_kept_is_that_of_the_reference():
    table = json.loads(GOLDEN.read_text())
    cases = 0
    for patches, row in zip(table["num_patches"], table["kept"], strict=True):
        for ratio, expected in zip(table["ratios"], row, strict=True):
            if expected == 0:
                with pytest.raises(InputError, match=f"mask ratio {ratio} keeps none of {patches}"):
                    RandomMasking(mask_ratio=ratio).num_kept(patches)
            else:
                assert RandomMasking(mask_ratio=ratio).num_kept(patches) == expected
            cases += 1
    assert cases == 110


def test_patches_with_the_smallest_noise_stay_smallest_first():
    noise = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    kept = RandomMasking(mask_ratio=0.6).keep(
        view(3, 4, 5), noise=RecordedNoise({"image mask": noise})
    )
    for row in range(5):
        expected = sorted(range(12), key=lambda patch: noise[row, patch].item())[:4]
        assert kept.index[row].tolist() == expected


def test_equal_noise_is_kept_in_the_order_of_the_patches():
    noise = torch.tensor([[0.5, 0.1, 0.5, 0.1, 0.5, 0.1, 0.5, 0.1]])
    kept = RandomMasking(mask_ratio=0.25).keep(
        view(2, 4, 1), noise=RecordedNoise({"image mask": noise})
    )
    assert kept.index.tolist() == [[1, 3, 5, 7, 0, 2]]


def test_the_mask_of_a_sample_does_not_depend_on_its_batch():
    masking = RandomMasking(mask_ratio=0.5)
    whole = masking.keep(view(4, 6, 6), noise=SampleNoise(3, torch.arange(100, 106)))
    part = masking.keep(view(4, 6, 2), noise=SampleNoise(3, torch.tensor([104, 101])))
    assert torch.equal(part.index, whole.index[[4, 1]])


def test_every_patch_is_equally_likely_to_stay():
    count = 4000
    kept = RandomMasking(mask_ratio=0.75).keep(
        view(2, 6, count), noise=SampleNoise(0, torch.arange(count))
    )
    share = kept.mask(12).double().mean(0)
    assert torch.all((share - 0.25).abs() < 5 * (0.25 * 0.75 / count) ** 0.5)
    assert torch.all(kept.mask(12).sum(1) == 3)


def test_a_ratio_of_zero_keeps_everything():
    noise = SampleNoise(0, torch.arange(2))
    assert RandomMasking(mask_ratio=0.0).keep(view(2, 2, 2), noise=noise) is None


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(InputError, match=r"must lie in \[0, 1\)"):
        RandomMasking(mask_ratio=ratio)


def test_a_recipe_whose_images_would_keep_nothing_is_refused():
    recipe = SimpleNamespace(model=SimpleNamespace(image=image_tower("Ti/16", image_size=32)))
    RandomMasking(mask_ratio=0.7).check_grid(recipe.model.image.grid)
    with pytest.raises(InputError, match=r"mask ratio 0.8 keeps none of 4 patches"):
        RandomMasking(mask_ratio=0.8).check_grid(recipe.model.image.grid)
