"""The threshold that masks a target share of the patches on average, found by bisection.

Source: arXiv:2405.08815, section 3. The published code holds such a search but never calls it, so
that its runs took the target ratio for the threshold. Its search also changes the noise it works
on and need not end; this one looks at the same images and anchors in every step, and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from frugal.cluster_masking.masking import (
    ANCHORS,
    LEAST_PATCHES,
    ClusterMasking,
    draw_anchors,
    most_kept,
    num_anchors,
)
from frugal.cluster_masking.similarity import pixel_similarity
from frugal.common.errors import InputError

if TYPE_CHECKING:
    import logging

    from frugal.common.randomness import NoiseSource
    from frugal.common.reduction.image import PatchView

PRECISION = 1e-3
"""Difference from the target ratio at which a search ends."""
MOST_STEPS = 16


@dataclass(frozen=True)
class Found:
    """Where a search ended."""

    threshold: float
    mask_ratio: float
    """That it masks."""
    visited: tuple[tuple[float, float], ...]
    """Every threshold tried and the ratio that it masks, in order."""


def bisect(mask_ratio: Callable[[float], float], *, target: float) -> Found:
    """The first threshold visited whose ratio is the target, else the one that comes nearest.

    Args:
        mask_ratio: mean share of the patches that a threshold masks; must not grow with it.
        target: the share wanted.
    """
    low, high, threshold = 0.0, 1.0, 0.5
    visited: list[tuple[float, float]] = []
    for _ in range(MOST_STEPS):
        ratio = mask_ratio(threshold)
        visited.append((threshold, ratio))
        if abs(ratio - target) < PRECISION:
            break
        low, high = (low, threshold) if ratio < target else (threshold, high)
        threshold = (low + high) / 2
    best = min(visited, key=lambda visit: abs(visit[1] - target))
    return Found(*best, visited=tuple(visited))


def closest_anchor(patches: Tensor, anchor_noise: Tensor, *, anchor_ratio: float) -> Tensor:
    """The similarity of every patch to the anchor it resembles most: all that a threshold decides.

    Args:
        patches: (B, N, P) normalized pixels.
        anchor_noise: (B, N) uniform numbers.
        anchor_ratio: share of the patches that are anchors.

    Returns:
        (B, N) float32; minus infinity where a patch can be compared to none.
    """
    anchors = draw_anchors(anchor_noise, num_anchors(patches.shape[1], anchor_ratio))
    similarity = pixel_similarity(patches, anchors)  # (B, A, N)
    return similarity.nan_to_num(nan=-torch.inf).amax(1)


def num_kept(closest: Tensor, threshold: float, *, most: int) -> int:
    """Patches that all images together keep.

    Args:
        closest: (B, N) from :func:`closest_anchor`.
        threshold: what is more similar goes.
        most: patches that an image keeps at most.
    """
    masked = (closest > threshold).sum(1)  # (B,)
    return int((closest.shape[1] - masked).clamp(max=most).sum())


def search(
    masking: ClusterMasking,
    seen: Iterable[tuple[PatchView, NoiseSource]],
    *,
    gather: Callable[[Any], list[Any]],
    log: logging.Logger,
) -> Found:
    """See :meth:`.masking.ClusterMasking.prepared`.

    Counts are summed over the processes as integers, so that the threshold does not depend on how
    many they are.
    """
    target = masking.target_mask_ratio
    assert target is not None  # refused where there is no threshold either
    closest = torch.cat(
        [
            closest_anchor(
                view.normalized,
                noise.uniform(ANCHORS, view.num_patches),
                anchor_ratio=masking.anchor_ratio,
            )
            for view, noise in seen
        ]
    )  # (images of this process, N)
    num_patches = closest.shape[1]
    most = most_kept(num_patches, masking.min_mask_ratio)
    images = sum(gather(len(closest)))
    if images * num_patches < LEAST_PATCHES:
        raise InputError(
            f"only {images} of the first images of the run can be read, too few to search "
            "reduction.image.threshold with; look at the data, or give the threshold"
        )

    def mask_ratio(threshold: float) -> float:
        kept = sum(gather(num_kept(closest, threshold, most=most)))
        return 1 - kept / (images * num_patches)

    found = bisect(mask_ratio, target=target)
    _judge(found, masking, images, log)
    return found


def _judge(found: Found, masking: ClusterMasking, images: int, log: logging.Logger) -> None:
    """Tell what was found; refuse what lies too far from the target."""
    target = masking.target_mask_ratio or 0.0
    off = abs(found.mask_ratio - target)
    said = (
        f"threshold {found.threshold:.6g} masks {found.mask_ratio:.2%} of the patches of "
        f"{images:,} images"
    )
    if off > masking.tolerance:
        raise InputError(
            f"no reduction.image.threshold masks {target:.2%} of the patches on average: of those "
            f"tried {said}, and others are further off; choose another "
            "reduction.image.target_mask_ratio or anchor_ratio, or give a threshold"
        )
    if off >= PRECISION:
        log.warning("%s; no threshold comes nearer to %.2f %%", said, 100 * target)
    else:
        log.info("%s, found in %d steps", said, len(found.visited))
