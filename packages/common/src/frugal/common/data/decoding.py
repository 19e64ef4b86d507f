"""Encoded pictures to arrays of a wanted size, decoding no more pixels than needed."""

from __future__ import annotations

import io
import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from frugal.common.data.damage import Damaged
from frugal.common.data.jpeg import Jpeg, open_jpeg
from frugal.common.files import reason_of

Interpolation = Literal[
    "bicubic", "bilinear", "lanczos", "box", "hamming", "nearest", "tf1_bicubic", "tf2_bicubic"
]
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "nearest": Image.Resampling.NEAREST,
}
# Named, because Pillow also opens PostScript, for which it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_WHITE = (255, 255, 255)
_DEPTHS = (8, 10, 12, 14, 16)
"""Bits of the sensors and scanners whose pictures are stored in 16 bits."""
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281
"""TIFF's tags."""
_DIM = 16.0
"""Floats up to here are light on a scale of its own, brighter ones are gray levels."""


def hush_pillow() -> None:
    """Say nothing of what Pillow remarks on a picture.

    Its remarks (a damaged EXIF block, tags it does not know, a size above half of its limit) name
    its own files and come for every picture: either the picture is decoded, or it counts as damage
    with the reason.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


hush_pillow()


class TensorFlowCubic(NamedTuple):
    """One of TensorFlow's two cubic kernels; four pixels wide however much the image shrinks."""

    a: float
    """Of Keys' cubic convolution: its slope one pixel away."""
    has_centers: bool
    """Pixels lie at their centers, and those beyond the border do not count (TensorFlow 2); else
    at their top left corners, and the border repeats (TensorFlow 1)."""


_CUBICS = {"tf1_bicubic": TensorFlowCubic(-0.75, False), "tf2_bicubic": TensorFlowCubic(-0.5, True)}
_CUBIC_STEPS = np.float32(1024)
"""TensorFlow looks its kernels up in tables with this many entries per pixel."""


class Window(NamedTuple):
    """A rectangle of an image, in its pixels; need not lie on whole ones."""

    top: float
    left: float
    height: float
    width: float


def open_image(encoded: bytes) -> Image.Image:
    """A picture whose size is known and whose pixels are not decoded yet.

    Raises:
        Damaged: if it is no picture, or one so large that only an attack would send it.
    """
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # noqa: BLE001 - every format raises errors of its own
        raise Damaged("image", reason_of(error)) from None


def open_picture(encoded: bytes) -> Image.Image | Jpeg:
    """A picture as :func:`resize_window` takes it, opened by the fastest library there is.

    Raises:
        Damaged: as :func:`open_image`.
    """
    return open_jpeg(encoded) or open_image(encoded)


def resize_window(
    image: Image.Image | Jpeg,
    window: Window,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "bicubic",
    reduced: bool = False,
    isolated: bool = True,
) -> np.ndarray:
    """A window of an opened image, resized.

    Args:
        image: from :func:`open_picture` or :func:`open_image`; its orientation tag is ignored, as
            in open_clip.
        window: what to cut out.
        size: (height, width) of the result.
        interpolation: the kernel; bicubic and bilinear widen when the window shrinks
            (anti-aliasing), TensorFlow's do not.
        reduced: decode JPEG at 1/2, 1/4 or 1/8 of its size where that leaves the window no
            smaller than the result. Differs from a full decode by about 1 gray level on average.
            Not for TensorFlow's kernels, which depend on every pixel.
        isolated: nothing outside of the window counts, as if it had been cut out first; else
            the kernel reaches over its border, as if the whole image had been resized first.

    Returns:
        (3, height, width) uint8; with TensorFlow's kernels float32 gray levels, which may lie a
        little below 0 and above 255.

    Raises:
        Damaged: if the pixels cannot be decoded.
    """
    height, width = size
    cubic = _CUBICS.get(interpolation)
    shrinking = min(window.height / height, window.width / width)
    divisors = (8, 4, 2) if reduced and cubic is None else ()
    divisor = next((divisor for divisor in divisors if divisor <= shrinking), 1)
    pixels, scale = _decode_reduced(image, divisor)
    left, top = window.left / scale, window.top / scale
    right = min(left + window.width / scale, pixels.width)
    bottom = min(top + window.height / scale, pixels.height)
    if isolated:
        corner = (math.floor(left), math.floor(top))
        box = (*corner, math.ceil(right), math.ceil(bottom))
        if box != (0, 0, *pixels.size):  # a copy of all of a large picture takes its memory twice
            pixels = pixels.crop(box)
        left, right = left - corner[0], right - corner[0]
        top, bottom = top - corner[1], bottom - corner[1]
    if cubic is not None:
        inside = Window(top, left, bottom - top, right - left)
        resized_levels = resize_as_tensorflow(np.asarray(pixels), inside, size, cubic)
        return resized_levels.transpose(2, 0, 1)  # (3, height, width)
    resized = pixels.resize(
        (width, height), _FILTERS[interpolation], box=(left, top, right, bottom)
    )
    return np.asarray(resized).transpose(2, 0, 1)  # (3, height, width)


def resize_as_tensorflow(
    pixels: np.ndarray, window: Window, size: tuple[int, int], cubic: TensorFlowCubic
) -> np.ndarray:
    """A window of (H, W, C) gray levels as TensorFlow resizes it, without anti-aliasing.

    Pixels outside of the window count: cut it out first where they should not.

    Returns:
        (height, width, C) float32, not clipped.
    """
    height, width = pixels.shape[:2]
    rows = _taps(window.top, window.height, size[0], height, cubic)
    columns = _taps(window.left, window.width, size[1], width, cubic)
    across = _blend(pixels, *rows)  # (height, W, C)
    return _blend(across.swapaxes(0, 1), *columns).swapaxes(0, 1)  # (height, width, C)


def _blend(rows: np.ndarray, taps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums of four rows each: (H, W, C) with (4, count) taps to (count, W, C) float32."""
    blended = np.zeros((taps.shape[1], *rows.shape[1:]), np.float32)
    # one tap at a time: (count, 4, W, C) would be the largest array by far
    for tap, weight in zip(taps, weights, strict=True):
        blended += weight[:, None, None] * rows[tap]
    return blended


def _taps(
    start: float, length: float, count: int, limit: int, cubic: TensorFlowCubic
) -> tuple[np.ndarray, np.ndarray]:
    """The four pixels, of ``limit``, behind each of ``count`` results along one side.

    Returns:
        (4, count) numbers of pixels, and (4, count) float32 weights.
    """
    scale, place = np.float32(length / count), np.arange(count, dtype=np.float32)
    if cubic.has_centers:
        source = (place + np.float32(0.5)) * scale - np.float32(0.5)
    else:
        source = place * scale
    source = source + np.float32(start)
    first = np.floor(source)
    beyond = np.rint((source - first) * _CUBIC_STEPS) / _CUBIC_STEPS  # (count,) in [0, 1]
    offsets = np.arange(-1, 3)[:, None]
    weights = _keys(np.abs(beyond - offsets), cubic.a)  # (4, count)
    pixels = first.astype(np.int64) + offsets
    if cubic.has_centers:
        weights = np.where((pixels >= 0) & (pixels < limit), weights, 0)
        weights = weights / weights.sum(0)
    return pixels.clip(0, limit - 1), weights.astype(np.float32)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Cubic convolution (Keys, 1981) at distances of at most 2 pixels."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, far)


def as_bytes(levels: np.ndarray) -> np.ndarray:
    """Gray levels as uint8: rounded, and clipped to what bytes can hold."""
    if levels.dtype == np.uint8:
        return levels
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _decode_reduced(image: Image.Image | Jpeg, divisor: int) -> tuple[Image.Image, int]:
    """The pixels of a picture, of a JPEG at 1/divisor of its size, and the divisor that it took.

    Raises:
        Damaged: if they cannot be decoded.
    """
    if isinstance(image, Jpeg):
        pixels = image.decode(divisor)
        if pixels is not None:
            return pixels, divisor
        image = open_image(image.encoded)
    whole = image.size
    if divisor > 1:
        image.draft("RGB", (whole[0] // divisor, whole[1] // divisor))
    return decode_rgb(image), divisor if image.size != whole else 1


def decode_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image in 8 bits of red, green and blue.

    What is transparent lies on white, as in img2dataset and transformers. Gray of more than 8 bits
    and of floats is scaled by :func:`gray_range`. All else is converted as Pillow does it.

    Raises:
        Damaged: if they cannot be decoded.
    """
    try:
        image.load()
        if image.mode == "RGB" and "transparency" not in image.info:
            return image
        if image.mode[0] in "IF":
            return _from_levels(image)
        if image.has_transparency_data:
            return _on_white(image)
        return image.convert("RGB")
    except Damaged:
        raise
    except Exception as error:  # noqa: BLE001 - every format raises errors of its own
        raise Damaged("image", reason_of(error)) from None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # of which Pillow makes only this
        image = image.convert("LA")
    layers = image.convert("RGBA")
    ground = Image.new("RGB", image.size, _WHITE)
    ground.paste(layers.convert("RGB"), mask=layers.getchannel("A"))
    return ground


def _from_levels(image: Image.Image) -> Image.Image:
    levels = np.asarray(image, np.float32)
    is_finite = np.isfinite(levels)
    if not is_finite.any():
        raise Damaged("image", "none of its pixels is a finite number")
    if not is_finite.all():
        levels = np.where(is_finite, levels, np.where(levels == np.inf, levels[is_finite].max(), 0))
    tags = getattr(image, "tag_v2", {})
    darkest, brightest = gray_range(
        float(levels.min()),
        float(levels.max()),
        is_float=image.mode[0] == "F",
        bits=_first(tags.get(_BITS_PER_SAMPLE)),
        limit=_first(tags.get(_MAX_SAMPLE_VALUE)),
    )
    scale = 255.0 / (brightest - darkest)
    gray = levels * scale - darkest * scale
    return Image.fromarray(gray.clip(0.0, 255.0).round().astype(np.uint8)).convert("RGB")


def _first(tag: object) -> float | None:
    """The number in a TIFF's tag, of which there may be one for each channel."""
    value = tag[0] if isinstance(tag, tuple) and tag else tag
    return float(value) if isinstance(value, int | float) else None


def gray_range(
    least: float, most: float, *, is_float: bool, bits: float | None, limit: float | None
) -> tuple[float, float]:
    """Which levels of a gray picture of more than 8 bits are black and white.

    Black is 0, or the least level where that is negative. White is what the file says (TIFF's
    MaxSampleValue, or less than 16 bits per sample); else, of whole numbers, the highest of the
    smallest of 8, 10, 12, 14 and 16 bits that holds all levels; of floats 1 where all are at most
    1, the brightest level up to 16 (light without a limit), and above that as of whole numbers.
    Beyond 16 bits, and with negative levels, white is the brightest level.

    Args:
        least: of the levels.
        most: of the levels.
        is_float: whether they are floats.
        bits: per sample, as the file says.
        limit: the highest level, as the file says.
    """
    if least < 0:
        return least, max(most, least + 1.0, 0.0)
    if limit and most <= limit:
        return 0.0, limit
    if is_float and most <= _DIM:
        return 0.0, max(most, 1.0)
    if bits and bits < _DEPTHS[-1]:
        return 0.0, 2.0**bits - 1
    return 0.0, next((2.0**depth - 1 for depth in _DEPTHS if most < 2**depth), most)
