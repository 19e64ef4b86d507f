"""Grid masking: one patch of every window of neighbors, so that no region vanishes.

Source: Li et al., "An Inverse Scaling Law for CLIP Training", arXiv:2305.07017, section 3, which
describes the idea in a sentence; no code was published. Windows at the border of a grid that does
not divide evenly are smaller and keep one patch too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch

from frugal.common.randomness import NoiseSource
from frugal.common.ranges import Range, check_ranges
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import PURPOSE

_Side = Annotated[int, Range(least=2, words="must be at least 2: one patch of every window stays")]


@dataclass(frozen=True, kw_only=True)
class GridMasking(ImageReduction):
    """Keep one patch of every square window, drawn uniformly; windows do not overlap."""

    window: _Side = 2
    """Side of a window in patches; 2 keeps a quarter of the image."""

    def __post_init__(self) -> None:
        check_ranges(self, "reduction.image")

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches:
        """One patch per window, windows row by row.

        Returns:
            Dense, (B, K), K = ceil(rows / window) * ceil(columns / window).
        """
        rows, columns = view.grid
        top = torch.arange(0, rows, self.window, device=view.device)[:, None]
        left = torch.arange(0, columns, self.window, device=view.device)
        heights = (rows - top).clamp(max=self.window)
        widths = (columns - left).clamp(max=self.window)
        sizes = heights * widths  # (windows down, windows across)
        draws = noise.uniform(PURPOSE, sizes.numel()).unflatten(1, sizes.shape)
        member = (draws * sizes).long()  # (B, windows down, windows across)
        row = top + member // widths
        column = left + member % widths
        return KeptPatches.dense((row * columns + column).flatten(1))  # (B, K)
