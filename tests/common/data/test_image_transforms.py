import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from open_clip.transform import image_transform
from PIL import Image
from safetensors.numpy import load_file

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import Window, open_image, resize_window
from frugal.common.data.transforms import (
    CenterCrop,
    RandomResizedCrop,
    centre_window,
    clamped_window,
    random_window,
)
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator

GOLDEN = Path(__file__).parents[2] / "golden" / "flip"
CASES = json.loads((GOLDEN / "preprocess.json").read_text())
SIZES = [(61, 47), (40, 90), (24, 24), (7, 100), (300, 201), (33, 32)]


def generator(number=0):
    return sample_generator(0, "crop", number)


def fixed_window(case):
    """The window that the recorded draws of a golden case choose; its place is not recorded."""
    return random_window(
        case["height"],
        case["width"],
        fractions=case["area_fraction"],
        log_ratios=case["log_ratio"],
        place=(0.0, 0.0),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['height']}x{case['width']}")
def test_training_windows_are_those_of_the_reference(case):
    window = fixed_window(case)
    assert (window is not None) == case["accepted"]
    if window is not None:
        assert [window.height, window.width] == case["window_top_left_h_w"][2:]
    else:
        size = (case["out"], case["out"])
        fallback = centre_window(case["height"], case["width"], size=size, margin=32)
        assert list(fallback) == case["window_top_left_h_w"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['height']}x{case['width']}")
def test_evaluation_windows_are_those_of_the_reference(case):
    window = centre_window(case["height"], case["width"], size=(case["out"], case["out"]))
    assert list(window) == case["eval_window_top_left_h_w"]


def test_our_decoder_agrees_with_the_reference_on_golden_pictures():
    arrays = load_file(GOLDEN / "preprocess.safetensors")
    for number, case in enumerate(CASES):
        size = (case["height"], case["width"])
        window = Window(0, 0, *size)
        pixels = resize_window(open_image(arrays[f"c{number}/jpeg"].tobytes()), window, size)
        difference = pixels.transpose(1, 2, 0) - arrays[f"c{number}/decoded_uint8"].astype(float)
        # the reference used the fast integer transform of libjpeg and other chroma upsampling
        assert np.abs(difference).mean() < 2.5


def test_fallback_is_seven_eighths_of_the_shorter_side_at_224():
    assert centre_window(400, 300, size=(224, 224), margin=32)[2:] == (262, 262)
    # the shape of the result, not a square
    assert centre_window(400, 300, size=(100, 200))[2:] == (150, 300)


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (50, 60)])
def test_clamped_window_is_that_of_torchvision(height, width):
    # the whole area never fits at a ratio other than the image's own
    transform = torchvision.transforms.RandomResizedCrop
    expected = transform.get_params(
        torch.zeros(3, height, width), scale=[1.5, 1.5], ratio=[3 / 4, 4 / 3]
    )
    assert tuple(clamped_window(height, width, ratio=(3 / 4, 4 / 3))) == tuple(expected)


def test_windows_lie_inside_and_follow_area_and_ratio():
    crop = RandomResizedCrop(scale=(0.3, 0.6), ratio=(0.5, 2.0))
    areas, ratios, places, flips = [], [], [], []
    for number in range(2000):
        window, flip = crop.window(300, 400, size=(8, 8), generator=generator(number))
        assert 0 <= window.top <= 300 - window.height
        assert 0 <= window.left <= 400 - window.width
        areas.append(window.height * window.width / (300 * 400))
        ratios.append(math.log(window.width / window.height))
        places.append(window.left / max(400 - window.width, 1))
        flips.append(flip)
    assert min(areas) > 0.29 and max(areas) < 0.61
    assert abs(np.mean(areas) - 0.45) < 0.02
    assert math.log(0.49) < min(ratios) and max(ratios) < math.log(2.05)
    assert abs(np.mean(places) - 0.5) < 0.03
    assert abs(np.mean(flips) - 0.5) < 0.05


def test_the_flip_does_not_depend_on_which_try_fits():
    flips = [
        [
            RandomResizedCrop().window(h, w, size=(8, 8), generator=generator(n))[1]
            for n in range(50)
        ]
        for h, w in ((64, 64), (20, 300))
    ]
    assert flips[0] == flips[1]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("side", [16, 32])
def test_evaluation_images_are_those_of_open_clip(make_picture, encode, height, width, side):
    content = encode(make_picture(1, height, width), quality=95)
    theirs = image_transform(side, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = theirs(Image.open(io.BytesIO(content))).numpy() * 255
    ours = CenterCrop().decode(content, size=(side, side))
    assert ours.shape == (3, side, side) and ours.dtype == np.uint8
    assert np.abs(ours - expected).max() <= 1.01


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_window_is_resized_as_torchvision_does(make_picture, encode, interpolation):
    content = encode(make_picture(2, 97, 141), "PNG")
    mode = torchvision.transforms.InterpolationMode(interpolation)
    expected = torchvision.transforms.functional.resized_crop(
        Image.open(io.BytesIO(content)), 11, 23, 64, 83, [20, 36], mode
    )
    window = Window(11, 23, 64, 83)
    ours = resize_window(open_image(content), window, (20, 36), interpolation=interpolation)
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("size", [(24, 24), (40, 56), (112, 64)])
def test_reduced_decoding_stays_close_to_a_full_decode(make_picture, encode, size):
    differences = []
    for number in range(8):
        content = encode(make_picture(number, 481, 643), quality=90)
        full, reduced = (
            RandomResizedCrop(reduced_decoding=reduced).decode(
                content, size=size, generator=generator(number)
            )
            for reduced in (False, True)
        )
        differences.append(np.abs(full.astype(float) - reduced).mean())
    assert max(differences) < 2.0
    assert max(differences) > 0  # it was reduced at all


@pytest.mark.parametrize(
    ("window", "size", "decoded"),
    [
        ((0, 0, 480, 640), (60, 80), (60, 80)),
        ((0, 0, 480, 640), (61, 80), (120, 160)),
        ((7, 9, 241, 320), (60, 80), (120, 160)),
        ((7, 9, 239, 320), (60, 80), (240, 320)),
        ((0, 0, 480, 640), (241, 320), (480, 640)),
    ],
)
def test_a_reduced_window_is_never_smaller_than_the_result(
    make_picture, encode, window, size, decoded
):
    image = open_image(encode(make_picture(0, 480, 640)))
    resize_window(image, Window(*window), size, reduced=True)
    assert (image.height, image.width) == decoded


def test_reduced_decoding_does_not_shift_the_picture(encode):
    # a slope: any shift of the window shows as a constant difference
    slope = np.linspace(0, 255, 641)[None, :, None].repeat(483, 0).repeat(3, 2).astype(np.uint8)
    content = encode(Image.fromarray(slope), quality=98)
    window = Window(13, 101, 333, 399)
    full, reduced = (
        resize_window(open_image(content), window, (40, 48), reduced=r).astype(float)
        for r in (False, True)
    )
    assert abs((full - reduced).mean()) < 0.3


def test_mirroring_turns_left_and_right(make_picture, encode):
    content = encode(make_picture(5, 80, 50), "PNG")
    plain, mirrored = (
        RandomResizedCrop(flip=flip).decode(content, size=(12, 20), generator=generator(3))
        for flip in (0.0, 1.0)
    )
    assert np.array_equal(plain, mirrored[:, :, ::-1])
    assert not np.array_equal(plain, mirrored)


def test_flip_crops_the_full_shorter_side_before_resizing(make_picture, encode):
    image = make_picture(6, 61, 40)
    ours = CenterCrop(order="crop_first").decode(encode(image, "PNG"), size=(16, 16))
    expected = image.crop((0, 11, 40, 51)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("order", ["resize_first", "crop_first"])
def test_evaluation_fills_a_rectangle_without_distortion(encode, order):
    # a disc stays a disc: as wide as it is high
    y, x = np.mgrid[:90, :160]
    disc = (255 * ((y - 45) ** 2 + (x - 80) ** 2 < 30**2)).astype(np.uint8)
    content = encode(Image.fromarray(disc), "PNG")
    pixels = CenterCrop(order=order).decode(content, size=(45, 60))[0] > 127
    assert pixels.any(0).sum() == pixels.any(1).sum() == 30


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(make_picture, encode, mode):
    image = make_picture(7, 30, 44).convert(mode)
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    ours = CenterCrop().decode(content, size=(30, 44))
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_and_not_clipped(encode):
    grey = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    ours = CenterCrop().decode(encode(Image.fromarray(grey), "PNG"), size=(32, 48))
    assert np.abs(ours - grey / 257.0).max() <= 0.51


def test_the_orientation_tag_is_ignored_as_in_open_clip(make_picture, encode):
    tags = Image.Exif()
    tags[0x0112] = 6
    image = make_picture(8, 30, 50)
    turned, plain = (
        CenterCrop().decode(encode(image, **options), size=(15, 25))
        for options in ({"exif": tags}, {})
    )
    assert np.array_equal(turned, plain)


def test_a_picture_of_one_pixel_is_scaled_up(encode):
    content = encode(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG")
    for crop in (RandomResizedCrop(), CenterCrop(), CenterCrop(order="crop_first")):
        pixels = crop.decode(content, size=(16, 24), generator=generator())
        assert (pixels == np.array([10, 200, 30])[:, None, None]).all()


def bomb():
    """A PNG that claims 60,000 x 60,000 pixels in a few bytes."""
    content = bytearray()
    buffer = io.BytesIO()
    Image.new("L", (16, 16)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("crop", [RandomResizedCrop(), CenterCrop()])
def test_what_cannot_be_decoded_is_damage(make_picture, encode, crop):
    photo = encode(make_picture(9, 200, 300))
    png = encode(make_picture(9, 60, 80), "PNG")
    broken = [
        b"", b"\xff\xd8\xff", b"<html>not found</html>", photo[: len(photo) // 2], png[:100],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", bomb(),
    ]  # fmt: skip
    for content in broken:
        with pytest.raises(Damaged) as caught:
            crop.decode(content, size=(16, 16), generator=generator())
        assert caught.value.kind == "image"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": (0.0, 1.0)}, "scale is .0.0, 1.0."),
        ({"scale": (0.6, 0.5)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip is 1.5, must be a probability"),
        ({"tries": 0}, "tries is 0"),
    ],
)
def test_an_impossible_augmentation_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        RandomResizedCrop(**options)
