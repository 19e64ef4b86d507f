"""CLIP-PGS: clusters grow around patches that lie on no edge, so that objects keep their outlines.

Source: "Seeing What Matters: Empowering CLIP with Patch Generation-to-Selection" (CVPR 2025,
arXiv:2503.17080). Its released code computes something else than the paper says: edges are found in
patches whose mean was just removed, which leaves rounding noise; the patches with the *strongest*
edges become the seeds; and the "optimal transport" that is added to similarities does not converge.
Each of these is here both as it is meant and, by the value ``published``, as it is computed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from frugal.cluster_masking.clusters import ANCHORS, num_anchors
from frugal.cluster_masking.masking import AnchorRatio, ClusterMasking, LeastRatio, Threshold
from frugal.common.randomness import NoiseSource
from frugal.common.ranges import NotNegative, OpenShare, check_choices
from frugal.common.reduction.image import PatchView

Seeds = Literal["random", "off_edges", "published"]
Border = Literal["replicate", "zero"]
Transport = Literal["none", "sinkhorn", "published"]
_EPSILON = 1e-6
_ROUNDS, _TOLERANCE, _DAMPING = 50, 1e-3, 1e-3
"""Of the normalization of similarities: most rounds, where it ends, and what the published code
adds to every sum that it divides by."""
PUBLISHED_WEIGHT = 1e6
"""Of the edge scores in the published draw of seeds."""


@torch.no_grad()
def edge_scores(brightness: Tensor, *, border: Border = "replicate") -> Tensor:
    """How strong the edge is that passes through a patch, from 0 to 1 in every image.

    Magnitude of the Sobel gradients of the patches' brightness.

    Args:
        brightness: (B, rows, columns), one number per patch.
        border: what lies outside. With zero, as published, patches at the border of a bright image
            seem to be edges.

    Returns:
        (B, N) float32, patches row by row.
    """
    mode = "replicate" if border == "replicate" else "constant"
    around = pad(brightness.float().unsqueeze(1), (1, 1, 1, 1), mode=mode).squeeze(1)
    right, left = around[:, :, 2:], around[:, :, :-2]
    across = right - left  # (B, rows + 2, columns)
    across = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    below, above = around[:, 2:], around[:, :-2]
    down = below - above  # (B, rows, columns + 2)
    down = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    strength = torch.hypot(across, down).flatten(1)
    least, most = strength.aminmax(dim=1, keepdim=True)
    return (strength - least) / (most - least + _EPSILON)


def centered_brightness(patches: Tensor) -> Tensor:
    """Mean of every patch after it was normalized by itself: rounding noise, as published.

    Args:
        patches: (B, N, P) normalized pixels.

    Returns:
        (B, N) float32.
    """
    spread, center = torch.std_mean(patches.float(), dim=2, keepdim=True)
    return ((patches - center) / (spread + _EPSILON)).mean(2)


def draw_seeds(
    noise: Tensor, count: int, *, seeds: Seeds, edges: Tensor | None = None, weight: float
) -> Tensor:
    """The patches that clusters grow around.

    Args:
        noise: (B, N) uniform numbers.
        count: of the seeds of an image.
        seeds: random: those of the largest noise, as cluster masking has it. off_edges: of the
            largest noise + weight * (1 - edge). published: of the largest noise + 1e6 * edge.
        edges: (B, N) from :func:`edge_scores`; None where ``seeds`` is random.
        weight: of the edges against the noise; 1e6 leaves the noise to ties.

    Returns:
        (B, count) patch numbers by ascending sum.
    """
    key = noise.double()  # float32 would lose the noise beside a large weight
    if seeds != "random":
        assert edges is not None
        away = PUBLISHED_WEIGHT * edges if seeds == "published" else weight * (1 - edges)
        key = key + away.double()
    return key.argsort(dim=1, stable=True)[:, noise.shape[1] - count :]


@torch.no_grad()
def transported(similarity: Tensor, kind: Transport) -> Tensor:
    """What is added to the similarity of all pairs of patches.

    Args:
        similarity: (B, N, N) float32, without NaN.
        kind: sinkhorn: its positive part, with rows and columns scaled in turn until all sums are
            1. published: itself, divided by sums of rows and columns that were taken at once, which
            leaps between two states and depends on rounding.

    Returns:
        (B, N, N) float32.
    """
    if kind == "none":
        return torch.zeros_like(similarity)
    matrix = similarity.clamp(min=0) if kind == "sinkhorn" else similarity
    for _ in range(_ROUNDS):
        down, across = matrix.sum(1, keepdim=True), matrix.sum(2, keepdim=True)
        sums = torch.cat((down.flatten(1), across.flatten(1)), dim=1)
        # an image that is done stays as it is: to ask whether all are would stop a GPU
        done = ((sums - 1).abs().amax(1) <= _TOLERANCE)[:, None, None]
        if kind == "sinkhorn":
            scaled = matrix / across.clamp(min=_EPSILON)
            scaled = scaled / scaled.sum(1, keepdim=True).clamp(min=_EPSILON)
        else:
            scaled = matrix / (down + _DAMPING) / (across + _DAMPING)
        matrix = torch.where(done, matrix, scaled)
    return matrix


@dataclass(frozen=True, kw_only=True)
class PgsMasking(ClusterMasking):
    """Keep what resembles none of some patches that lie on no edge, another number in every image.

    Where the published code fills images up with masked patches until all of a batch have equally
    many, every image keeps its visible patches, as :class:`ClusterMasking` has it.
    """

    anchor_ratio: AnchorRatio = 0.05
    """Share of the patches that clusters grow around."""
    threshold: Threshold | None = 0.5
    """Similarity from which on a patch belongs to an anchor's cluster; None searches the one that
    masks the target ratio on the first images of the run."""
    target_mask_ratio: OpenShare | None = None
    """Share of the patches that should go on average."""
    min_mask_ratio: LeastRatio = 0.5
    """Share of the patches that goes from every image; the number in the names of the models."""
    seeds: Seeds = "off_edges"
    """Which patches clusters grow around. off_edges: those of the weakest edges. random: any, as in
    cluster masking. published: those of the strongest edges, found in rounding noise."""
    edge_weight: NotNegative = 1e6
    """Of edges against the noise that seeds are drawn with; with the default the noise decides
    nothing, and an image has the same seeds in every epoch."""
    edge_border: Border = "replicate"
    """What lies outside of an image where edges are looked for; zero is as published."""
    protect_above: OpenShare | None = None
    """Strength of an edge, between 0 (none) and 1 (the strongest of the image), from which on a
    patch is never masked."""
    transport: Transport = "none"
    """What is added to similarities. sinkhorn: they themselves, their rows and columns scaled until
    all sums are 1. published: what the released code computes, which does not converge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "reduction.image")

    @override
    def anchors(self, view: PatchView, *, noise: NoiseSource) -> Tensor:
        """The (B, A) numbers of the patches that clusters grow around."""
        return draw_seeds(
            noise.uniform(ANCHORS, view.num_patches),
            num_anchors(view.num_patches, self.anchor_ratio),
            seeds=self.seeds,
            edges=None if self.seeds == "random" else self.edges(view),
            weight=self.edge_weight,
        )

    def edges(self, view: PatchView) -> Tensor:
        """(B, N) strength of the edge in every patch, from 0 to 1."""
        patches = view.normalized
        brightness = centered_brightness(patches) if self.seeds == "published" else patches.mean(2)
        return edge_scores(brightness.unflatten(1, view.grid), border=self.edge_border)

    @override
    def similarity(self, view: PatchView, anchors: Tensor, *, mixed: bool = True) -> Tensor:
        """(B, A, N) of every patch to every anchor, with what is transported."""
        patches = view.num_patches
        if self.transport == "none":  # rows of anchors are enough
            similarity = super().similarity(view, anchors, mixed=mixed)
        else:
            every = torch.arange(patches, device=view.device).expand(len(anchors), -1)
            pairs = super().similarity(view, every, mixed=mixed)  # (B, N, N)
            pairs = pairs + transported(pairs, self.transport)
            similarity = pairs.gather(1, anchors.unsqueeze(2).expand(-1, -1, patches))
        if self.protect_above is None:
            return similarity
        is_edge = (self.edges(view) > self.protect_above).unsqueeze(1)
        return similarity.masked_fill(is_edge, -torch.inf)

    @override
    def pixel_similarity(self, view: PatchView, anchors: Tensor) -> Tensor:
        """(B, A, N) of the pixels of every patch to those of every anchor; 0 of constant ones."""
        return super().pixel_similarity(view, anchors).nan_to_num(nan=0.0)
