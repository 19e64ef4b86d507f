"""Erasing and mixing on the device against timm, and as functions of the sample alone."""

import random

import numpy as np
import pytest
import timm.data.mixup as timm_mixup
import torch
from timm.data.random_erasing import RandomErasing as TimmErasing

from frugal.common.contracts import Batch
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import KeepAll
from frugal.common.transfer.classification import (
    Classification,
    ClassificationObjective,
    smoothed_cross_entropy,
)
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.transfer.mixing import Boxes, Mixing, RandomErasing, beta, gamma, mix, normal

HEIGHT, WIDTH = 24, 36


def noise(count: int, seed: int = 0) -> SampleNoise:
    return SampleNoise(seed, torch.arange(count))


def assert_same_distribution(left: np.ndarray, right: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov; the bound is passed by chance once in a million times."""
    both = np.sort(np.concatenate([left, right]))
    shares = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (left, right)]
    bound = 2.7 * np.sqrt(1 / len(left) + 1 / len(right))
    assert np.abs(shares[0] - shares[1]).max() < bound


@pytest.mark.parametrize("shape", [0.3, 0.8, 1.0, 5.0])
def test_gamma_and_beta_numbers_have_their_distributions(shape: float) -> None:
    count, generator = 20_000, np.random.default_rng(0)
    found = gamma(noise(count), "test", shape).numpy()
    assert_same_distribution(found, generator.gamma(shape, size=count))
    found = beta(noise(count), "test", shape).numpy()
    assert_same_distribution(found, generator.beta(shape, shape, size=count))


@pytest.mark.parametrize("count", [6, 7])
def test_normal_numbers_are_normal_and_finite(count: int) -> None:
    found = normal(noise(5_000), "test", count)
    assert found.shape == (5_000, count)
    wanted = np.random.default_rng(0).normal(size=30_000)
    assert_same_distribution(found.flatten().numpy(), wanted)
    assert abs(np.corrcoef(found.T)[0, 1:]).max() < 0.06


def timm_erased(count: int) -> np.ndarray:
    """What timm erases of some images: (count, 3) rows of top, left and area; area 0 for none."""
    random.seed(1)
    erase = TimmErasing(probability=0.25, mode="const", device="cpu")
    rows = []
    for _ in range(count):
        erased = erase(torch.ones(3, HEIGHT, WIDTH))[0] == 0
        places = erased.nonzero()
        rows.append([*places[0].tolist(), len(places)] if len(places) else [0, 0, 0])
    return np.array(rows)


def test_erased_boxes_are_distributed_as_timms() -> None:
    count = 8_000
    boxes = RandomErasing(probability=0.25).boxes(HEIGHT, WIDTH, noise=noise(count))
    found = torch.stack([boxes.top, boxes.left, boxes.area], dim=1).numpy()
    wanted = timm_erased(count)
    happened = [(rows[:, 2] > 0) for rows in (found, wanted)]
    assert happened[0].mean() == pytest.approx(happened[1].mean(), abs=0.03)
    for column in range(3):
        assert_same_distribution(found[happened[0], column], wanted[happened[1], column])
    assert (boxes.bottom <= HEIGHT).all() and (boxes.right <= WIDTH).all()


def test_erasing_puts_normal_noise_into_the_box_and_leaves_the_rest() -> None:
    images = torch.full((400, 3, HEIGHT, WIDTH), 9.0)
    erasing, numbers = RandomErasing(probability=0.5), torch.arange(400)
    erased = erasing.apply(images, seed=3, sample_numbers=numbers)
    inside = erasing.boxes(HEIGHT, WIDTH, noise=noise(400, seed=3)).mask(HEIGHT, WIDTH)
    inside = inside.expand_as(images)
    assert (erased[~inside] == 9.0).all()
    assert erased[inside].mean().abs() < 0.01
    assert erased[inside].std() == pytest.approx(1.0, abs=0.01)
    assert 0.4 < inside.flatten(1).any(1).float().mean() < 0.6


def test_what_happens_to_a_sample_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    images, numbers = torch.randn(12, 3, HEIGHT, WIDTH), torch.arange(100, 112)
    erasing, mixing = RandomErasing(probability=0.7), Mixing(together=6)
    everyone = torch.ones(12, dtype=torch.bool)

    def changed(rows: slice) -> torch.Tensor:
        part, mine = images[rows], numbers[rows]
        part = erasing.apply(part, seed=5, sample_numbers=mine)
        shares, boxes = mixing.draw(HEIGHT, WIDTH, seed=5, sample_numbers=mine)
        return mix(part, shares, boxes, mixes=everyone[rows])

    together = changed(slice(0, 12))
    apart = torch.cat([changed(slice(0, 2)), changed(slice(2, 8)), changed(slice(8, 12))])
    assert torch.equal(together, apart)


def test_samples_draw_together_and_other_samples_draw_something_else() -> None:
    shares, boxes = Mixing(together=4).draw(
        HEIGHT, WIDTH, seed=0, sample_numbers=torch.arange(4_000)
    )
    rows = torch.stack([shares, *boxes], dim=1).view(1_000, 4, 5)
    assert (rows == rows[:, :1]).all()
    assert len(rows[:, 0].unique(dim=0)) > 900
    is_cut = boxes.area > 0
    assert is_cut.float().mean() == pytest.approx(0.5, abs=0.06)
    kept = 1 - boxes.area / (HEIGHT * WIDTH)
    torch.testing.assert_close(shares[is_cut], kept[is_cut])
    wanted = np.random.default_rng(0).beta(0.8, 0.8, size=5_000)
    assert_same_distribution(shares[~is_cut][::4].numpy(), wanted)


def timm_cut_shares(count: int) -> np.ndarray:
    np.random.seed(2)
    shape = (2, 3, HEIGHT, WIDTH)
    lams = np.random.beta(1.0, 1.0, size=count)
    return np.array([timm_mixup.cutmix_bbox_and_lam(shape, lam)[1] for lam in lams])


def test_cutmix_keeps_as_much_as_timms() -> None:
    shares, _ = Mixing(mixup=0.0, cutmix=1.0, together=2).draw(
        HEIGHT, WIDTH, seed=1, sample_numbers=torch.arange(0, 16_000, 2)
    )
    assert_same_distribution(shares.numpy(), timm_cut_shares(8_000))


class Replayed(timm_mixup.Mixup):
    """timm's mixing with the draw of ours."""

    def __init__(self, share: float, *, is_cut: bool, classes: int, smoothing: float) -> None:
        super().__init__(0.8, 1.0, num_classes=classes, label_smoothing=smoothing)
        self._drawn = (share, is_cut)

    def _params_per_batch(self) -> tuple[float, bool]:
        return self._drawn


@pytest.mark.parametrize("number", [0, 2, 4, 6, 8, 10])
def test_a_pair_is_mixed_and_labeled_as_timm_does_it(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(number)
    numbers, labels = torch.tensor([number, number + 1]), torch.tensor([3, 1])
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    shares, boxes = Mixing(together=2).draw(HEIGHT, WIDTH, seed=0, sample_numbers=numbers)
    found = mix(images, shares, boxes, mixes=torch.ones(2, dtype=torch.bool))
    is_cut = bool(boxes.area[0] > 0)
    timms = Replayed(shares[0].item(), is_cut=is_cut, classes=5, smoothing=0.1)
    corners = tuple(int(side[0]) for side in boxes)
    cut = (corners, shares[0].item())
    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *_, **__: cut)
    wanted, targets = timms(images.clone(), labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    scores = torch.randn(2, 5)
    losses = smoothed_cross_entropy(scores, labels, shares, smoothing=0.1)
    torch.testing.assert_close(losses, -(targets * scores.log_softmax(1)).sum(1))


def test_both_kinds_of_mixing_are_among_the_pairs_above() -> None:
    _, boxes = Mixing(together=2).draw(HEIGHT, WIDTH, seed=0, sample_numbers=torch.arange(0, 12, 2))
    assert 0 < (boxes.area > 0).sum() < 6


def objective(**options: object) -> ClassificationObjective:
    tower = ImageTower(width=8, depth=1, heads=2, mlp_width=8, patch_size=4, image_size=8)
    model = ClassifierConfig(image=tower, num_classes=3).build(torch.Generator().manual_seed(0))
    return ClassificationObjective(model, Classification(**options), reduction=KeepAll(), seed=0)


def batch(count: int, valid: list[bool]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        images=torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        labels=torch.arange(count) % 3,
        sample_numbers=torch.arange(count),
        valid=torch.tensor(valid),
    )


def test_an_image_whose_partner_is_damaged_stays_as_it_is() -> None:
    mixing = Mixing(mixup=0.8, cutmix=0.0, together=2)
    mixed = objective(mixing=mixing)(batch(4, [True, False, True, True]))[0]
    scores = (
        objective()(batch(1, [True]))[0],
        objective(mixing=mixing)(batch(4, [False] * 2 + [True] * 2))[0],
    )
    # one image on its own, and a pair
    torch.testing.assert_close(mixed, (scores[0] + 2 * scores[1]) / 3)


def test_pairs_need_an_even_number_of_samples() -> None:
    with pytest.raises(InputError, match="a micro-batch of a process holds 3"):
        objective(mixing=Mixing())(batch(3, [True] * 3))
    objective()(batch(3, [True] * 3))


def test_what_is_drawn_for_tensorboard_is_what_the_model_sees() -> None:
    plain = objective().draw(batch(3, [True] * 3))
    assert plain.shape == (3, 8, 3 * 8)
    assert (plain[:, :, 8:16] == batch(3, [True] * 3).images[1].numpy()).all()
    erased = objective(erasing=RandomErasing(probability=1.0)).draw(batch(3, [True] * 3))
    assert (erased != plain).any()
    assert objective(mixing=Mixing()).draw(batch(3, [True] * 3)).shape == (3, 8, 2 * 8)


def test_boxes_know_their_area() -> None:
    sides = [torch.tensor(values) for values in ([1, 0], [4, 0], [2, 5], [7, 5])]
    boxes = Boxes(*sides)
    assert boxes.area.tolist() == [15, 0]
    assert boxes.mask(6, 9).flatten(1).sum(1).tolist() == [15, 0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mixing(together=3), "must be even"),
        (lambda: Mixing(mixup=-0.1), "objective.mixing.mixup is -0.1"),
        (lambda: Mixing(cutmix_probability=1.5), "cutmix_probability is 1.5"),
        (lambda: RandomErasing(probability=2.0), "erasing.probability is 2.0"),
        (lambda: RandomErasing(area=(0.5, 0.2)), "erasing.area"),
        (lambda: RandomErasing(ratio=(0.0, 1.0)), "erasing.ratio"),
        (lambda: Classification(smoothing=1.0), "objective.smoothing is 1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()
