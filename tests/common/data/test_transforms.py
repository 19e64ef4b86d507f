import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from open_clip.transform import image_transform
from PIL import Image
from safetensors.numpy import load_file

from frugal.common.data.damage import Damaged
from frugal.common.data.decoding import Window, hush_pillow, open_image, resize_window
from frugal.common.data.transforms import (
    CenterCrop,
    RandomResizedCrop,
    center_window,
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
        draws = list(zip(case["area_fraction"], case["log_ratio"], strict=True))
        tried = [
            random_window(
                case["height"], case["width"], fractions=[area], log_ratios=[ratio], place=(0, 0)
            )
            for area, ratio in draws[: case["chosen"] + 1]
        ]
        assert tried == [None] * case["chosen"] + [window]
    else:
        size = (case["out"], case["out"])
        fallback = center_window(case["height"], case["width"], size=size, margin=32)
        assert list(fallback) == case["window_top_left_h_w"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['height']}x{case['width']}")
def test_evaluation_windows_are_those_of_the_reference(case):
    window = center_window(case["height"], case["width"], size=(case["out"], case["out"]))
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
    assert center_window(400, 300, size=(224, 224), margin=32)[2:] == (262, 262)
    # the shape of the result, not a square
    assert center_window(400, 300, size=(100, 200))[2:] == (150, 300)


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


# TensorFlow's kernels, slowly, on images and sizes of any shape.


def slow_weight(distance, a):
    """Keys' cubic convolution (IEEE Transactions on ASSP 29, 1981) with its free parameter."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_line(line, count, kernel):
    """One row or column of gray levels, resized in float64."""
    result = []
    for place in range(count):
        if kernel == "tf2_bicubic":
            source, a = (place + 0.5) * len(line) / count - 0.5, -0.5
        else:
            source, a = place * len(line) / count, -0.75
        taps = [math.floor(source) + offset for offset in (-1, 0, 1, 2)]
        weights = [slow_weight(source - tap, a) for tap in taps]
        if kernel == "tf2_bicubic":
            weights = [w * (0 <= tap < len(line)) for w, tap in zip(weights, taps, strict=True)]
            weights = [w / sum(weights) for w in weights]
        levels = [float(line[min(max(tap, 0), len(line) - 1)]) for tap in taps]
        result.append(sum(w * level for w, level in zip(weights, levels, strict=True)))
    return result


def slow_resize(pixels, size, kernel):
    rows = np.array([slow_line(row, size[1], kernel) for row in pixels])
    return np.array([slow_line(column, size[0], kernel) for column in rows.T]).T


TENSORFLOW = pytest.mark.parametrize("kernel", ["tf1_bicubic", "tf2_bicubic"])


@TENSORFLOW
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((37, 81), (16, 24)), ((90, 33), (8, 40)), ((5, 9), (20, 12)), ((1, 1), (4, 6)),
     ((2, 3), (2, 3))],
)  # fmt: skip
def test_tensorflows_kernels_follow_their_definition(encode, kernel, mode, shape, size):
    drawn = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(drawn).convert(mode)
    levels = resize_window(
        open_image(encode(image, "PNG")), Window(0, 0, *shape), size, interpolation=kernel
    )
    assert levels.shape == (3, *size) and levels.dtype == np.float32
    pixels = np.asarray(image.convert("RGB"))
    for channel in range(3):
        # TensorFlow rounds every place to 1/1024 of a pixel; noise of 255 gray levels shows it
        expected = slow_resize(pixels[:, :, channel], size, kernel)
        assert np.abs(levels[channel] - expected).max() < 0.5
        assert np.abs(levels[channel] - expected).mean() < 0.1


@TENSORFLOW
def test_what_lies_outside_of_a_crop_does_not_reach_tensorflows_kernels(encode, kernel):
    pixels = np.random.default_rng(4).integers(0, 256, (50, 30, 3), dtype=np.uint8)
    crop = CenterCrop(order="crop_first", interpolation=kernel)
    ours = crop.gray_levels(encode(Image.fromarray(pixels), "PNG"), size=(12, 16))
    top, left, height, width = center_window(50, 30, size=(12, 16))
    cut = Image.fromarray(pixels[int(top) : int(top + height), int(left) : int(left + width)])
    alone = resize_window(
        open_image(encode(cut, "PNG")), Window(0, 0, height, width), (12, 16), interpolation=kernel
    )
    assert np.array_equal(ours, alone)


@TENSORFLOW
def test_tensorflows_kernels_are_not_taken_to_a_reduced_image(make_picture, encode, kernel):
    content = encode(make_picture(3, 240, 320), quality=80)
    reduced, full = (
        RandomResizedCrop(interpolation=kernel, reduced_decoding=r).decode(
            content, size=(24, 24), generator=generator()
        )
        for r in (True, False)
    )
    assert np.array_equal(reduced, full)


@TENSORFLOW
def test_resizing_first_gives_the_middle_of_the_whole_image_resized(encode, kernel):
    pixels = np.random.default_rng(5).integers(0, 256, (48, 120, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels), "PNG")
    middle = CenterCrop(interpolation=kernel).gray_levels(content, size=(16, 16))
    whole = resize_window(
        open_image(content), Window(0, 0, 48, 120), (16, 40), interpolation=kernel
    )
    assert np.abs(middle - whole[:, :, 12:28]).max() < 1e-3


@TENSORFLOW
def test_an_augmentation_hands_out_bytes_whatever_the_kernel(encode, kernel):
    # black and white stripes: the kernels overshoot both
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[:, np.arange(60) % 10 < 5] = 255
    content = encode(Image.fromarray(stripes), "PNG")
    center = CenterCrop(order="crop_first", interpolation=kernel)
    levels = center.gray_levels(content, size=(37, 37))
    assert levels.min() < -1 and levels.max() > 256
    assert np.array_equal(
        center.decode(content, size=(37, 37)), np.rint(levels).clip(0, 255).astype(np.uint8)
    )
    crop = RandomResizedCrop(interpolation=kernel)
    assert crop.decode(content, size=(37, 37), generator=generator()).dtype == np.uint8


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
def test_every_color_mode_becomes_rgb(make_picture, encode, mode):
    image = make_picture(7, 30, 44).convert(mode)
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    ours = CenterCrop().decode(content, size=(30, 44))
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_sixteen_bit_gray_is_scaled_and_not_clipped(encode):
    gray = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    ours = CenterCrop().decode(encode(Image.fromarray(gray), "PNG"), size=(32, 48))
    assert np.abs(ours - gray / 257.0).max() <= 0.51


SLOPE = np.linspace(0, 1, 32 * 48).reshape(32, 48)


def white_at(levels: np.ndarray) -> np.ndarray:
    """(32, 48) of 0 to 255: as an array of Pillow's is decoded that was written to a TIFF."""
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "TIFF")
    return CenterCrop().decode(buffer.getvalue(), size=(32, 48))[0].astype(float)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_whole_numbers_are_scaled_by_the_bits_that_hold_them(bits, kind):
    levels = (SLOPE * (2**bits - 1)).round().astype(kind)
    # a level that is rounded is at most half of one away
    assert np.abs(white_at(levels) - SLOPE * 255).max() <= 0.51 + 127.5 / (2**bits - 1)


@pytest.mark.parametrize("form", ["TIFF", "PNG", "PPM"])
@pytest.mark.parametrize("bits", [12, 16])
def test_every_format_of_more_than_eight_bits_is_scaled_alike(encode, form, bits):
    levels = (SLOPE * (2**bits - 1)).round().astype(np.uint16)
    ours = CenterCrop().decode(encode(Image.fromarray(levels), form), size=(32, 48))
    assert np.abs(ours - SLOPE * 255).max() <= 0.6


def test_a_portable_gray_map_is_scaled_by_the_brightest_level_it_names():
    levels = (SLOPE * 600).round().astype(">u2")
    content = b"P5 48 32 1000\n" + levels.tobytes()
    ours = CenterCrop().decode(content, size=(32, 48))[0]
    assert np.abs(ours - SLOPE * 255 * 0.6).max() <= 0.7


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        (SLOPE, SLOPE),
        (SLOPE * 0.3, SLOPE * 0.3),  # 0 to 1, whatever is in it
        (SLOPE * 5, SLOPE),  # light without a limit
        (SLOPE * 255, SLOPE),
        (SLOPE * 65535, SLOPE),
        (SLOPE * 1e9, SLOPE),
        (SLOPE * 2 - 1, SLOPE),
        (SLOPE * 4000 - 1000, SLOPE),
        (np.where(SLOPE > 0.9, np.inf, SLOPE), np.where(SLOPE > 0.9, 0.9, SLOPE)),
        (np.where(SLOPE > 0.9, np.nan, SLOPE), np.where(SLOPE > 0.9, 0.0, SLOPE)),
    ],
)
def test_floats_are_scaled_by_their_range(levels, expected):
    assert np.abs(white_at(levels.astype(np.float32)) - expected * 255).max() <= 0.6


def test_a_tiff_says_itself_how_bright_white_is(encode):
    levels = Image.fromarray((SLOPE * 300).astype(np.uint16))
    dark = CenterCrop().decode(encode(levels, "TIFF", tiffinfo={281: 4095}), size=(32, 48))[0]
    assert np.abs(dark - SLOPE * 255 * 300 / 4095).max() <= 0.6
    wrong = CenterCrop().decode(encode(levels, "TIFF", tiffinfo={281: 100}), size=(32, 48))[0]
    assert wrong.max() == round(300 / 1023 * 255)  # no level can lie above white


def test_a_picture_without_a_finite_number_is_damage(encode):
    content = encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF")
    with pytest.raises(Damaged, match="none of its pixels is a finite number") as caught:
        CenterCrop().decode(content, size=(8, 8))
    assert caught.value.kind == "image"


@pytest.mark.parametrize("crop", [CenterCrop(), RandomResizedCrop(scale=(1, 1), flip=0)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(encode, mode, crop):
    color = np.full((16, 16, 4), (40, 40, 40, 0), np.uint8)
    color[:, :8, 3] = np.arange(0, 256, 17)[:, None]
    image = Image.fromarray(color).convert(mode)
    ours = crop.decode(encode(image, "PNG"), size=(16, 16), generator=generator())
    share = color[:, :, 3] / 255
    assert np.abs(ours - (40 * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_a_transparent_color_lies_on_white_too(encode, form):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 10, 30, *[0] * 750])
    image.paste(0, (0, 0, 8, 16))
    if form == "WEBP":
        image.info["transparency"] = 0
        content = encode(image.convert("RGBA"), form, lossless=True)
    else:
        content = encode(image, form, transparency=0)
    ours = CenterCrop().decode(content, size=(16, 16))
    assert (ours[:, :, :8] == 255).all()
    assert (ours[:, :, 8:] == np.array([200, 10, 30])[:, None, None]).all()


def test_a_transparent_color_of_a_picture_without_a_palette_lies_on_white(encode):
    for mode, color, other in (("RGB", (9, 8, 7), (200, 10, 30)), ("L", 9, 200)):
        image = Image.new(mode, (16, 16), other)
        image.paste(color, (0, 0, 8, 16))
        ours = CenterCrop().decode(encode(image, "PNG", transparency=color), size=(16, 16))
        assert (ours[:, :, :8] == 255).all() and (ours[0, :, 8:] == 200).all()


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
        assert "0x" not in str(caught.value) and "BytesIO" not in str(caught.value)


def test_what_pillow_remarks_on_a_picture_is_not_said(encode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    content = encode(Image.new("RGB", (30, 30)), "PNG")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(content))
        assert len(said) == 1  # its size is above Pillow's limit, though not above twice of it
        hush_pillow()
        open_image(content)
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "x.py", 1, "PIL.TiffImagePlugin")
        assert len(said) == 1


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
