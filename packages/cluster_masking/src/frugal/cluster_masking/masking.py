"""Cluster masking: some random patches of an image go, and every patch that resembles one of them.

Source: Wei, Pan and Owens, "Efficient Vision-Language Pre-training by Cluster Masking",
arXiv:2405.08815, section 3. The published code fills images up with masked patches until all of a
batch have equally many, and lets every token attend to them (the tests compare with that code in
``tests/reference/reference_cluster_masking.py``). Here every image keeps its visible patches and
nothing else, in packed tokens: the class token then sees what it would see if the masked patches
were there and blocked, and what an image keeps does not depend on the other images of its batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from frugal.cluster_masking.clusters import (
    ANCHORS,
    CUT_OFF,
    ClusterMask,
    clusters_of,
    draw_anchors,
    most_kept,
    num_anchors,
)
from frugal.cluster_masking.pictures import draw_masks
from frugal.cluster_masking.similarity import embedding_similarity, mix_in, pixel_similarity
from frugal.cluster_masking.threshold_search import LEAST_PATCHES, closest_anchor, search
from frugal.common.errors import InputError
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import Count, OpenShare, Positive, Range, check_ranges
from frugal.common.reduction.image import Gather, ImageReduction, KeptPatches, PatchView

_DRAWN_DISTANCES = (1.5, 1.0, 0.5)
"""Distances from 1 of the thresholds that are drawn, as shares of that of the one in use."""

AnchorRatio = Annotated[
    float,
    Range(
        above=0, most=1,
        words="must be more than 0 and at most 1: without anchors nothing is masked",
    ),
]  # fmt: skip
Threshold = Annotated[
    float,
    Range(
        least=-1, below=1, words="must lie in [-1, 1): no two patches are more alike than 1",
        hint="leave it out to have it searched",
    ),
]  # fmt: skip
LeastRatio = Annotated[
    float,
    Range(
        least=0, below=1,
        words="must lie in [0, 1): it is the least share of the patches that is removed",
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClusterMasking(ImageReduction):
    """Keep what resembles none of some random patches, another number in every image."""

    anchor_ratio: AnchorRatio = 0.03
    """Share of the patches that clusters grow around."""
    threshold: Threshold | None = None
    """Similarity from which on a patch belongs to an anchor's cluster; without it the one that
    masks the target ratio is searched on the first images of the run."""
    target_mask_ratio: OpenShare | None = 0.5
    """Share of the patches that should go on average."""
    min_mask_ratio: LeastRatio = 0.3
    """Share of the patches that goes from every image, however little its clusters cover."""
    tolerance: Positive = 0.05
    """Largest difference from the target ratio; beyond it the search refuses, training warns."""
    search_images: Count = 4096
    """Images, over all processes, that the threshold is searched on."""
    use_embeddings: bool = False
    """Mix the similarity of patch embeddings in, with a weight that grows from 0 to 1 over the
    run."""

    calibrated: ClassVar[tuple[str, ...]] = ("threshold",)
    """Fields that a run fills in where they are None, and keeps with its recipe."""

    def __post_init__(self) -> None:
        check_ranges(self, "reduction.image")
        self._check_target()

    def _check_target(self) -> None:
        name, target = "reduction.image", self.target_mask_ratio
        if target is None and self.threshold is None:
            raise InputError(
                f"{name} has neither a threshold nor a target_mask_ratio to search one for; give "
                "one of them"
            )
        if target is None:
            return
        if target < self.min_mask_ratio:
            raise InputError(
                f"{name}.target_mask_ratio is {target}, less than {name}.min_mask_ratio = "
                f"{self.min_mask_ratio}, which goes in any case; raise the one or lower the other"
            )

    is_uneven: ClassVar[bool] = True

    @property
    def expected_mask_ratio(self) -> float:
        """The target ratio; of a threshold without one what goes in any case."""
        return self.min_mask_ratio if self.target_mask_ratio is None else self.target_mask_ratio

    @property
    def depends_on_progress(self) -> bool:
        """With embeddings, whose weight grows from 0 at the beginning of a run to 1 at its end."""
        return self.use_embeddings

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuse what cannot be done with as many patches.

        Raises:
            InputError: naming the setting.
        """
        name, num_patches = "reduction.image", math.prod(grid)
        if num_anchors(num_patches, self.anchor_ratio) == 0:
            raise InputError(
                f"{name}.anchor_ratio {self.anchor_ratio} draws no anchor from {num_patches} "
                "patches; choose a larger ratio"
            )
        kept = most_kept(num_patches, self.min_mask_ratio)
        if kept == 0:
            raise InputError(
                f"{name}.min_mask_ratio {self.min_mask_ratio} keeps none of {num_patches} patches; "
                "choose a smaller ratio, a larger image or a smaller patch"
            )
        least = 1 - kept / num_patches
        if self.target_mask_ratio is not None and self.target_mask_ratio < least - 1e-3:
            raise InputError(
                f"{name}.target_mask_ratio {self.target_mask_ratio} cannot be reached: with "
                f"{name}.min_mask_ratio = {self.min_mask_ratio} an image keeps at most {kept} of "
                f"its {num_patches} patches, so that {least:.4g} goes in any case"
            )
        if self.threshold is None and self.search_images * num_patches < LEAST_PATCHES:
            raise InputError(
                f"{name}.search_images is {self.search_images}, too few to search a threshold "
                f"with: {LEAST_PATCHES // num_patches + 1} images of {num_patches} patches are the "
                "least"
            )

    def mask(self, view: PatchView, *, noise: NoiseSource) -> ClusterMask:
        """The clusters of a batch.

        Raises:
            InputError: if the threshold is not known.
        """
        if self.threshold is None:
            raise InputError(
                "reduction.image.threshold is not known, because it is searched when a run starts; "
                "give the one that its recipe.json holds"
            )
        anchors = self.anchors(view, noise=noise)
        return clusters_of(
            self.similarity(view, anchors),
            anchors,
            noise.uniform(CUT_OFF, view.num_patches),
            threshold=self.threshold,
            most=most_kept(view.num_patches, self.min_mask_ratio),
        )

    def anchors(self, view: PatchView, *, noise: NoiseSource) -> Tensor:
        """The (B, A) numbers of the patches that clusters grow around."""
        count = num_anchors(view.num_patches, self.anchor_ratio)
        return draw_anchors(noise.uniform(ANCHORS, view.num_patches), count)

    def similarity(self, view: PatchView, anchors: Tensor, *, mixed: bool = True) -> Tensor:
        """(B, A, N) of every patch to every anchor.

        Args:
            view: of the images.
            anchors: (B, A) patch numbers.
            mixed: whether embeddings have a part in it, where that is wanted.

        Raises:
            InputError: if the view has no embeddings that are wanted.
        """
        similarity = self.pixel_similarity(view, anchors)
        if not (mixed and self.use_embeddings):
            return similarity
        if view.embed is None or view.progress is None:
            raise InputError(
                "reduction.image.use_embeddings needs the embeddings of all patches, which "
                "only training has; leave it out here"
            )
        return mix_in(similarity, embedding_similarity(view.embed(), anchors), view.progress)

    def pixel_similarity(self, view: PatchView, anchors: Tensor) -> Tensor:
        """(B, A, N) of the pixels of every patch to those of every anchor."""
        return pixel_similarity(view.normalized, anchors)

    def keep(self, view: PatchView, *, noise: NoiseSource) -> KeptPatches:
        """The visible patches of every image, as far as the minimum mask ratio lets them stay.

        Returns:
            Packed, patches of an image by ascending number; an image may keep none.
        """
        with torch.no_grad():
            return KeptPatches.where(self.mask(view, noise=noise).stays)

    @property
    def calibration_images(self) -> int:
        """Images, over all processes, that :meth:`calibrate` wants before a run trains."""
        return 0 if self.threshold is not None else self.search_images

    def calibrate(
        self,
        batches: Iterable[tuple[PatchView, NoiseSource]],
        *,
        gather: Gather,
        log: logging.Logger,
    ) -> ClusterMasking:
        """The same with the threshold that masks the target ratio of some images on average.

        Every process calls this and gets the same. A run begins with the similarity of pixels,
        so that embeddings have no part in it.

        Args:
            batches: images of this process, with the noise that they have in training.
            gather: of the processes.
            log: told what was found.

        Raises:
            InputError: if no threshold masks the target ratio, give or take the tolerance.
        """
        if self.threshold is not None:
            return self
        assert self.target_mask_ratio is not None  # refused where there is no threshold either
        result = search(
            (
                closest_anchor(self.similarity(view, self.anchors(view, noise=noise), mixed=False))
                for view, noise in batches
            ),
            target=self.target_mask_ratio,
            tolerance=self.tolerance,
            min_mask_ratio=self.min_mask_ratio,
            gather=gather,
            log=log,
        )
        return replace(self, threshold=result.threshold)

    def off_target(self, means: dict[str, float]) -> str | None:
        """What there is to say of the means of some steps: that the mask ratio has drifted."""
        ratio = means.get("mask_ratio")
        if ratio is None or self.target_mask_ratio is None:
            return None
        if abs(ratio - self.target_mask_ratio) <= self.tolerance:
            return None
        return (
            f"{ratio:.1%} of the patches are masked where {self.target_mask_ratio:.1%} were meant "
            f"(reduction.image.threshold {self.threshold}, tolerance {self.tolerance:.1%})"
        )

    def draw(self, view: PatchView, images: Tensor, *, noise: NoiseSource) -> np.ndarray:
        """Images, and what stays of them under a lower, the searched and a higher threshold.

        Args:
            view: of the images as the model takes them.
            images: (B, 3, H, W) uint8, the same to be looked at.
            noise: as in :meth:`keep`.
        """
        assert self.threshold is not None
        masks = []
        for distance in _DRAWN_DISTANCES:
            threshold = max(1 - distance * (1 - self.threshold), -1.0)
            mask = replace(self, threshold=threshold).mask(view, noise=noise)
            share = float(mask.mask_ratio.mean())
            label = f"threshold {threshold:.3g}: {share:.0%} masked, anchors framed"
            masks.append((label, mask.stays, mask.anchors))
        return draw_masks(images, masks, view.patch_size)
