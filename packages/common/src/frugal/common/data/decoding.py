"""Encoded pictures to uint8 arrays of a wanted size, decoding no more pixels than needed."""

from __future__ import annotations

import io
import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from frugal.common.data.damage import Damaged

Interpolation = Literal["bicubic", "bilinear"]
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Named, because Pillow also opens PostScript, for which it would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_BRIGHTEST_16_BIT = 65535.0


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
        return Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except Exception as error:  # noqa: BLE001 - every format raises errors of its own
        raise Damaged("image", str(error)) from None


def resize_window(
    image: Image.Image,
    window: Window,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "bicubic",
    reduced: bool = False,
    isolated: bool = True,
) -> np.ndarray:
    """A window of an opened image, resized with anti-aliasing.

    Args:
        image: from :func:`open_image`; its orientation tag is ignored, as in open_clip.
        window: what to cut out.
        size: (height, width) of the result.
        interpolation: the kernel; it widens when the window shrinks.
        reduced: decode JPEG at 1/2, 1/4 or 1/8 of its size where that leaves the window no
            smaller than the result. Differs from a full decode by about 1 grey level on average.
        isolated: nothing outside of the window counts, as if it had been cut out first; else
            the kernel reaches over its border, as if the whole image had been resized first.

    Returns:
        (3, height, width) uint8.

    Raises:
        Damaged: if the pixels cannot be decoded.
    """
    height, width = size
    scale = _reduction(image, min(window.height / height, window.width / width)) if reduced else 1
    pixels = decode_rgb(image)
    left, top = window.left / scale, window.top / scale
    right = min(left + window.width / scale, pixels.width)
    bottom = min(top + window.height / scale, pixels.height)
    if isolated:
        corner = (math.floor(left), math.floor(top))
        pixels = pixels.crop((*corner, math.ceil(right), math.ceil(bottom)))
        left, right = left - corner[0], right - corner[0]
        top, bottom = top - corner[1], bottom - corner[1]
    resized = pixels.resize(
        (width, height), _FILTERS[interpolation], box=(left, top, right, bottom)
    )
    return np.asarray(resized).transpose(2, 0, 1)  # (3, height, width)


def _reduction(image: Image.Image, shrinking: float) -> int:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 if the window shrinks by as much; the divisor."""
    divisor = next((divisor for divisor in (8, 4, 2) if divisor <= shrinking), 1)
    if divisor == 1:
        return 1
    width, height = image.size
    image.draft("RGB", (width // divisor, height // divisor))
    return divisor if image.size != (width, height) else 1


def decode_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an opened image: transparency is dropped, 16-bit grey scaled to 8 bits.

    Raises:
        Damaged: if they cannot be decoded.
    """
    try:
        if image.mode.startswith("I"):
            grey = np.asarray(image, np.float32) * (255.0 / _BRIGHTEST_16_BIT)
            image = Image.fromarray(grey.clip(0.0, 255.0).round().astype(np.uint8))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # noqa: BLE001 - every format raises errors of its own
        raise Damaged("image", str(error)) from None
