"""The threshold that masks a target share of the patches on average, found by bisection.

Source: arXiv:2405.08815, section 3. The published code holds such a search but never calls it, so
that its runs took the target ratio for the threshold. Its search also changes the noise it works
on and need not end; this one looks at the same images and anchors in every step, and ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frugal.cluster_masking.clusters import most_kept
from frugal.common.errors import InputError

LEAST_PATCHES = 1000
"""That a search needs: one patch more or less must not move the mean by the search's precision."""
PRECISION = 1e-3
"""Difference from the target ratio at which a search ends."""
MOST_STEPS = 16


@dataclass(frozen=True)
class SearchResult:
    """Where a search ended."""

    threshold: float
    mask_ratio: float
    """Mean share of the patches that this threshold masks."""
    visited: tuple[tuple[float, float], ...]
    """Every threshold tried and the ratio that it masks, in order."""


def bisect(mask_ratio: Callable[[float], float], *, target: float) -> SearchResult:
    """The first threshold visited whose ratio is the target, else the one that comes nearest.

    Args:
        mask_ratio: mean share of the patches that a threshold masks; must not grow with it.
        target: the share to be masked.
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
    return SearchResult(*best, visited=tuple(visited))


def closest_anchor(similarity: Tensor) -> Tensor:
    """The similarity of every patch to the anchor it resembles most: all that a threshold decides.

    Args:
        similarity: (B, A, N) of patches to anchors.

    Returns:
        (B, N) float32; minus infinity where a patch can be compared to none.
    """
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
    seen: Iterable[Tensor],
    *,
    target: float,
    tolerance: float,
    min_mask_ratio: float,
    gather: Callable[[Any], list[Any]],
    log: logging.Logger,
) -> SearchResult:
    """The threshold that masks a target share of the patches of some images.

    Counts are summed over the processes as integers, so that the threshold does not depend on how
    many they are.

    Args:
        seen: (B, N) from :func:`closest_anchor` of images of this process.
        target: share of the patches to be masked on average.
        tolerance: largest difference from it.
        min_mask_ratio: share of the patches that goes in any case.
        gather: collects one JSON-ready value of every process, in rank order, on all of them.
        log: told where the search ended.

    Raises:
        InputError: if there are too few images, or no threshold comes near enough to the target.
    """
    closest = torch.cat(list(seen))  # (images of this process, N)
    num_patches = closest.shape[1]
    most = most_kept(num_patches, min_mask_ratio)
    num_images = sum(gather(len(closest)))
    if num_images * num_patches < LEAST_PATCHES:
        raise InputError(
            f"only {num_images} of the first images of the run can be read, too few to search "
            "reduction.image.threshold with; look at the data, or give the threshold"
        )

    def mask_ratio(threshold: float) -> float:
        kept = sum(gather(num_kept(closest, threshold, most=most)))
        return 1 - kept / (num_images * num_patches)

    result = bisect(mask_ratio, target=target)
    sentence = (
        f"threshold {result.threshold:.6g} masks {result.mask_ratio:.2%} of the patches of "
        f"{num_images:,} images"
    )
    distance = abs(result.mask_ratio - target)
    if distance > tolerance:
        raise InputError(
            f"no reduction.image.threshold masks {target:.2%} of the patches on average: of those "
            f"tried {sentence}, and others are further off; choose another "
            "reduction.image.target_mask_ratio or anchor_ratio, or give a threshold"
        )
    if distance >= PRECISION:
        log.warning("%s; no threshold comes nearer to %.2f %%", sentence, 100 * target)
    else:
        log.info("%s, found in %d steps", sentence, len(result.visited))
    return result
