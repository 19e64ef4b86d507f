"""Photometric distortion against the same done pixel by pixel in the color space it is told in."""

import colorsys
import math

import pytest
import torch

from frugal.common.errors import InputError
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.transfer.photometric import PURPOSE, PhotometricDistortion


def changed(image: list[list[int]], draws: list[float], options: PhotometricDistortion) -> list:
    """RGB pixels of one image, one at a time, whole levels after every step."""
    brightness, contrast, saturation, hue = (draw < options.probability for draw in draws[:4])

    def between(low: float, high: float, share: float) -> float:
        return low + (high - low) * share

    def whole(pixel: list[float]) -> list[float]:
        return [math.floor(min(max(level, 0), 255) + 1e-4) for level in pixel]

    def contrasted(pixel: list[float]) -> list[float]:
        factor = between(*options.contrast, draws[5])
        return whole([level * factor for level in pixel]) if contrast else pixel

    result = []
    for pixel in image:
        if brightness:
            shift = between(-options.brightness, options.brightness, draws[4])
            pixel = whole([level + shift for level in pixel])
        if draws[8] < 0.5:
            pixel = contrasted(pixel)
        if saturation:
            h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
            s = min(s * between(*options.saturation, draws[6]), 1)
            pixel = whole([level * 255 for level in colorsys.hsv_to_rgb(h, s, v)])
        if hue:
            h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
            h = (h + between(-options.hue, options.hue, draws[7])) % 1
            pixel = [round(level * 255) for level in colorsys.hsv_to_rgb(h, s, v)]
        if draws[8] >= 0.5:
            pixel = contrasted(pixel)
        result.append(pixel)
    return result


@pytest.mark.parametrize("options", [PhotometricDistortion(), PhotometricDistortion(probability=1)])
def test_every_change_is_that_of_single_pixels(options: PhotometricDistortion) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 3, 5), generator=generator).byte()
    images[:, :, 0, 0] = 90  # without any color
    draws = torch.rand(40, 9, generator=generator)
    found = options.apply(images, noise=RecordedNoise({PURPOSE: draws}))
    assert found.dtype == torch.uint8
    differences = []
    for image, row, result in zip(images, draws.tolist(), found, strict=True):
        pixels = image.flatten(1).T.tolist()
        expected = torch.tensor(changed(pixels, row, options))
        differences.append((result.flatten(1).T - expected).abs())
    together = torch.stack(differences)
    # a level on the edge of two whole ones may fall either way
    assert together.max() <= 2
    assert (together > 0).float().mean() < 0.02


def test_draws_belong_to_the_sample_and_no_change_leaves_the_image_alone() -> None:
    images = torch.randint(0, 256, (3, 3, 4, 4)).byte()
    still = PhotometricDistortion(probability=0.0)
    assert still.apply(images, noise=SampleNoise(0, torch.arange(3))) is images
    always = PhotometricDistortion(probability=1.0)
    whole = always.apply(images, noise=SampleNoise(0, torch.tensor([4, 5, 6])))
    part = always.apply(images[1:], noise=SampleNoise(0, torch.tensor([5, 6])))
    assert torch.equal(whole[1:], part)
    other = always.apply(images, noise=SampleNoise(1, torch.tensor([4, 5, 6])))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("probability", 1.5), ("brightness", -1.0), ("contrast", (1.0, 0.5)),
        ("saturation", (-1.0, 1.0)), ("hue", 0.6),
    ],
)  # fmt: skip
def test_changes_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"objective.distortion.{name}"):
        PhotometricDistortion(**{name: value})
