"""Images with their clusters masked and the anchors marked, at a few thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from frugal.common.evaluation.pictures import Picture, as_array, gray_dropped, labeled_row

if TYPE_CHECKING:
    from frugal.cluster_masking.masking import ClusterMasking
    from frugal.common.randomness import NoiseSource
    from frugal.common.reduction.image import PatchView

_ANCHOR = (230, 30, 30)
_DISTANCES = (1.5, 1.0, 0.5)
"""From 1, of the thresholds shown, as shares of the own one's."""


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


def draw_thresholds(
    masking: ClusterMasking, view: PatchView, images: Any, *, noise: NoiseSource
) -> Picture:
    """Images above; below, what is left of them under a lower, the own and a higher threshold.

    Patches that go are hatched, anchors are framed in red.

    Args:
        masking: its threshold must be known.
        view: (B, ...) of the images as the model takes them.
        images: (B, 3, H, W) uint8, the same to be looked at.
        noise: of the anchors.

    Returns:
        (3, H*, W*) uint8, for ``SummaryWriter.add_image``.
    """
    assert masking.threshold is not None
    rows = [labeled_row("images", as_array(images))]
    for distance in _DISTANCES:
        threshold = max(1 - distance * (1 - masking.threshold), -1.0)
        mask = replace(masking, threshold=threshold).mask(view, noise=noise)
        left = gray_dropped(images, mask.stays, view.patch_size)
        share = float(mask.mask_ratio.mean())
        label = f"threshold {threshold:.3g}: {share:.0%} masked, anchors framed"
        rows.append(labeled_row(label, mark_patches(left, mask.anchors, view.patch_size)))
    return np.concatenate(rows, axis=1)
