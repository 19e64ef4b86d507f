"""Block masking: one contiguous rectangle of patches stays.

Source: Li et al., "An Inverse Scaling Law for CLIP Training", arXiv:2305.07017, section 3, which
describes the idea in a sentence; no code was published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import ShareBelowOne
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import PURPOSE


@dataclass(frozen=True, kw_only=True)
class BlockMasking(ImageReduction):
    """Keep one rectangle of the shape of the image at a place drawn uniformly."""

    mask_ratio: ShareBelowOne = 0.75
    """Fraction of the patches that goes, up to the rounding of the rectangle's sides."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise InputError(
                f"mask ratio {self.mask_ratio} must lie in [0, 1): it is the fraction of the "
                "patches that is removed"
            )

    def sides(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the rectangle: sqrt(1 - mask_ratio) of the grid's, rounded."""
        share = math.sqrt(1 - self.mask_ratio)
        rows, columns = (max(1, round(side * share)) for side in grid)
        return rows, columns

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches | None:
        """The patches of the rectangle, row by row.

        Returns:
            Dense, (B, K); None where the ratio is 0.
        """
        if self.mask_ratio == 0:
            return None
        sides = self.sides(view.grid)
        draws = noise.uniform(PURPOSE, 2)  # (B, 2)
        places = [whole - side + 1 for whole, side in zip(view.grid, sides, strict=True)]
        row, column = (
            (draws[:, axis, None] * places[axis]).long()
            + torch.arange(sides[axis], device=view.device)
            for axis in (0, 1)
        )  # (B, rows of the rectangle), (B, its columns)
        index = row[:, :, None] * view.grid[1] + column[:, None, :]
        return KeptPatches.dense(index.flatten(1))  # (B, K)
