"""RandAugment in the loader: timm's, from the sample's own generator."""

import io
import random

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from frugal.common.data.transforms import RandomResizedCrop
from frugal.common.errors import InputError
from frugal.common.transfer.augmentation import RandAugmentedCrop

SIZE = (20, 28)


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def decode(seed: int, **options: object) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return RandAugmentedCrop(**options).decode(picture(), size=SIZE, generator=generator)


def test_a_picture_is_a_function_of_its_generator() -> None:
    random.seed(0)
    np.random.seed(0)
    first = [decode(seed) for seed in range(20)]
    random.seed(1)
    np.random.seed(1)
    again = [decode(seed) for seed in range(20)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert first[0].shape == (3, *SIZE) and first[0].dtype == np.uint8
    assert len({pixels.tobytes() for pixels in first}) == 20


def test_the_global_generators_are_left_where_they_were() -> None:
    random.seed(4)
    np.random.seed(4)
    undisturbed = random.random(), np.random.random()
    random.seed(4)
    np.random.seed(4)
    decode(0)
    assert (random.random(), np.random.random()) == undisturbed


def test_after_the_crop_it_is_timms_own_policy() -> None:
    policy, fill = "rand-m9-mstd0.5-inc1", (124, 116, 104)
    theirs = rand_augment_transform(
        policy,
        {"translate_const": 9, "img_mean": fill, "interpolation": Image.Resampling.BICUBIC},
    )
    crop = RandomResizedCrop(scale=(0.08, 1.0), fallback="clamp")
    changed = 0
    for seed in range(30):
        generator = np.random.default_rng(seed)
        cropped = crop.decode(picture(), size=SIZE, generator=generator)
        random.seed(int(generator.integers(2**63)))
        np.random.seed(int(generator.integers(2**32)))
        image = Image.fromarray(np.ascontiguousarray(cropped.transpose(1, 2, 0)))
        wanted = np.asarray(theirs(image)).transpose(2, 0, 1)
        assert (decode(seed) == wanted).all()
        changed += (wanted != cropped).any()
    assert 15 < changed < 30  # two operations, each half of the time


def test_every_operation_works_at_full_strength() -> None:
    for seed in range(10):
        decode(seed, policy="rand-m10-n15-p1-inc1")


@pytest.mark.parametrize("policy", ["m9", "rand-m9.5", "rand-x3", "augmix-m3", "", "rand-t4"])
def test_a_policy_that_timm_does_not_know_is_refused(policy: str) -> None:
    with pytest.raises(InputError, match=r"data\.augmentation\.policy"):
        RandAugmentedCrop(policy=policy)


def test_a_fill_that_is_no_color_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.augmentation\.fill"):
        RandAugmentedCrop(fill=(300, 0, 0))
