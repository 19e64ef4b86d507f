"""Cluster masking: some random patches of an image go, and every patch that resembles one of them.

Source: Wei, Pan and Owens, "Efficient Vision-Language Pre-training by Cluster Masking",
arXiv:2405.08815, section 3. The published code fills images up with masked patches until all of a
batch have equally many, and lets every token attend to them; see
:mod:`frugal.cluster_masking.published`. Here every image keeps its own visible patches and nothing
else, in packed tokens: the class token then sees what it would see if the masked patches were
there and blocked, and what an image keeps does not depend on the other images of its batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from frugal.cluster_masking.pictures import draw_masks
from frugal.common.errors import InputError
from frugal.common.ranges import Count, OpenShare, Positive, Range, check_ranges
from frugal.common.reduction.image import Kept, PatchView

if TYPE_CHECKING:
    import logging

    import numpy as np
    from torch import Tensor

    from frugal.common.randomness import NoiseSource

ANCHORS = "cluster anchors"
"""Name of the noise that draws the anchors."""
CUT_OFF = "cluster cut-off"
"""Name of the noise that decides which patches stay where an image has too many visible ones."""
_DRAWN_DISTANCES = (1.5, 1.0, 0.5)
"""From 1, of the thresholds that are drawn, as shares of the own one's."""
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
        import torch

        places = torch.arange(self.hits.shape[1], device=self.hits.device)
        first = places < self.counts.unsqueeze(1)  # (B, N) by place in the order
        return first.new_zeros(first.shape).scatter(1, self.order, first)

    @property
    def ids_keep(self) -> Tensor:
        """(B, K) patch numbers that the published layout keeps: visible ones, then masked ones.

        K is the largest of ``counts``, so that it takes a whole batch to tell. The share that goes
        is ``mask_ratio`` all the same: filling up changes how patches lie, not which are visible.
        """
        return self.order[:, : int(self.counts.max())]


def num_anchors(num_patches: int, anchor_ratio: float) -> int:
    """Anchors of one image; the others are truncated in double precision, as published."""
    return num_patches - int(num_patches * (1 - anchor_ratio))


def most_kept(num_patches: int, min_mask_ratio: float) -> int:
    """Patches that an image keeps at most, truncated likewise."""
    return int(num_patches * (1 - min_mask_ratio))


def draw_anchors(noise: Tensor, count: int) -> Tensor:
    """The patches of the largest noise: (B, N) to (B, count) patch numbers by ascending noise."""
    return noise.argsort(dim=1, stable=True)[:, noise.shape[1] - count :]


def cluster_mask(
    patches: Tensor,
    *,
    anchor_noise: Tensor,
    cut_off_noise: Tensor,
    anchor_ratio: float,
    threshold: float,
    min_mask_ratio: float,
    overflow: Overflow = "random",
    embeddings: Tensor | None = None,
    mix: float | Tensor = 0.0,
    centered: bool = True,
) -> ClusterMask:
    """Mask every patch that resembles an anchor by more than the threshold.

    An anchor resembles itself, unless it is constant: such a patch is never masked.

    Args:
        patches: (B, N, P) normalized pixels.
        anchor_noise: (B, N) uniform numbers.
        cut_off_noise: (B, N) uniform numbers.
        anchor_ratio: share of the patches that are anchors.
        threshold: on the similarity, from -1 to 1.
        min_mask_ratio: share of the patches that goes in any case.
        overflow: which visible patches go if too few are masked. random: those of the largest
            cut-off noise. index: the last, at the bottom of the image, as published.
        embeddings: (B, N, D) of every patch, to be mixed in.
        mix: weight of their similarity, from 0 to 1, for all images or (B,) for each.
        centered: subtract the mean of every patch's pixels.
    """
    import torch

    from frugal.cluster_masking.similarity import embedding_similarity, pixel_similarity

    anchors = draw_anchors(anchor_noise, num_anchors(patches.shape[1], anchor_ratio))
    similarity = pixel_similarity(patches, anchors, centered=centered)  # (B, A, N)
    if embeddings is not None:
        weight = torch.as_tensor(mix, device=similarity.device).view(-1, 1, 1)
        similarity = torch.lerp(
            similarity, embedding_similarity(embeddings, anchors), weight.to(similarity)
        )
    hits = (similarity > threshold).sum(1)  # (B, N); NaN exceeds nothing
    # double precision: a float32 just below one would not survive the one that is added to it
    key = cut_off_noise.double()
    visible_key = key if overflow == "random" else torch.zeros_like(key)
    return ClusterMask(
        anchors=anchors,
        hits=hits,
        order=torch.where(hits > 0, 1 + key, visible_key).argsort(dim=1, stable=True),
        most_kept=most_kept(patches.shape[1], min_mask_ratio),
    )


_AnchorRatio = Annotated[
    float,
    Range(
        above=0, most=1,
        words="must be more than 0 and at most 1: without anchors nothing is masked",
    ),
]  # fmt: skip
_Threshold = Annotated[
    float,
    Range(
        least=-1, below=1, words="must lie in [-1, 1): no two patches are more alike than 1",
        hint="leave it out to have it searched",
    ),
]  # fmt: skip
_LeastRatio = Annotated[
    float,
    Range(
        least=0, below=1,
        words="must lie in [0, 1): it is the least share of the patches that is removed",
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClusterMasking:
    """Keep what resembles none of some random patches, another number in every image."""

    anchor_ratio: _AnchorRatio = 0.03
    """Share of the patches that clusters grow around."""
    threshold: _Threshold | None = None
    """Similarity from which on a patch belongs to an anchor's cluster; without it the one that
    masks the target ratio is searched on the first images of the run."""
    target_mask_ratio: OpenShare | None = 0.5
    """Share of the patches that should go on average."""
    min_mask_ratio: _LeastRatio = 0.3
    """Share of the patches that goes from every image, however little its clusters cover."""
    tolerance: Positive = 0.05
    """Largest difference from the target ratio; beyond it the search refuses, training warns."""
    search_images: Count = 4096
    """Images, over all processes, that the threshold is searched on."""
    use_embeddings: bool = False
    """Mix the similarity of patch embeddings in, with a weight that grows from 0 to 1 over the
    run."""

    measured: ClassVar[tuple[str, ...]] = ("threshold",)
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

    def check(self, recipe: Any) -> None:
        """Refuse a recipe whose images would have no anchor or keep nothing."""
        tower = getattr(recipe.model, "image", None)
        if tower is not None:
            self.check_patches(tower.num_patches)

    def check_patches(self, num_patches: int) -> None:
        """Refuse what cannot be done with this number of patches.

        Raises:
            InputError: naming the setting.
        """
        name = "reduction.image"
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
        more: dict[str, Any] = {}
        if self.use_embeddings:
            if view.embed is None or view.progress is None:
                raise InputError(
                    "reduction.image.use_embeddings needs the embeddings of all patches, which "
                    "only training has; leave it out here"
                )
            more = {"embeddings": view.embed(), "mix": view.progress}
        return cluster_mask(
            view.normalized,
            anchor_noise=noise.uniform(ANCHORS, view.num_patches),
            cut_off_noise=noise.uniform(CUT_OFF, view.num_patches),
            anchor_ratio=self.anchor_ratio,
            threshold=self.threshold,
            min_mask_ratio=self.min_mask_ratio,
            **more,
        )

    def keep(self, view: PatchView, *, noise: NoiseSource) -> Kept:
        """The visible patches of every image, as far as the minimum mask ratio lets them stay.

        Returns:
            Packed, patches of an image by ascending number; an image may keep none.
        """
        import torch

        with torch.no_grad():
            return Kept.where(self.mask(view, noise=noise).stays)

    @property
    def images_to_see(self) -> int:
        """Images, over all processes, that :meth:`prepared` wants before a run trains."""
        return 0 if self.threshold is not None else self.search_images

    def prepared(
        self,
        seen: Iterable[tuple[PatchView, NoiseSource]],
        *,
        gather: Callable[[Any], list[Any]],
        log: logging.Logger,
    ) -> ClusterMasking:
        """The same with the threshold that masks the target ratio of some images on average.

        Every process calls this and gets the same. A run begins with the similarity of pixels,
        so that embeddings have no part in it.

        Args:
            seen: images of this process, with the noise that they have in training.
            gather: collects one JSON-ready value of every process, in rank order, on all of them.
            log: told what was found.

        Raises:
            InputError: if no threshold masks the target ratio, give or take the tolerance.
        """
        from frugal.cluster_masking.threshold_search import search

        if self.threshold is not None:
            return self
        found = search(self, seen, gather=gather, log=log)
        return dataclasses.replace(self, threshold=found.threshold)

    def remark(self, means: dict[str, float]) -> str | None:
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
        """Images, and what is left of them under a lower, the own and a higher threshold.

        Args:
            view: of the images as the model takes them.
            images: (B, 3, H, W) uint8, the same to be looked at.
            noise: as in :meth:`keep`.
        """
        assert self.threshold is not None
        masks = []
        for distance in _DRAWN_DISTANCES:
            threshold = max(1 - distance * (1 - self.threshold), -1.0)
            mask = dataclasses.replace(self, threshold=threshold).mask(view, noise=noise)
            share = float(mask.mask_ratio.mean())
            label = f"threshold {threshold:.3g}: {share:.0%} masked, anchors framed"
            masks.append((label, mask.stays, mask.anchors))
        return draw_masks(images, masks, view.patch_size)


LEAST_PATCHES = 1000
"""That a search needs: one patch more or less must not move the mean by the search's precision."""
