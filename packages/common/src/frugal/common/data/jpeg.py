"""JPEG pictures by simplejpeg where it is installed: Pillow's pixels, without Pillow's Python.

Pillow reads the header of a JPEG in Python, which takes a small picture longer than all the rest of
its way. Both decode with libjpeg-turbo; that the pixels are the same is tried once in a process,
and where they are not, or where simplejpeg has any objection to a file, Pillow has its say.
"""

from __future__ import annotations

import functools
import io
import logging
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from PIL import Image

_DIVISORS = (1, 2, 4, 8)
"""By which libjpeg shrinks a picture for less than it costs to decode it whole."""
_START = b"\xff\xd8\xff"
_PLAIN = ("YCbCr", "Gray")
"""Colors that have one meaning; what else there is (CMYK, Adobe's RGB) is left to Pillow."""
_UNFIT = (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError)
"""What a library raises that does not load here, was built for another NumPy, or is too old."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose size is known and whose pixels are not decoded yet."""

    encoded: bytes
    width: int
    height: int

    def decode(self, divisor: int) -> Image.Image | None:
        """Its pixels in RGB at 1/divisor of the size, rounded up.

        Args:
            divisor: 1, 2, 4 or 8.

        Returns:
            What Pillow's ``draft`` gives; None where something is wrong with the file.
        """
        library = _library()
        assert library is not None
        try:
            pixels = _decode(library, self, divisor)
        except (ValueError, MemoryError):
            return None
        return None if pixels is None else Image.fromarray(pixels)


def open_jpeg(encoded: bytes) -> Jpeg | None:
    """A picture that simplejpeg can decode; None where it is for Pillow to say what it is."""
    library = _library() if encoded.startswith(_START) else None
    if library is None:
        return None
    try:
        height, width, colors, _ = library.decode_jpeg_header(encoded)
    except ValueError:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if colors not in _PLAIN or (limit is not None and height * width > 2 * limit):
        return None  # among them those that Pillow refuses as an attack
    return Jpeg(encoded, width, height)


def jpeg_decoder() -> str:
    """Which library decodes JPEG, in words for the log."""
    return "Pillow" if _library() is None else "simplejpeg"


@functools.cache
def _library() -> ModuleType | None:
    """simplejpeg, if it is here and gives Pillow's pixels."""
    try:
        import simplejpeg

        objection = _difference(simplejpeg)
    except _UNFIT as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "simplejpeg":
            return None
        objection = str(error) or type(error).__name__
    if objection:
        logging.getLogger("frugal").warning(
            "simplejpeg is installed and not used (%s); Pillow decodes JPEG", objection
        )
        return None
    return simplejpeg


def _decode(library: ModuleType, jpeg: Jpeg, divisor: int) -> np.ndarray | None:
    """(H, W, 3) uint8; None where they have another size than was asked for."""
    height, width = (-(-side // divisor) for side in (jpeg.height, jpeg.width))
    # the smallest of libjpeg's sizes that is no smaller than this one: this one
    pixels = library.decode_jpeg(
        jpeg.encoded, "RGB", min_height=height, min_width=width, min_factor=1
    )
    return pixels if pixels.shape == (height, width, 3) else None


def _difference(library: ModuleType) -> str:
    """What it does not do as Pillow does, in words; nothing if it decodes alike."""
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (9, 7, 3), np.uint8)
    picture = Image.fromarray(noise).resize((53, 75), Image.Resampling.BICUBIC)
    for mode, subsampling in (("RGB", 0), ("RGB", 2), ("L", 0)):
        written = io.BytesIO()
        picture.convert(mode).save(written, "JPEG", subsampling=subsampling, quality=85)
        jpeg = Jpeg(written.getvalue(), *picture.size)
        for divisor in _DIVISORS:
            found = _decode(library, jpeg, divisor)
            with Image.open(written) as image:
                image.draft("RGB", (jpeg.width // divisor, jpeg.height // divisor))
                if found is None or not np.array_equal(found, np.asarray(image.convert("RGB"))):
                    return f"it does not decode as Pillow does at 1/{divisor} of the size"
    return ""
