"""Pictures of batches, masks and predictions as uint8 arrays, for tensorboard and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

_GRAY, _LIGHT, _DARK = 128, 150, 124
_GAP = 3
_LABEL_HEIGHT = 18
_RIGHT, _WRONG, _INK, _PAPER = (24, 121, 78), (186, 52, 40), (40, 40, 40), (250, 250, 248)


def example_places(total: int, count: int = 12) -> list[int]:
    """At most ``count`` places among ``total``, ascending and always the same.

    Drawn, because even steps meet the same few classes where labels repeat in turn.
    """
    drawn = np.random.default_rng(0).choice(total, min(count, total), replace=False)
    return sorted(drawn.tolist())


def as_array(values: Any) -> NDArray:
    """A tensor of any device, or an array, as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def gray_dropped(images: Any, kept_mask: Any, patch_size: int) -> Picture:
    """The images with every patch that is not kept hatched in gray.

    Args:
        images: (B, 3, H, W) uint8.
        kept_mask: (B, N) bool, True where a patch stays; patches count row by row.
        patch_size: side of a patch in pixels; divides H and W.

    Returns:
        (B, 3, H, W) uint8; the kept patches are untouched.

    Raises:
        ValueError: if the patches do not tile the images.
    """
    pictures, kept = as_array(images), as_array(kept_mask).astype(bool)
    count, _, height, width = pictures.shape
    rows, columns = height // patch_size, width // patch_size
    if rows * patch_size != height or columns * patch_size != width:
        raise ValueError(f"patches of {patch_size} do not tile images of {height}x{width}")
    if kept.shape != (count, rows * columns):
        raise ValueError(
            f"a mask for {count} images of {rows}x{columns} patches has shape "
            f"({count}, {rows * columns}), not {kept.shape}"
        )
    stays = kept.reshape(count, 1, rows, columns)
    stays = stays.repeat(patch_size, axis=2).repeat(patch_size, axis=3)  # (B, 1, H, W)
    light = pictures.mean(axis=1, keepdims=True)  # (B, 1, H, W)
    # hatched, so that a dropped patch shows on a gray background too
    stripes = np.add.outer(np.arange(height), np.arange(width)) % 4 < 2  # (H, W)
    hatched = np.where(stripes, _LIGHT, _DARK) + 0.2 * (light - _GRAY)
    return np.where(stays, pictures, np.round(hatched).astype(np.uint8))


def tile(images: Any, *, columns: int | None = None) -> Picture:
    """One picture of (B, 3, H, W) uint8 images in rows, near a square by default.

    Returns:
        (3, H*, W*) uint8.
    """
    pictures = as_array(images)
    count, _, height, width = pictures.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    shape = (3, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top = place // columns * (height + _GAP)
        left = place % columns * (width + _GAP)
        sheet[:, top : top + height, left : left + width] = picture
    return sheet


def labeled_row(label: str, images: Any, *, side: int = 96) -> Picture:
    """Images side by side under a line of text.

    Args:
        label: the line.
        images: (B, 3, H, W) uint8; small ones are enlarged by a whole number.
        side: pixels that an image has at least.

    Returns:
        (3, H*, W*) uint8.
    """
    pictures = as_array(images)
    times = max(1, -(-side // min(pictures.shape[2:])))
    row = tile(pictures.repeat(times, axis=2).repeat(times, axis=3), columns=len(pictures))
    strip = Image.new("RGB", (row.shape[2], _LABEL_HEIGHT), "white")
    ImageDraw.Draw(strip).text((2, 2), label, fill="black", font=ImageFont.load_default(13))
    return np.concatenate([np.asarray(strip).transpose(2, 0, 1), row], axis=1)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """The words of ``text`` in lines that fit ``width`` pixels; one word always fits."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def draw_predictions(
    images: Any,
    captions: Sequence[str],
    right: Sequence[bool] | None = None,
    *,
    columns: int | None = None,
    side: int = 160,
    text_lines: int = 3,
) -> Picture:
    """Images with what the model said written beneath; green where it is right, else red.

    Args:
        images: (B, 3, H, W) uint8.
        captions: one per image.
        right: one per image; without it all are written in one color.
        columns: images side by side.
        side: width of an image in the picture, in pixels.
        text_lines: lines of text under each image; more is cut off.

    Returns:
        (3, H*, W*) uint8, for ``SummaryWriter.add_image``.
    """
    pictures = as_array(images)
    font = ImageFont.load_default(13)
    height = round(side * pictures.shape[2] / pictures.shape[3])
    line_height = 16
    cells = []
    for place, picture in enumerate(pictures):
        cell = Image.new("RGB", (side, height + text_lines * line_height + 4), _PAPER)
        cell.paste(to_pil(picture).resize((side, height), Image.Resampling.BICUBIC))
        ink = _INK if right is None else _RIGHT if right[place] else _WRONG
        pen = ImageDraw.Draw(cell)
        for row, line in enumerate(_wrapped(captions[place], side - 4, font)[:text_lines]):
            pen.text((2, height + 2 + row * line_height), line, fill=ink, font=font)
        cells.append(np.asarray(cell).transpose(2, 0, 1))
    return tile(np.stack(cells), columns=columns)


def to_pil(picture: Any) -> Image.Image:
    """A (3, H, W) uint8 picture as a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(as_array(picture).transpose(1, 2, 0)))
