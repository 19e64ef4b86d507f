"""Color jitter on the device, against torchvision's operations with the same draws."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional

from frugal.common.data.color import Changes, ColorJitter, change_colors
from frugal.common.errors import InputError
from frugal.common.randomness import RecordedNoise, SampleNoise

OPERATIONS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)
ORDERS = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1), (3, 0, 1, 2), (0, 2, 1, 3)]


def pictures(count: int, height: int = 19, width: int = 31) -> torch.Tensor:
    """Smooth colored pictures with some pure, gray, black and white pixels."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 5, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    images = (images * 300 - 20).clamp(0, 255).to(torch.uint8)
    images[:, :, 0, :4] = torch.tensor([[0, 255, 128, 255], [0, 255, 128, 0], [0, 255, 128, 0]])
    return images


def expected_of(image: torch.Tensor, order, amounts) -> torch.Tensor:
    for operation in order:
        image = OPERATIONS[operation](image, amounts[operation])
    return image


def jitter(images: torch.Tensor, orders, amounts: torch.Tensor, **flags) -> torch.Tensor:
    count = len(images)
    yes, no = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    changes = Changes(
        is_jittered=flags.get("is_jittered", yes),
        is_gray=flags.get("is_gray", no),
        order=torch.tensor(orders),
        amounts=amounts,
    )
    return change_colors(images, changes)


def difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.int() - right.int()).abs()


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("amount", [-0.32, -0.08, 0.05, 0.3])
def test_each_operation_is_torchvisions(operation, amount):
    images = pictures(3)
    amounts = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(3, 1)
    amounts[:, operation] += amount
    ours = jitter(images, [(0, 1, 2, 3)] * 3, amounts)
    theirs = OPERATIONS[operation](images, amounts[0, operation].item())
    assert difference(ours, theirs).max() <= 1
    assert difference(ours, images).max() > 3  # it did something


def test_a_batch_in_which_every_image_has_its_own_order_is_torchvisions():
    images = pictures(len(ORDERS))
    generator = torch.Generator().manual_seed(4)
    amounts = torch.rand(len(ORDERS), 4, generator=generator) * 0.64 + 0.68
    amounts[:, 3] = torch.linspace(-0.08, 0.08, len(ORDERS))
    ours = jitter(images, ORDERS, amounts)
    for row, order in enumerate(ORDERS):
        theirs = expected_of(images[row], order, amounts[row].tolist())
        off = difference(ours[row], theirs)
        # a level lost to rounding is at most doubled by the factors that follow
        assert off.max() <= 2 and off.float().mean() < 0.3, order
    reversed_order = [tuple(reversed(order)) for order in ORDERS]
    assert difference(jitter(images, reversed_order, amounts), ours).max() > 3


def test_images_that_are_not_jittered_stay_bit_for_bit():
    images = pictures(4)
    amounts = torch.tensor([[1.3, 0.7, 1.2, 0.08]]).repeat(4, 1)
    flags = torch.tensor([True, False, False, True])
    ours = jitter(images, ORDERS[:4], amounts, is_jittered=flags)
    assert torch.equal(ours[1:3], images[1:3])
    assert all(difference(ours[row], images[row]).max() > 3 for row in (0, 3))


def test_gray_images_are_torchvisions():
    images = pictures(2)
    nothing = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)
    ours = jitter(images, ORDERS[:2], nothing, is_gray=torch.tensor([True, False]))
    theirs = functional.rgb_to_grayscale(images[0], num_output_channels=3)
    assert difference(ours[0], theirs).max() <= 1
    assert torch.equal(ours[1], images[1])


def test_draws_decide_on_order_factors_and_probabilities():
    images = pictures(3)
    draws = torch.tensor(
        [
            # jitter, gray, keys of the order, brightness, contrast, saturation, hue
            [0.79, 0.5, 0.9, 0.2, 0.4, 0.1, 0.25, 0.75, 0.5, 1 - 2**-24],
            [0.81, 0.5, 0.9, 0.2, 0.4, 0.1, 0.25, 0.75, 0.5, 1 - 2**-24],
            [0.81, 0.19, 0.9, 0.2, 0.4, 0.1, 0.25, 0.75, 0.5, 1 - 2**-24],
        ]
    )
    ours = ColorJitter().apply(images, noise=RecordedNoise({"colour": draws}))
    theirs = expected_of(images[0], (3, 1, 2, 0), (0.84, 1.16, 1.0, 0.08))
    assert difference(ours[0], theirs).max() <= 2
    assert torch.equal(ours[1], images[1])
    gray = functional.rgb_to_grayscale(images[2], num_output_channels=3)
    assert difference(ours[2], gray).max() <= 1


def test_what_is_drawn_has_torchvisions_distribution():
    count = 20_000
    noise = SampleNoise(1, torch.arange(count))
    changes = ColorJitter()._changes(noise.uniform("colour", 10))
    for share, expected in ((changes.is_jittered, 0.8), (changes.is_gray, 0.2)):
        off = abs(share.double().mean().item() - expected)
        assert off < 5 * (expected * (1 - expected) / count) ** 0.5
    codes = (changes.order * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert (counts - count / 24).abs().max() < 5 * (count / 24) ** 0.5
    low = torch.tensor([0.68, 0.68, 0.68, -0.08])
    high = torch.tensor([1.32, 1.32, 1.32, 0.08])
    assert torch.all(changes.amounts >= low - 1e-6) and torch.all(changes.amounts <= high + 1e-6)
    quarters = (((changes.amounts - low) / (high - low)).double() * 4).long().clamp(0, 3)
    for operation in range(4):
        counts = quarters[:, operation].bincount(minlength=4)
        assert (counts - count / 4).abs().max() < 5 * (count * 3 / 16) ** 0.5
    together = torch.corrcoef(torch.cat([changes.amounts, changes.order.float()], 1).T)
    assert (together[:4] - torch.eye(4, 8)).abs().max() < 5 / count**0.5


def test_factors_are_drawn_from_zero_on_where_the_strength_exceeds_one():
    jitter = ColorJitter(brightness=1.5, contrast=0.5, saturation=2.0)
    draws = torch.tensor([0.0, 0.5])[:, None].expand(2, 10)
    expected = torch.tensor([[0.0, 0.5, 0.0, -0.08], [1.25, 1.0, 1.5, 0.0]])
    torch.testing.assert_close(jitter._changes(draws).amounts, expected)


def test_the_colors_of_a_sample_do_not_depend_on_its_batch_or_chunk(monkeypatch):
    images = pictures(6)
    whole = ColorJitter().apply(images, noise=SampleNoise(3, torch.arange(100, 106)))
    part = ColorJitter().apply(images[[4, 1]], noise=SampleNoise(3, torch.tensor([104, 101])))
    assert torch.equal(part, whole[[4, 1]])
    monkeypatch.setattr("frugal.common.data.color._CHUNK_NUMBERS", 2 * images[0].numel() + 1)
    chunked = ColorJitter().apply(images, noise=SampleNoise(3, torch.arange(100, 106)))
    assert torch.equal(chunked, whole)
    assert whole.dtype == torch.uint8 and not torch.equal(whole, images)


def test_without_probability_nothing_is_touched():
    images = pictures(2).float()
    nothing = ColorJitter(probability=0.0, gray=0.0)
    assert nothing.apply(images, noise=RecordedNoise()) is images


def test_an_empty_batch_stays_empty():
    images = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    noise = SampleNoise(0, torch.zeros(0, dtype=torch.int64))
    assert ColorJitter().apply(images, noise=noise).shape == (0, 3, 4, 4)


def test_normalized_images_are_refused():
    with pytest.raises(InputError, match=r"uint8 images, but these are torch\.float32"):
        ColorJitter().apply(torch.zeros(1, 3, 4, 4), noise=SampleNoise(0, torch.arange(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": 1.2}, "color.probability is 1.2, must be a probability"),
        ({"gray": -0.1}, "color.gray is -0.1, must be a probability"),
        ({"contrast": -0.1}, "color.contrast is -0.1, must not be negative"),
        ({"brightness": math.nan}, "color.brightness is nan"),
        ({"hue": 0.6}, "color.hue is 0.6, must lie between 0 and 0.5"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        ColorJitter(**changes)
