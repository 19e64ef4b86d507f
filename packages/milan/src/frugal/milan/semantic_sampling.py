"""Patches that a teacher looks at are seen; which, is drawn.

Source: Hou et al., "MILAN: Masked Image Pretraining on Language Assisted Representation",
arXiv:2208.06049, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from frugal.common.randomness import NoiseSource
from frugal.common.ranges import ShareBelowOne
from frugal.common.reduction.image import ImageReduction, KeptPatches, PatchView
from frugal.common.reduction.random_masking import PURPOSE, RandomMasking

_SMALLEST_WAIT = 2.0**-25
"""Below the least positive wait that noise of 24 bits makes: a noise of 0 counts as half a step."""


@dataclass(frozen=True, kw_only=True)
class SemanticSampling(ImageReduction):
    """Draw the patches that stay one by one, each in proportion to its importance."""

    mask_ratio: ShareBelowOne = 0.75
    """Fraction of the patches that goes."""

    def __post_init__(self) -> None:
        RandomMasking(mask_ratio=self.mask_ratio)  # the same fractions are possible

    needs_importance: ClassVar[bool] = True

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse a recipe whose images would keep nothing."""
        RandomMasking(mask_ratio=self.mask_ratio).check_grid(grid)

    def num_kept(self, num_patches: int) -> int:
        """Patches that stay, as :meth:`RandomMasking.num_kept` counts them."""
        return RandomMasking(mask_ratio=self.mask_ratio).num_kept(num_patches)

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches | None:
        """The patches that are drawn first, in the order of the draws.

        Returns:
            Dense, (B, K); None where the ratio is 0.
        """
        assert view.importance is not None, "a recipe whose objective knows none is refused"
        if self.mask_ratio == 0:
            return None
        order = draw_order(view.importance, noise.uniform(PURPOSE, view.num_patches))
        return KeptPatches.dense(order[:, : self.num_kept(view.num_patches)])


def draw_order(importance: Tensor, noise: Tensor) -> Tensor:
    """The order in which patches are drawn without replacement, in proportion to importance.

    Who waits an exponential time of rate w comes in this order (Plackett and Luce; the same as
    log w plus Gumbel noise, largest first). Nothing is read on the host.

    Args:
        importance: (B, N) not negative, of any sum; patches of importance 0 come last.
        noise: (B, N) uniform in [0, 1).

    Returns:
        (B, N) int64.
    """
    wait = (-noise).log1p().neg().clamp(min=_SMALLEST_WAIT)  # Exp(1)
    return (wait.log() - importance.float().log()).argsort(dim=1, stable=True)
