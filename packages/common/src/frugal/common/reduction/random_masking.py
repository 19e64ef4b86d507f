"""Uniform random masking: FLIP's, CLIPA's and MAE's, and the baseline of every other.

Source: Li et al., "Scaling Language-Image Pre-training via Masking", arXiv:2212.00794, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import override

from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import ShareBelowOne
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView

PURPOSE = "image mask"
"""Name of the noise that decides which patches stay."""


@dataclass(frozen=True, kw_only=True)
class RandomMasking(ImageReduction):
    """Keep a uniform random subset of the patches, equally many in every image."""

    mask_ratio: ShareBelowOne = 0.5
    """Fraction of the patches that goes."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask_ratio < 1:
            raise InputError(
                f"mask ratio {self.mask_ratio} must lie in [0, 1): it is the fraction of the "
                "patches that is removed"
            )

    @override
    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse images that would keep nothing."""
        self.num_kept(math.prod(grid))

    def num_kept(self, num_patches: int) -> int:
        """Patches that stay: truncated in double precision, as the published runs did.

        Raises:
            InputError: if nothing would stay.
        """
        kept = int(num_patches * (1 - self.mask_ratio))
        if kept == 0:
            raise InputError(
                f"mask ratio {self.mask_ratio} keeps none of {num_patches} patches; choose a "
                "smaller ratio, a larger image or a smaller patch"
            )
        return kept

    @override
    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches | None:
        """The patches with the smallest noise, smallest first.

        Returns:
            Dense, (B, K); None where the ratio is 0.
        """
        if self.mask_ratio == 0:
            return None
        count = self.num_kept(view.num_patches)
        order = noise.uniform(PURPOSE, view.num_patches).argsort(dim=1, stable=True)  # (B, N)
        return KeptPatches.dense(order[:, :count])
