"""Clusters of patches around random anchors: which patches of every image are masked.

Source: Wei, Pan and Owens, "Efficient Vision-Language Pre-training by Cluster Masking",
arXiv:2405.08815, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ANCHORS = "cluster anchors"
"""Name of the noise that draws the anchors."""
CUT_OFF = "cluster cut-off"
"""Name of the noise that decides which patches stay where an image has too many visible ones."""
Overflow = Literal["random", "index"]


@dataclass(frozen=True)
class ClusterMask:
    """Which patches of every image are masked, and which stay."""

    anchors: Tensor
    """(B, A) patch numbers, by ascending noise."""
    hits: Tensor
    """(B, N) int64: how many anchors a patch resembles."""
    order: Tensor
    """(B, N) patch numbers, visible ones first; an image keeps the beginning of its row."""
    most_kept: int
    """Patches that an image keeps at most, however many are visible."""

    @property
    def masked(self) -> Tensor:
        """(B, N) bool: patches that resemble an anchor."""
        return self.hits > 0

    @property
    def visible_counts(self) -> Tensor:
        """(B,) int64: patches that resemble no anchor."""
        return (self.hits == 0).sum(1)

    @property
    def counts(self) -> Tensor:
        """(B,) int64: visible patches that stay."""
        return self.visible_counts.clamp(max=self.most_kept)

    @property
    def mask_ratio(self) -> Tensor:
        """(B,) float32: share of the patches that goes."""
        return 1 - self.counts / self.hits.shape[1]

    @property
    def stays(self) -> Tensor:
        """(B, N) bool: visible patches that stay."""
        places = torch.arange(self.hits.shape[1], device=self.hits.device)
        first = places < self.counts.unsqueeze(1)  # (B, N) by place in the order
        return first.new_zeros(first.shape).scatter(1, self.order, first)


def num_anchors(num_patches: int, anchor_ratio: float) -> int:
    """Anchors of one image; the others are truncated in double precision, as published."""
    return num_patches - int(num_patches * (1 - anchor_ratio))


def most_kept(num_patches: int, min_mask_ratio: float) -> int:
    """Patches that an image keeps at most, truncated likewise."""
    return int(num_patches * (1 - min_mask_ratio))


def draw_anchors(noise: Tensor, count: int) -> Tensor:
    """The patches of the largest noise: (B, N) to (B, count) patch numbers by ascending noise."""
    return noise.argsort(dim=1, stable=True)[:, noise.shape[1] - count :]


def clusters_of(
    similarity: Tensor,
    anchors: Tensor,
    cut_off_noise: Tensor,
    *,
    threshold: float,
    most: int,
    overflow: Overflow = "random",
) -> ClusterMask:
    """Mask what resembles an anchor by more than a threshold.

    An anchor resembles itself, unless it is constant: such a patch is never masked.

    Args:
        similarity: (B, A, N) of every patch to every anchor.
        anchors: (B, A) patch numbers.
        cut_off_noise: (B, N) uniform numbers.
        threshold: on the similarity.
        most: patches that an image keeps at most.
        overflow: which visible patches go if too few are masked. random: those of the largest
            cut-off noise. index: the last, at the bottom of the image, as published.
    """
    hits = (similarity > threshold).sum(1)  # (B, N); NaN exceeds nothing
    # double precision: a float32 just below one would not survive the one that is added to it
    key = cut_off_noise.double()
    visible_key = key if overflow == "random" else torch.zeros_like(key)
    return ClusterMask(
        anchors=anchors,
        hits=hits,
        order=torch.where(hits > 0, 1 + key, visible_key).argsort(dim=1, stable=True),
        most_kept=most,
    )
