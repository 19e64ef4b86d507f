"""Images with their clusters masked and the anchors marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from frugal.common.evaluation.pictures import Picture, as_array, gray_dropped, labeled_row

_ANCHOR = (230, 30, 30)


def mark_patches(images: Any, patches: Any, patch_size: int) -> Picture:
    """The images with a frame inside of some patches.

    Args:
        images: (B, 3, H, W) uint8.
        patches: (B, A) patch numbers, row by row.
        patch_size: side of a patch in pixels.

    Returns:
        (B, 3, H, W) uint8.
    """
    marked = as_array(images).copy()
    columns = marked.shape[3] // patch_size
    width = max(1, patch_size // 12)
    frame = np.ones((patch_size, patch_size), dtype=bool)
    frame[width:-width, width:-width] = False
    for picture, numbers in zip(marked, as_array(patches), strict=True):
        for number in numbers:
            top, left = (int(place) * patch_size for place in divmod(number, columns))
            patch = picture[:, top : top + patch_size, left : left + patch_size]
            patch[:, frame] = np.array(_ANCHOR, dtype=np.uint8)[:, None]
    return marked


def draw_masks(images: Any, masks: Sequence[tuple[str, Any, Any]], patch_size: int) -> Picture:
    """Images above; below, what each of some masks leaves of them.

    Patches that go are hatched, anchors are framed in red.

    Args:
        images: (B, 3, H, W) uint8.
        masks: of each its label, (B, N) bool, True where a patch stays, and (B, A) anchors.
        patch_size: side of a patch in pixels.

    Returns:
        (3, H*, W*) uint8, for ``SummaryWriter.add_image``.
    """
    rows = [labeled_row("images", as_array(images))]
    for label, stays, anchors in masks:
        visible = gray_dropped(images, stays, patch_size)
        rows.append(labeled_row(label, mark_patches(visible, anchors, patch_size)))
    return np.concatenate(rows, axis=1)
